"""Scalings, against their definitions and the numbers of the published models."""

import pytest
import torch

from pipeline.diffusion.scaling import SCALINGS, prior_variance, step_variance

F64 = torch.float64


def test_prior_variances_of_the_theory_page() -> None:
    """At gamma = 5: VP 149.41, sub-VP 150.41, flow 173.78, VE 148.41."""
    got = {name: prior_variance(name, 5.0) for name in SCALINGS}
    expected = {"vp": 149.41, "subvp": 150.41, "flow": 173.78, "ve": 148.41}
    assert got == {name: pytest.approx(value, abs=0.006) for name, value in expected.items()}


@pytest.mark.parametrize("name", SCALINGS)
def test_step_variance_is_beta(name: str) -> None:
    """(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2) / alpha_s^2 straight from alpha and sigma; VP: DDPM's beta in y."""
    g_t = torch.tensor([4.0, 1.0, -3.0], dtype=F64)
    g_s = torch.tensor([3.0, 0.9, -5.0], dtype=F64)
    a_t, a_s = SCALINGS[name](g_t), SCALINGS[name](g_s)
    sigma_t, sigma_s = a_t * torch.exp(g_t / 2), a_s * torch.exp(g_s / 2)
    expected = (sigma_t**2 - (a_t / a_s) ** 2 * sigma_s**2) / a_s**2
    assert torch.allclose(step_variance(name, g_t, g_s), expected, rtol=1e-9)
    if name == "vp":
        v_t, v_s = torch.exp(g_t), torch.exp(g_s)
        assert torch.allclose(expected, (v_t - v_s) * (1 + v_s) / (1 + v_t), rtol=1e-9)
    if name == "ve":
        assert torch.allclose(expected, torch.exp(g_t) - torch.exp(g_s), rtol=1e-9)


def test_scalings_are_the_theory_pages() -> None:
    gamma = torch.linspace(-20, 20, 81, dtype=F64)
    s = torch.exp(gamma / 2)
    alpha = {name: scaling(gamma) for name, scaling in SCALINGS.items()}
    assert torch.allclose(alpha["vp"] ** 2 + (alpha["vp"] * s) ** 2, torch.ones_like(s), rtol=1e-12)
    assert torch.equal(alpha["ve"], torch.ones_like(s))
    assert torch.allclose(alpha["subvp"] * s, 1 - alpha["subvp"] ** 2, rtol=1e-6, atol=1e-15)
    assert torch.allclose(alpha["flow"] + alpha["flow"] * s, torch.ones_like(s), rtol=1e-12)
