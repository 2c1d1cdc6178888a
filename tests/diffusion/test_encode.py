"""Encoding is the probability flow upwards: it agrees with the exact map, and leads back."""

import math

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.procedure import drive
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.sampling.encode import ENCODERS
from pipeline.diffusion.sampling.samplers import SAMPLERS
from tests.diffusion.sampler_cases import HIGH, LOW, NONE, PROCESS, correlated, mixture, slope, uniform_gamma

F64 = torch.float64
X = torch.tensor([[0.3, -0.5, 0.2], [-0.2, 0.1, 0.4]], dtype=F64)


def up(steps: int) -> Tensor:
    return uniform_gamma(steps).flip(0)


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "adaptive"])
def test_encoding_converges_to_the_exact_map_at_the_samplers_order(name: str) -> None:
    oracle = correlated()
    exact = oracle.flow(X, LOW, HIGH)
    errors = [
        float((drive(ENCODERS[name](X, up(steps + 1), NONE), oracle) - exact).abs().max()) for steps in (160, 320)
    ]
    assert abs(slope(errors) - SAMPLERS[name].order) < 0.15, errors


def test_adaptive_encoding_meets_its_tolerance() -> None:
    oracle = correlated()
    exact = oracle.flow(X, LOW, HIGH)
    for tolerance in (1e-3, 1e-5, 1e-8):
        got = drive(ENCODERS["adaptive"](X, up(2), NONE, tolerance=tolerance), oracle)
        assert float(((got - exact) / math.exp(HIGH / 2)).square().mean().sqrt()) < 50 * tolerance


@pytest.mark.parametrize("name", ENCODERS)
def test_there_and_back_again(name: str) -> None:
    """The sampler of the same name returns the image, to what both ways' errors leave, and x itself is left alone."""
    x = mixture().sample(4, torch.Generator().manual_seed(0))
    kept = x.clone()
    options = {"tolerance": 1e-7} if name == "adaptive" else {}
    latent = drive(ENCODERS[name](x, up(200), NONE, **options), mixture())
    assert torch.equal(x, kept)
    back = drive(SAMPLERS[name].start(PROCESS, latent, uniform_gamma(200), Noise(range(4)), NONE, **options), mixture())
    # the last level's x_hat is within its noise of the image; the rest is the order's
    bound = {1: 0.05, 2: 2e-3, 5: 1e-3}[SAMPLERS[name].order] + 3 * math.exp(LOW / 2) * 0.1
    assert float((back - x).abs().max()) < bound


def test_latents_are_the_priors() -> None:
    """Images of the model's own law become N(0, v + s^2), nearly the prior at the top."""
    x = mixture().sample(2000, torch.Generator().manual_seed(1))
    x = x + math.exp(LOW / 2) * torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    latent = drive(ENCODERS["heun"](x, up(40), NONE), mixture())
    ratio = latent.square().mean(0) / PROCESS.prior_variance
    assert bool(((ratio - 1).abs() < 5 * math.sqrt(2 / 2000)).all())


@pytest.mark.parametrize("name", ENCODERS)
def test_bad_grids_are_refused(name: str) -> None:
    for gammas, message in (
        (uniform_gamma(4), "strictly ascending"),
        (torch.tensor([0.0, 0.0], dtype=F64), "strictly ascending"),
        (torch.zeros(0, dtype=F64), "at least one level"),
    ):
        with pytest.raises(ValueError, match=message):
            ENCODERS[name](X, gammas, NONE)
    with pytest.raises(ValueError, match="start in float64"):
        ENCODERS[name](X.float(), torch.tensor([-19.0, 0.0], dtype=F64), NONE)
