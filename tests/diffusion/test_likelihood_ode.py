"""The probability-flow ODE: the value, the solver, the trace."""

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint

from pipeline.diffusion import runge_kutta
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Prediction
from pipeline.diffusion.likelihood import ode
from pipeline.diffusion.oracles.exact import GaussianMixture, diagonal_mixture, full_mixture
from pipeline.diffusion.oracles.fields import mat
from pipeline.diffusion.procedure import drive
from pipeline.diffusion.randomness import Noise
from tests.diffusion.likelihood_cases import (
    NONE,
    SmallNetwork,
    UniformLevels,
    estimate,
    field_covariance,
    gaussian_field,
    grey_images,
    process,
    small_denoiser,
)

ENDS = (-8.0, 5.0)
EXACT: dict[str, Any] = {"trace": "exact", "solver": "dopri5", "tolerance": 1e-7}


def mixture(side: int = 3) -> GaussianMixture:
    covariance = field_covariance(side, 0.3, 2.0, 0.05)
    means = torch.stack([torch.full((side * side,), 0.4), torch.linspace(-0.6, 0.2, side * side)])
    return full_mixture(
        torch.tensor([0.6, 0.4], dtype=torch.float64), means, torch.stack([covariance, 0.6 * covariance])
    )


def solve(oracle: Any, y: Tensor, kind: str = "exact", probes: int = 1, **options: Any) -> ode.Flow:
    trace = ode.Trace(kind, probes, Noise(range(len(y))).generators)
    return drive(ode.solve(y, ENDS, NONE, trace, **options), oracle)


# --- the value ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", list(runge_kutta.PAIRS))
def test_change_of_density_is_that_of_the_marginals(solver: str) -> None:
    """The flow carries the marginal at gamma_min to that at gamma_max, so that the log volume is their difference."""
    oracle = mixture()
    y = oracle.sample(20, torch.Generator().manual_seed(1)).view(20, 1, 3, 3)
    end = solve(oracle, y, pair=solver, tolerance=1e-6)
    low, high = (torch.full((20,), gamma, dtype=torch.float64) for gamma in ENDS)
    exact = oracle.log_density(y, low) - oracle.log_density(end.y, high)
    assert float((end.log_volume - exact).abs().max()) < (1e-4 if solver == "dopri5" else 1e-3)
    assert float(end.error.max()) < 0.01
    assert float(end.probe_variance.abs().max()) == 0
    s = math.exp(ENDS[0] / 2)
    torch.testing.assert_close(end.x_hat, oracle.denoise(y, low), rtol=1e-9, atol=1e-12 / s)


@pytest.mark.parametrize("name", list(runge_kutta.PAIRS))
def test_the_pairs_have_their_order(name: str) -> None:
    """On dy/dt = y cos(t) + t: a step's error falls as h^(order + 1), its estimate as h^order."""
    pair = runge_kutta.PAIRS[name]

    def step(h: float) -> tuple[float, float]:
        slopes: list[float] = []
        y = 1.0
        for node, weights in zip((0.0, *pair.nodes), ((), *pair.stages), strict=True):
            y = 1.0 + h * sum(w * k for w, k in zip(weights, slopes, strict=True))
            slopes.append(y * math.cos(node * h) + node * h)
        return y, h * sum(w * k for w, k in zip(pair.error, slopes, strict=True))

    def truth(h: float) -> float:
        t = torch.linspace(0, h, 20001, dtype=torch.float64)
        return math.exp(math.sin(h)) * (1 + float(torch.trapezoid(t * torch.exp(-torch.sin(t)), t)))

    sizes = (0.2, 0.1)
    errors = [abs(step(h)[0] - truth(h)) for h in sizes]
    estimates = [abs(step(h)[1]) for h in sizes]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(pair.order + 1, abs=0.5)
    assert math.log2(estimates[0] / estimates[1]) == pytest.approx(pair.order, abs=0.5)


