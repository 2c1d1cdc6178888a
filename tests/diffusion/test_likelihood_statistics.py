"""The statistics of the statistics: the reported standard errors are those of repeats, and their intervals cover."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.likelihood.decoders import expected_softmax
from pipeline.diffusion.oracles.exact import GaussianMixture
from pipeline.diffusion.oracles.fields import mat, mix
from tests.diffusion.likelihood_cases import PIXELS, estimate, gaussian_field, process

FACTS = process()
REPEATS = 1000


def _image(field: GaussianMixture) -> Tensor:
    x = field.sample(1, torch.Generator().manual_seed(8))
    side = math.isqrt(field.dimensions)
    levels = ((x - PIXELS.first) / PIXELS.bin).round()
    return (PIXELS.first + PIXELS.bin * levels).view(1, 1, side, side)


def _modes(field: GaussianMixture, x: Tensor) -> tuple[Tensor, Tensor]:
    """Variances along the axes and the image's coordinates there."""
    assert field.axes is not None
    return field.spectra[0], (x.flatten() - field.means[0]) @ field.axes[0]


def _error(field: GaussianMixture, x: Tensor, gamma: Tensor) -> Tensor:
    """E|eps - eps_hat|^2 at gammas (k,)."""
    variance, place = _modes(field, x)
    s2 = torch.exp(gamma)[:, None]
    gain = variance / (variance + s2)
    return ((1 - gain) ** 2 * place**2 / s2 + gain**2).sum(1)


def _ends(x: Tensor) -> float:
    ratio = math.exp(FACTS.gamma_max) / FACTS.prior_variance
    prior = 0.5 * (x**2 / FACTS.prior_variance + ratio - 1 - math.log(ratio)).sum()
    return float(prior + expected_softmax(math.exp(FACTS.gamma_min / 2), PIXELS.index(x), PIXELS)[0])


def true_vlb(field: GaussianMixture, x: Tensor) -> float:
    gamma = torch.linspace(FACTS.gamma_min, FACTS.gamma_max, 20001, dtype=torch.float64)
    return float(0.5 * torch.trapezoid(_error(field, x, gamma), gamma)) + _ends(x)


def true_discrete(field: GaussianMixture, x: Tensor) -> float:
    gamma = torch.linspace(FACTS.gamma_min, FACTS.gamma_max, 200, dtype=torch.float64)
    return float((0.5 * torch.expm1(gamma.diff()) * _error(field, x, gamma[1:])).sum()) + _ends(x)


def true_ode(field: GaussianMixture, x: Tensor) -> float:
    """The flow of a Gaussian is linear: y_1 = m + A (y_0 - m); the lifted bound's mean over y_0 is closed."""
    variance, place = _modes(field, x)
    assert field.axes is not None
    s0, s1 = math.exp(FACTS.gamma_min), math.exp(FACTS.gamma_max)
    stretch = ((variance + s1) / (variance + s0)).sqrt()
    mean = field.means[0] @ field.axes[0]
    square = ((mean + stretch * place) ** 2).sum() + s0 * (stretch**2).sum()
    v, count = FACTS.prior_variance, field.dimensions
    prior = 0.5 * square / v + 0.5 * count * math.log(2 * math.pi * v)
    entropy = 0.5 * count * math.log(2 * math.pi * math.e * s0)
    reconstruction = expected_softmax(math.exp(FACTS.gamma_min / 2), PIXELS.index(x), PIXELS)[0]
    return float(prior - stretch.log().sum() - entropy + reconstruction)


CASES: dict[str, tuple[str, Callable[[GaussianMixture, Tensor], float], dict[str, Any]]] = {
    "vlb": ("vlb", true_vlb, {}),
    "vlb 24": ("vlb", true_vlb, {"levels": 24}),
    "every term": ("vlb_discrete", true_discrete, {"steps": 200}),
    "some terms": ("vlb_discrete", true_discrete, {"steps": 200, "terms": 40}),
    "some terms, uniform": ("vlb_discrete", true_discrete, {"steps": 200, "terms": 40, "importance": "uniform"}),
    "ddim": ("ddim_bound", true_discrete, {"steps": 200, "terms": 40}),
    "ode": ("ode", true_ode, {"samples": 3, "tolerance": 2e-3}),
    "ode exact": ("ode", true_ode, {"samples": 3, "tolerance": 2e-3, "trace": "exact"}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_intervals_cover_the_truth(case: str) -> None:
    """1,000 repeats on one image; the nominal 95% interval holds the truth in 93% to 97% of them."""
    name, truth_of, options = CASES[case]
    field = gaussian_field(6 if case != "ode exact" else 3)
    x = _image(field)
    truth = truth_of(field, x)
    rows = {} if name == "ode" else {"rows": 4 * REPEATS}
    result = estimate(name, field, x.expand(REPEATS, *x.shape[1:]), **rows, **options)
    low, high = result.interval
    covered = float(((low < truth) & (truth < high)).double().mean())
    assert 0.93 <= covered <= 0.97
    assert abs(float((result.nats - truth).mean())) < 4 * float(result.nats.std()) / math.sqrt(REPEATS)


def test_one_draw_does_not_understate_its_error() -> None:
    field = gaussian_field(6)
    x = _image(field)
    low, high = estimate("ode", field, x.expand(300, *x.shape[1:]), tolerance=2e-3).interval
    truth = true_ode(field, x)
    covered = float(((low < truth) & (truth < high)).double().mean())
    assert covered > 0.94


@pytest.mark.parametrize("name", ["vlb", "vlb_discrete", "ddim_bound", "ode"])
def test_known_fields_are_scored_within_their_error(name: str) -> None:
    """On images of exactly known probability, by a denoiser right to rounding: the mean gap is no more than chance.

    (The T-step bounds are above by about 1 / T: as their mean gap allows.)
    """
    count = 60
    for field in (mat(), mix()) if name != "ode" else (mat(),):
        levels = field.sample(count, torch.Generator().manual_seed(0))
        options: dict[str, Any] = {"steps": 1000, "terms": 64} if name in ("vlb_discrete", "ddim_bound") else {}
        result = estimate(name, field, field.images(levels), **options)
        gap = (result.bits_per_dim - field.bits_per_dim(levels)).mean()
        error = float(result.bits_per_dim_standard_error.square().mean().sqrt()) / math.sqrt(count)
        assert -3 * error < float(gap) < 3 * error + (0.05 if options else 0.002)


@pytest.mark.slow
def test_known_fields_within_three_thousandths() -> None:
    """5,000 held-out images x 64 levels, and 400 by the ODE with the exact trace on `mat`."""
    for field in (mat(), mix()):
        levels = field.sample(5000, torch.Generator().manual_seed(1))
        gaps: list[Tensor] = []
        for start in range(0, 5000, 250):
            part = levels[start : start + 250]
            result = estimate("vlb", field, field.images(part), seeds=range(start, start + 250))
            gaps.append(result.bits_per_dim - field.bits_per_dim(part))
        gap = torch.cat(gaps)
        error = float(gap.std()) / math.sqrt(5000)
        assert error < 0.003
        assert abs(float(gap.mean())) < 3 * error
        few = levels[:40]
        options: dict[str, Any] = {"trace": "exact", "solver": "dopri5", "tolerance": 1e-4}
        result = estimate("ode", field, field.images(few), **options)
        assert abs(float((result.bits_per_dim - field.bits_per_dim(few)).mean())) < 0.002
