"""Colour images lie in channels_last or not, by where they come from: what a model makes of them is the same."""

from typing import Any

import pytest
import torch

from pipeline.backbones import BACKBONES
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.likelihood.estimators import ESTIMATORS
from pipeline.diffusion.objectives.objective import OBJECTIVES
from pipeline.diffusion.pixels import to_model
from pipeline.diffusion.procedure import drive
from pipeline.diffusion.randomness import Noise, StepKey
from pipeline.diffusion.sampling.encode import ENCODERS
from pipeline.diffusion.sampling.samplers import SAMPLERS
from pipeline.model import Model, ModelConfig, Sampling, Scoring, build

SIDE = 4
NETWORKS: dict[str, dict[str, Any]] = {
    "unet": {"base_width": 8, "multipliers": [1, 2], "blocks": 1, "attention_at": [2], "dropout": 0.0},
    "vdm": {"width": 8, "layers": 1, "fourier_exponents": [6], "dropout": 0.0},
    "dit": {"width": 16, "layers": 1, "heads": 2, "patch": 2},
    "mlp": {"width": 16, "blocks": 1},
}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "vlb": [{"levels": 4}, {"levels": 4, "decoder": "gaussian"}],
    "vlb_discrete": [{"steps": 5}],
    "ddim_bound": [{"steps": 5}],
    "ode": [
        {"tolerance": 0.3},
        {"tolerance": 0.3, "samples": 2, "importance": True, "trace": "fixed", "probes": 2},
        {"tolerance": 0.3, "samples": 2, "decoder": "gaussian"},
        {"tolerance": 0.3, "samples": 2, "dequantisation": "uniform"},
    ],
}


def model(network: str) -> Model:
    config = ModelConfig(
        SIDE,
        3,
        network={"name": network, **NETWORKS[network]},
        schedule={"name": "linear_gamma", "gamma_min": -5.0, "gamma_max": 2.0},
        prediction="v",
        level="normalised_gamma",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = build(config)
        for parameter in denoiser.parameters():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    return Model(config, denoiser)


def layouts() -> tuple[torch.Tensor, ...]:
    """The same two images: as arrays have them, as shards and files do, and every other column of a wider one."""
    plain = torch.randint(256, (2, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1)).byte()
    cut = plain.repeat_interleave(2, dim=3)[..., ::2]
    return plain, plain.contiguous(memory_format=torch.channels_last), cut


def test_tables_are_covered() -> None:
    assert set(NETWORKS) == set(BACKBONES)
    assert set(OPTIONS) == set(ESTIMATORS)


@pytest.mark.parametrize("network", NETWORKS)
def test_scores_do_not_depend_on_the_layout(network: str) -> None:
    made = model(network)
    for estimator in OPTIONS:
        for options in OPTIONS[estimator][: None if network == "unet" else 1]:
            found = [made.bits_per_dim(images, how=Scoring(estimator, options)) for images in layouts()]
            for other in found[1:]:
                assert torch.equal(found[0].nats, other.nats), (estimator, options)
                assert torch.equal(found[0].standard_error, other.standard_error), (estimator, options)


def test_samples_from_images_do_not_depend_on_the_layout() -> None:
    made = model("unet")
    for sampler in SAMPLERS:
        how = Sampling(sampler, steps=4)
        found = [
            drive(made.sampling((1, 2), None, how, init=images, strength=0.6), made.networks) for images in layouts()
        ]
        assert torch.equal(found[0], found[1]), sampler
        assert torch.equal(found[0], found[2]), sampler


def test_latents_do_not_depend_on_the_layout() -> None:
    made = model("unet")
    for sampler in ENCODERS:
        how = Sampling(sampler, steps=4)
        up = [drive(made.encoding(images, None, how), made.networks) for images in layouts()]
        assert torch.equal(up[0], up[1]), sampler
        assert torch.equal(up[0], up[2]), sampler
        last = up[0].contiguous(memory_format=torch.channels_last)
        down = [drive(made.sampling((1, 2), None, how, latents=latents), made.networks) for latents in (up[0], last)]
        assert torch.equal(*down), sampler


@pytest.mark.parametrize("draw", ["normal_", "uniform_", "rademacher_"])
def test_draws_do_not_depend_on_the_layout(draw: str) -> None:
    plain, last = torch.empty(2, 3, 8, 8), torch.empty(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    assert torch.equal(getattr(Noise((1, 2)), draw)(plain), getattr(Noise((1, 2)), draw)(last))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("objective", ["simple", "vlb", "implicit_score_matching"])
def test_training_agrees_to_rounding(network: str, objective: str) -> None:
    """Training takes images as they lie, for speed, and draws the same noise."""
    made = model(network).denoiser.requires_grad_()
    losses, gradients = [], []
    for images in layouts():
        loss = OBJECTIVES[objective]().loss(made, to_model(images), Conditioning(), StepKey(0, 0, 0, 1))
        made.zero_grad()
        loss.per_image.sum().backward()
        losses.append(loss.per_image.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None]))
    for index in (1, 2):
        torch.testing.assert_close(losses[0], losses[index], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            gradients[0], gradients[index], rtol=1e-3, atol=1e-3 * float(gradients[0].abs().max())
        )