def test_uniform_levels_score_exactly_eight() -> None:
    """Of the uniform model the bound is tight for every draw: the posterior of a level is the decoder."""
    x, facts = grey_images(4, 2), process(-13.3, 13.0)
    result = estimate("ode", UniformLevels(), x, facts=facts, **EXACT)
    torch.testing.assert_close(result.bits_per_dim, torch.full((4,), 8.0, dtype=torch.float64), atol=2e-5, rtol=0)
    assert float(result.standard_errors["dequantisation"].max()) < 1e-9
    assert float(result.standard_errors["probes"].max()) == 0


def test_lifting_scores_the_lattice_and_uniform_dequantisation_does_not() -> None:
    """On a field of exactly known probabilities, by a denoiser that knows the lattice."""
    field = mat()
    levels = field.sample(8, torch.Generator().manual_seed(0))
    x, truth = field.images(levels), field.bits_per_dim(levels)
    options: dict[str, Any] = {"trace": "exact", "solver": "dopri5", "tolerance": 1e-4}
    gap = (estimate("ode", field, x, **options).bits_per_dim - truth).mean()
    assert abs(float(gap)) < 0.002
    wrong = (estimate("ode", field, x[:2], dequantisation="uniform", **options).bits_per_dim - truth[:2]).mean()
    assert float(wrong) > 0.5


def test_importance_weights_tighten_uniform_dequantisation() -> None:
    """Of a density that a few bins can tell: -log of the mean weight nears the probability of the bins from above."""
    oracle = diagonal_mixture([1.0], [[0.01] * 4], [[0.006**2] * 4])
    facts = process(-16.0, 5.0)
    x = torch.tensor([[[[1 / 256, 3 / 256], [1 / 256, 5 / 256]]]]).float()
    spread = torch.distributions.Normal(0.01, math.sqrt(0.006**2 + math.exp(-16)))
    edges = x.double().flatten()[:, None] + torch.tensor([-1 / 256, 1 / 256])
    truth = -float(spread.cdf(edges).diff(dim=1).log().sum())
    common: dict[str, Any] = {"facts": facts, "dequantisation": "uniform", "tolerance": 1e-3, "data_std": 0.02}
    many = x.expand(16, 1, 2, 2)
    plain = estimate("ode", oracle, many, samples=4, **EXACT | common).nats
    result = estimate("ode", oracle, many, samples=64, importance=True, **EXACT | common)
    assert float(plain.mean()) > truth + 0.1
    assert abs(float(result.nats.mean()) - truth) < 0.05
    torch.testing.assert_close(sum(result.parts.values()), result.nats)
    assert "importance" in result.parts


def test_gaussian_decoder_asks_once_more() -> None:
    oracle, x = gaussian_field(4), grey_images(3, 4)
    plain = estimate("ode", oracle, x)
    other = estimate("ode", oracle, x, decoder="gaussian")
    assert torch.equal(other.evaluations, plain.evaluations + 1)
    assert torch.equal(other.parts["volume"], plain.parts["volume"])
    assert bool(torch.isnan(other.standard_errors["dequantisation"]).all())
    twice = estimate("ode", oracle, x, decoder="gaussian", samples=3)
    assert bool((twice.standard_errors["dequantisation"] > 0).all())


# --- the trace ----------------------------------------------------------------------------------------------------


