"""Time laws, against the published discrete formulas and finite differences."""

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.diffusion.scaling import SCALINGS
from pipeline.diffusion.schedule import (
    EDM,
    SCHEDULES,
    VP,
    Cosine,
    Flow,
    Geometric,
    LearnedGamma,
    LinearBeta,
    LinearGamma,
    SubVP,
    derivative,
)

F64 = torch.float64
TABLED: dict[str, LinearBeta | Cosine] = {
    "linear_beta": LinearBeta(),
    "cosine": Cosine(),
    "linear_beta_4000": LinearBeta(4000),
    "cosine_4000": Cosine(4000, gamma_limit=25.0),
}
LAWS = (
    {name: law() for name, law in SCHEDULES.items()}
    | TABLED
    | {
        "learned_scalar": LearnedGamma(shape="scalar"),
        "learned_ends": LearnedGamma(learn_ends=True),
    }
)


def abar_of(gamma: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(-gamma)


# --- published values -------------------------------------------------------------------------------------------------


def numpy_linear(steps: int) -> np.ndarray:
    scale = 1000 / steps
    return np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)


def numpy_cosine(steps: int) -> np.ndarray:
    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - f((i + 1) / steps) / f(i / steps), 0.999) for i in range(steps)])


@pytest.mark.parametrize(
    ("law", "betas"),
    [
        (LinearBeta(), numpy_linear(1000)),
        (LinearBeta(4000), numpy_linear(4000)),
        (LinearBeta(100), numpy_linear(100)),
        (Cosine(), numpy_cosine(1000)),
        (Cosine(4000, gamma_limit=25.0), numpy_cosine(4000)),
        (Cosine(50), numpy_cosine(50)),
    ],
)
def test_tables_are_the_published_discrete_ones(law: LinearBeta | Cosine, betas: np.ndarray) -> None:
    abar = np.cumprod(1 - betas)
    assert np.allclose(law.betas().numpy(), betas, rtol=1e-12)
    assert np.allclose(abar_of(law.table).numpy(), abar, rtol=1e-11)
    assert np.allclose(torch.sigmoid(law.table).numpy(), 1 - abar, rtol=1e-9)


def test_last_abars() -> None:
    assert float(abar_of(LinearBeta().table[-1])) == pytest.approx(4.0358e-5, rel=2e-5)
    assert float(abar_of(Cosine().table[-1])) == pytest.approx(2.43e-9, rel=2e-3)
    assert float(abar_of(Cosine(4000, gamma_limit=25.0).table[-1])) == pytest.approx(1.52e-10, rel=3e-3)
    assert float(abar_of(torch.tensor(VP().gamma_max, dtype=F64))) == pytest.approx(4.319e-5, rel=2e-4)


def test_posterior_log_variances() -> None:
    """IDDPM's clipped first value log beta-tilde_1 = -9.8167 and log beta_0 = -9.2103 (linear, T = 1000)."""
    betas, abar = LinearBeta().betas(), abar_of(LinearBeta().table)
    beta_tilde = betas[1] * (1 - abar[0]) / (1 - abar[1])
    assert float(torch.log(beta_tilde)) == pytest.approx(-9.8167, abs=5e-5)
    assert float(torch.log(betas[0])) == pytest.approx(-9.2103, abs=5e-5)


def test_vp_law_is_the_sdes() -> None:
    """log alpha = -t^2 19.9 / 4 - 0.1 t / 2, deviation 1.049e-2 at 1e-3; sub-VP: 1 - alpha^2, no root."""
    tau = torch.tensor([1e-5, 1e-3, 0.3, 1.0], dtype=F64)
    log_alpha = -0.25 * tau**2 * 19.9 - 0.5 * tau * 0.1
    law = VP()
    t = (tau - law.t_min) / (1 - law.t_min)
    assert torch.allclose(law.gamma(t), torch.log(-torch.expm1(2 * log_alpha)) - 2 * log_alpha, rtol=1e-9)
    sigma = SCALINGS["vp"](law.gamma(t)) * torch.exp(law.gamma(t) / 2)
    assert float(sigma[1]) == pytest.approx(1.049e-2, rel=5e-4)
    sub = SubVP(t_min=1e-5)
    gamma = sub.gamma(t)
    alpha = SCALINGS["subvp"](gamma)
    assert torch.allclose(alpha, torch.exp(log_alpha), rtol=1e-9)
    assert torch.allclose(alpha * torch.exp(gamma / 2), -torch.expm1(2 * log_alpha), rtol=1e-9)


def test_other_published_ranges() -> None:
    geometric, edm, flow, vdm = Geometric(), EDM(), Flow(), LinearGamma()
    assert math.exp(geometric.gamma_max / 2) == pytest.approx(50)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    assert torch.exp(geometric.gamma(t) / 2).tolist() == pytest.approx([0.01, math.sqrt(0.5), 50])
    assert torch.exp(edm.gamma(t) / 2)[[0, 2]].tolist() == pytest.approx([0.002, 80])
    median = torch.exp(edm.gamma(torch.tensor(0.5, dtype=F64)) / 2)
    assert float(median) == pytest.approx(math.exp(-1.2), rel=1e-3)  # of ln sigma ~ N(-1.2, 1.2^2), cut far out
    tau = torch.sigmoid(flow.gamma(t) / 2)
    assert float(tau[1] - tau[0]) == pytest.approx(float(tau[2] - tau[1]), rel=1e-12)  # uniform in tau
    assert float(torch.sigmoid(torch.tensor(vdm.gamma_min))) == pytest.approx(1.674e-6, rel=1e-3)


