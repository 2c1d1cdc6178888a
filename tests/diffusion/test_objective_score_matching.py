"""Denoising and implicit score matching against closed forms and each other."""

import math

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.objectives.loss import Loss
from pipeline.diffusion.objectives.objective import Objective
from pipeline.diffusion.objectives.score_matching import DenoisingScoreMatching, ImplicitScoreMatching
from pipeline.diffusion.schedule import VP, Geometric
from tests.diffusion.objective_cases import NONE, eps_error, gaussian_denoiser, key, on_grid

X = on_grid(256, std=0.3, size=4)
SQUARE = float(X.double().square().mean())
LAW = Geometric(0.05, 5.0)


def mean(objective: Objective, model_std: float, steps: int, prediction: str = "eps") -> tuple[float, float]:
    denoiser = gaussian_denoiser(model_std, LAW, prediction, "ve")
    losses = [objective.loss(denoiser, X, NONE, key(step)).per_image.detach().mean() for step in range(steps)]
    values = torch.stack(losses)
    return float(values.mean()), float(values.std() / math.sqrt(steps))


def close(found: tuple[float, float], expected: float) -> bool:
    return abs(found[0] - expected) < 5 * found[1]


def mean_error(gamma: Tensor, model_std: float = 0.2) -> float:
    return float(eps_error(gamma, model_std, SQUARE).mean())


MIDPOINTS = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000


def test_denoising_on_discrete_and_continuous_levels() -> None:
    levels = LAW.gamma(torch.linspace(0, 1, 10, dtype=torch.float64))
    assert close(mean(DenoisingScoreMatching(levels=10), 0.2, 40), 0.5 * mean_error(levels))
    assert close(mean(DenoisingScoreMatching(), 0.2, 40), 0.5 * mean_error(LAW.gamma(MIDPOINTS)))


@pytest.mark.parametrize("importance", [False, True])
def test_likelihood_weighting_is_the_bound(importance: bool) -> None:
    expected = 0.5 * mean_error(LAW.gamma(MIDPOINTS)) * (LAW.gamma_max - LAW.gamma_min)
    assert close(mean(DenoisingScoreMatching(weighting="likelihood", importance=importance), 0.2, 40), expected)


def test_importance_sampled_times_have_less_variance() -> None:
    """On a law that hurries, where the likelihood weight is far from even."""
    denoiser = gaussian_denoiser(0.2, VP(t_min=1e-3))

    def spread(importance: bool) -> float:
        objective = DenoisingScoreMatching(weighting="likelihood", importance=importance, stratified=False)
        with torch.no_grad():
            values = [objective.loss(denoiser, X, NONE, key(step)).per_image.mean() for step in range(60)]
        return float(torch.stack(values).var())

    assert spread(True) < 0.1 * spread(False)


# --- implicit -------------------------------------------------------------------------------------


def test_exact_trace_in_closed_form() -> None:
    """eps_hat = (1 - k) y / s, so that the divergence term is -(1 - k) and the norm (1 - k)^2 y^2 / (2 s^2)."""
    denoiser = gaussian_denoiser(0.2, LAW, "x", "ve")
    loss = ImplicitScoreMatching("exact").loss(denoiser, X[:16], NONE, key())
    s2 = torch.exp(loss.gamma)
    shrink = s2 / (s2 + 0.04)
    torch.testing.assert_close(loss.parts["divergence"], -shrink, rtol=1e-4, atol=0)


@pytest.mark.parametrize("prediction", ["eps", "x", "v", "edm"])
@pytest.mark.parametrize("trace", ["exact", "hutchinson", "sliced"])
def test_implicit_is_denoising_less_one_half(trace: str, prediction: str) -> None:
    """E[implicit] = E[denoising] - 1/2 a dimension, whatever the network (Vincent 2011, eq. 11; Hyvarinen 2005)."""
    found = mean(ImplicitScoreMatching(trace, levels=5), 0.2, 16, prediction)
    levels = LAW.gamma(torch.linspace(0, 1, 5, dtype=torch.float64))
    assert found[1] < 0.05
    assert close(found, 0.5 * mean_error(levels) - 0.5)


def test_probes_are_unbiased_around_the_exact_trace() -> None:
    """Same y, many probes: the estimates' mean over images is the exact one within 4 standard errors."""

    def run(trace: str, probes: int) -> Loss:
        denoiser = gaussian_denoiser(0.2, LAW, scaling="ve")
        return ImplicitScoreMatching(trace, probes).loss(denoiser, X, NONE, key())

    exact, hutchinson, sliced = run("exact", 1), run("hutchinson", 4), run("sliced", 64)
    torch.testing.assert_close(hutchinson.parts["norm"], exact.parts["norm"])
    # the Jacobian of this network is diagonal: random signs find its trace exactly
    torch.testing.assert_close(hutchinson.parts["divergence"], exact.parts["divergence"], rtol=1e-4, atol=0)
    for part in ("norm", "divergence"):
        gap = sliced.parts[part] - exact.parts[part]
        assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(len(gap))


@pytest.mark.parametrize("trace", ["exact", "hutchinson", "sliced"])
def test_its_gradient_is_that_of_denoising(trace: str) -> None:
    """The derivative in the network's scale k -> a k, in closed form, through the differentiated divergence."""
    denoiser = gaussian_denoiser(0.2, LAW, "x", "ve")
    parameter = dict(denoiser.network.named_parameters())["scale"]
    gradients = []
    for step in range(24):
        loss = ImplicitScoreMatching(trace, levels=5).loss(denoiser, X, NONE, key(step))
        gradients.append(torch.autograd.grad(loss.per_image.mean(), parameter)[0])
    stack = torch.cat(gradients)
    gamma = LAW.gamma(torch.linspace(0, 1, 5, dtype=torch.float64))
    s2 = torch.exp(gamma)
    k = 0.04 / (0.04 + s2)
    expected = (0.5 * (-2 * k * (1 - k) * SQUARE / s2 + 2 * k**2)).mean()
    assert abs(float(stack.mean() - expected)) < 5 * float(stack.std()) / math.sqrt(len(stack))


def test_errors_name_what_to_do() -> None:
    with pytest.raises(ValueError, match="hutchinson"):
        ImplicitScoreMatching("exact").loss(gaussian_denoiser(0.2), on_grid(2, 0.3, size=32), NONE, key())
    with pytest.raises(ValueError, match="probes"):
        ImplicitScoreMatching(probes=0)
    with pytest.raises(ValueError, match=r"objective\.trace"):
        ImplicitScoreMatching("hutchison")
    with pytest.raises(ValueError, match="continuous"):
        DenoisingScoreMatching(levels=5, weighting="likelihood")
    with pytest.raises(ValueError, match="levels"):
        ImplicitScoreMatching(levels=-1)