class Linear:
    """x_hat = y A^T: no denoiser, but a Jacobian that is known, and not symmetric."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def __call__(self, y: Tensor, gamma: Tensor, conditioning: Conditioning, shared: object = None) -> Prediction:
        return Prediction((y.flatten(1) @ self.matrix.T).view_as(y))


def test_exact_trace_of_a_matrix() -> None:
    matrix = 0.1 * torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix += 0.5 * torch.eye(6, dtype=torch.float64)
    y = torch.randn(5, 1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    end = solve(Linear(matrix), y, pair="dopri5", tolerance=1e-6)
    length = (ENDS[1] - ENDS[0]) / 2
    expected = (6 - torch.trace(matrix)) * length
    torch.testing.assert_close(end.log_volume, expected.expand(5), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("kind", ["fixed", "refreshed"])
def test_ten_thousand_probes_are_unbiased(kind: str) -> None:
    oracle = mixture(2)
    one = oracle.sample(1, torch.Generator().manual_seed(3)).view(1, 1, 2, 2)
    exact = solve(oracle, one, pair="bosh3", tolerance=1e-5).log_volume
    found = solve(oracle, one.expand(10_000, 1, 2, 2), kind, tolerance=3e-3 if kind == "refreshed" else 1e-4)
    z = (found.log_volume.mean() - exact) / found.log_volume.std() * 100
    assert abs(float(z)) < 3


@pytest.mark.parametrize(("kind", "probes"), [("fixed", 2), ("refreshed", 1), ("refreshed", 2)])
def test_variance_from_the_probes(kind: str, probes: int) -> None:
    """What a solve says of its own variance is, on average, the variance of repeats; of one fixed probe, no less."""
    oracle = gaussian_field(4)
    one = oracle.sample(1, torch.Generator().manual_seed(4)).view(1, 1, 4, 4)
    repeats = solve(oracle, one.expand(1500, 1, 4, 4), kind, probes, tolerance=1e-2)
    assert float(repeats.probe_variance.mean() / repeats.log_volume.var()) == pytest.approx(1, abs=0.15)
    if kind == "fixed":
        single = solve(oracle, one.expand(1500, 1, 4, 4), kind, 1, tolerance=1e-2)
        assert float(single.probe_variance.mean() / single.log_volume.var()) > 0.8


def test_refreshed_probes_average_out() -> None:
    """At equal work the error of fresh vectors at each evaluation is several times smaller than that of kept ones."""
    oracle = gaussian_field(8)
    one = oracle.sample(1, torch.Generator().manual_seed(4)).view(1, 1, 8, 8)
    fixed, refreshed = (solve(oracle, one.expand(300, 1, 8, 8), kind) for kind in ("fixed", "refreshed"))
    assert float(fixed.log_volume.std() / refreshed.log_volume.std()) > 3
    assert float(refreshed.evaluations.double().mean()) < 1.1 * float(fixed.evaluations.double().mean())


# --- the work -----------------------------------------------------------------------------------------------------


def test_one_forward_and_one_product_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the network and at autograd; rows that have arrived are asked no more."""
    denoiser, x = small_denoiser(), grey_images(7, 8)
    network = cast(SmallNetwork, denoiser.network)
    backward = {"calls": 0}
    grad = torch.autograd.grad

    def counted(*arguments: Any, **options: Any) -> Any:
        backward["calls"] += 1
        return grad(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    for probes in (1, 3):
        network.rows.clear()
        backward["calls"] = 0
        result = estimate("ode", denoiser, x, conditioning=Conditioning(torch.arange(7)), probes=probes)
        rows = network.rows
        assert sum(rows) == int(result.evaluations.sum())
        assert len(rows) == int(result.evaluations.max())
        assert backward["calls"] == probes * len(rows)
        assert len(set(rows)) > 1  # the batch did shrink


def _reference(oracle: Any, y: Tensor, probe: Tensor, tolerance: float) -> tuple[Tensor, int]:
    """log volume of one image by torchdiffeq's dopri5 in log s with a fixed probe, and its evaluations."""
    calls = 0

    def field(tau: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        with torch.enable_grad():
            point = state[0].detach().requires_grad_()
            x_hat = oracle(point, 2 * tau.expand(1), NONE).x_hat
            product = torch.autograd.grad(x_hat, point, probe)[0]
        return point.detach() - x_hat.detach(), point[0].numel() - (product * probe).sum().view(1)

    times = torch.tensor([ENDS[0] / 2, ENDS[1] / 2], dtype=torch.float64)
    start = (y, torch.zeros(1, dtype=torch.float64))
    end = odeint(field, start, times, rtol=tolerance, atol=tolerance, method="dopri5")
    return end[1][-1], calls


def test_equal_to_torchdiffeq_with_no_more_evaluations() -> None:
    """The same probes: the same numbers to 1e-5 relative, and nowhere more evaluations at equal or smaller error."""
    oracle = gaussian_field(5)
    y = oracle.sample(4, torch.Generator().manual_seed(1)).view(4, 1, 5, 5)
    probes = ode.Trace("fixed", 1, Noise(range(4)).generators).vectors(y, range(4))[:, 0]

    def theirs(tolerance: float) -> tuple[Tensor, int]:
        results = [_reference(oracle, y[i : i + 1], probes[i : i + 1], tolerance) for i in range(4)]
        return torch.cat([value for value, _ in results]), sum(calls for _, calls in results)

    def ours(tolerance: float) -> tuple[Tensor, int]:
        end = solve(oracle, y, "fixed", tolerance=tolerance, pair="dopri5")
        return end.log_volume, int(end.evaluations.sum())

    exact, _ = theirs(1e-10)
    torch.testing.assert_close(ours(1e-8)[0], exact, rtol=1e-5, atol=0)
    peers = [((value - exact).square().mean().sqrt(), calls) for value, calls in map(theirs, (1e-3, 1e-4, 1e-5, 1e-6))]
    for tolerance in (1e-3, 1e-4, 1e-5):
        value, calls = ours(tolerance)
        error = (value - exact).square().mean().sqrt()
        assert calls <= min(other for peer, other in peers if peer <= error)


# --- what a user can cause ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": 0}, "probes must be at least 1, got 0"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"data_std": 0.0}, "data_std must be positive"),
        ({"tolerance": 0.0}, "tolerance must be between 0 and 1"),
        ({"trace": "hutchinson"}, "trace must be one of refreshed, fixed, exact"),
        ({"dequantisation": "none"}, "choose one of: gaussian, uniform"),
        ({"solver": "rk45"}, "choose one of: dopri5, bosh3"),
        ({"max_evaluations": 10}, r"image \d of the batch is at gamma -?\d+.\d+ after 10"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate("ode", gaussian_field(4), grey_images(2, 4), **options)


def test_exact_trace_is_refused_above_its_limit() -> None:
    with pytest.raises(ValueError, match="the images have 1089, the limit is 1024"):
        estimate("ode", UniformLevels(), grey_images(1, 33), trace="exact")


class Broken:
    """Answers nan above a level, for one image."""

    def __call__(self, y: Tensor, gamma: Tensor, conditioning: Conditioning, shared: object = None) -> Prediction:
        bad = (gamma > -5) & (gamma < -3) & (y.flatten(1).sum(1) > 0)
        return Prediction(torch.where(bad.view(-1, 1, 1, 1), math.nan, 0.5 * y))


def test_not_a_number_is_named() -> None:
    x = -grey_images(3, 2).abs()
    x[1] = -x[1]
    for name, message in (
        ("ode", r"image 1 of the batch, after \d+ evaluations, between gamma -\d"),
        ("vlb", r"image 1 of the batch at level \d+, gamma"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate(name, Broken(), x)


def test_a_stiff_network_ends_in_a_clear_error() -> None:
    """A rough Jacobian: steps shrink, evaluations are bounded, and the error names the place."""

    def rough(y: Tensor, gamma: Tensor, conditioning: Conditioning, shared: object = None) -> Prediction:
        return Prediction(0.5 * y + 0.1 * torch.sin(3e4 * y))

    with pytest.raises(ValueError, match="raise max_evaluations, or take a tolerance above"):
        estimate("ode", rough, grey_images(1, 2), trace="fixed", solver="dopri5", max_evaluations=300)