# --- every law --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAWS)
def test_law_runs_between_its_ends_increasing_and_inverts(name: str) -> None:
    law = LAWS[name]
    with torch.no_grad():
        t = torch.linspace(0, 1, 65, dtype=F64)
        gamma = law.gamma(t)
        assert float(gamma[0]) == pytest.approx(law.gamma_min, abs=1e-9)
        assert float(gamma[-1]) == pytest.approx(law.gamma_max, abs=1e-9)
        assert bool((gamma.diff() > 0).all())
        assert torch.allclose(law.time(gamma), t, atol=1e-9)
        assert gamma.dtype == F64
        assert law.gamma(t.float()).dtype == torch.float32
        assert law.time(gamma.float()).dtype == torch.float32


@pytest.mark.parametrize("name", LAWS)
def test_derivative_agrees_with_finite_differences(name: str) -> None:
    law = LAWS[name]
    t = torch.linspace(0.03, 0.97, 41, dtype=F64)
    if name in TABLED:  # piecewise linear: between two nodes
        steps = TABLED[name].steps
        t = (torch.floor(t * (steps - 1)) + 0.5) / (steps - 1)
    h = 1e-6
    with torch.no_grad():
        numeric = (law.gamma(t + h) - law.gamma(t - h)) / (2 * h)
        assert torch.allclose(derivative(law.gamma, t), numeric, rtol=1e-6)


@pytest.mark.parametrize("name", TABLED)
def test_nodes_of_a_table_are_exact_integers(name: str) -> None:
    law = TABLED[name]
    index = torch.arange(law.steps, dtype=F64)
    assert torch.equal(law.time(law.table) * (law.steps - 1), (index / (law.steps - 1)) * (law.steps - 1))
    assert torch.allclose(law.time(law.table) * (law.steps - 1), index, rtol=0, atol=1e-9)
    assert torch.allclose(law.gamma(index / (law.steps - 1)), law.table, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(gamma_min=st.floats(-20, 0), span=st.floats(0.1, 20), scale=st.floats(0.01, 5))
def test_learned_law_is_monotone_whatever_its_weights(gamma_min: float, span: float, scale: float) -> None:
    law = LearnedGamma(gamma_min, min(gamma_min + span, 20), hidden=16, learn_ends=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (law.l1, law.l2_weight, law.l2_bias, law.l3_weight):
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64) * scale)
        t = torch.linspace(0, 1, 101, dtype=F64)
        gamma = law.gamma(t)
        assert bool((gamma.diff() > 0).all())
        assert float(gamma[0]) == pytest.approx(law.gamma_min, abs=1e-9)
        assert float(gamma[-1]) == pytest.approx(law.gamma_max, abs=1e-9)
        assert torch.allclose(law.gamma(law.time(gamma)), gamma, atol=1e-6)


def test_learned_gradients_reach_interior_and_ends_only_where_asked() -> None:
    for learn_ends in (False, True):
        law = LearnedGamma(learn_ends=learn_ends)
        law.gamma(torch.linspace(0.1, 0.9, 5, dtype=F64)).square().sum().backward()
        assert law.l2_weight.grad is not None
        assert float(law.l2_weight.grad.abs().max()) > 0
        assert (law.ends.grad is not None) == learn_ends


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: LinearBeta(steps=1), "schedule.steps must be at least 2"),
        (lambda: LinearBeta(steps=20).table, "use more than 20 steps"),
        (lambda: Cosine(steps=4000, gamma_limit=20).table, "beyond gamma_limit 20"),
        (lambda: LinearGamma(5.0, -5.0), "gamma_min < gamma_max"),
        (lambda: LinearGamma(-25.0, 5.0), "-20 <= gamma_min"),
        (lambda: LearnedGamma(5.0, -5.0), "gamma_min < gamma_max"),
        (lambda: LearnedGamma(shape="mlp"), "shape must be 'net' or 'scalar'"),
        (lambda: Geometric(1.0, 0.5), "0 < sigma_min < sigma_max"),
        (lambda: Flow(3.0, -3.0), "gamma_min < gamma_max"),
        (lambda: VP(t_min=0.0), "t_min"),
        (lambda: SubVP(beta_min=-1.0), "0 < beta_min <= beta_max"),
        (lambda: LinearBeta(beta_start=0.0), "0 < beta_start <= beta_end"),
        (lambda: Cosine(max_beta=1.0), "max_beta in (0, 1)"),
        (lambda: EDM(sigma_min=1e-6), "-20 <= gamma_min"),
        (lambda: EDM(p_std=0.0), "p_std"),
    ],
)
def test_bad_schedules_are_refused(act: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        act()
