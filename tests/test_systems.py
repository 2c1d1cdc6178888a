"""Every published system's run file: on digits it trains, samples and is scored through the same code; on CIFAR-10 it
holds the published settings.
"""

import math
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from pipeline import backbones
from pipeline.backbones.published import PUBLISHED
from pipeline.choose import build as build_choice
from pipeline.conditioner import numbered
from pipeline.config import RunConfig, load_config
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.objectives.objective import OBJECTIVES
from pipeline.diffusion.randomness import StepKey
from pipeline.evaluation.config import EvaluationConfig
from pipeline.model import Model, Sampling, Scoring, build, space_of
from pipeline.training.step import TrainingModule

CONFIGS = Path(__file__).parent.parent / "jobs" / "configs"
FILES = sorted(CONFIGS.glob("digits*.yaml"))
FEW: dict[str, dict[str, Any]] = {
    "vlb": {"levels": 4},
    "vlb_discrete": {"terms": 4},
    "ddim_bound": {"terms": 4},
    "ode": {"tolerance": 0.1},
}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_step_lowers_the_loss_and_the_model_samples_and_scores(path: Path) -> None:
    config = load_config(str(path), ["model.network.base_width=16", "model.network.dropout=0"])
    torch.manual_seed(0)
    denoiser = build(config.model)
    module = TrainingModule(
        denoiser,
        build_choice(OBJECTIVES, config.objective, "objective"),
        numbered("labels", config.model.classes),
        space_of(config.model),
    )
    optimizer = torch.optim.Adam(denoiser.parameters(), 2e-3)
    pixels = torch.full((16, *config.model.image_shape), 200, dtype=torch.uint8)  # what can be learnt in a few steps
    told = Conditioning(torch.arange(16) % 10) if config.model.classes else Conditioning()
    losses = []
    for step in range(12):
        loss = module(pixels, told, StepKey(0, step, 0, 1)).per_image.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(torch.isfinite(torch.tensor(losses)))
    assert median(losses[-4:]) < median(losses[:4])  # L_vlb has a step of huge loss now and then

    model = Model(config.model, denoiser)
    how = config.evaluation.sampling
    few = Sampling(how.sampler, 5, how.grid, None, 1.0, how.options)
    made = model.sample(2, few, labels=[1, 2])
    assert made.shape == (2, *config.model.image_shape)
    for estimator, options in config.evaluation.estimators.items():
        found = model.bits_per_dim(pixels[:2], Scoring(estimator, {**options, **FEW[estimator]}), labels=[1, 2])
        assert torch.isfinite(found.bits_per_dim).all()


# --- CIFAR-10: the published values --------------------------------------------------------------------------------

CIFAR10 = ("ddpm", "iddpm", "vdm", "ddpmpp_subvp", "edm")
PARAMETERS = {  # of the publication, to its digits; EDM's less the 9 x 128 weights of augmentation labels
    "ddpm": (35_746_307, 0),
    "iddpm": (52.5e6, -5),
    "vdm": (30.6e6, -5),
    "ddpmpp_subvp": (61.8e6, -5),
    "edm": (55.7e6, -5),
}
NETWORKS = {"ddpm": "ddpm_cifar10", "iddpm": "iddpm_cifar10", "vdm": "vdm_cifar10", "edm": "ddpmpp_cifar10"}
OTHER = {"edm": {"augmentation_labels"}, "iddpm": {"level_scale"}}  # augmentation is not there; 4,000 steps, not 1,000
# iterations, batch, learning rate, iterations of warm-up, Adam's betas, weight decay, clipped norm, dropout, flip
TRAINING = {
    "ddpm": (800_000, 128, 2e-4, 5_000, (0.9, 0.999), 0.0, 1.0, 0.1, 0.5),
    "iddpm": (500_000, 128, 1e-4, 0, (0.9, 0.999), 0.0, 0.0, 0.3, 0.0),
    "vdm": (10_000_000, 128, 2e-4, 100, (0.9, 0.99), 0.01, 0.0, 0.1, 0.0),
    "ddpmpp_subvp": (1_300_000, 128, 2e-4, 5_000, (0.9, 0.999), 0.0, 1.0, 0.1, 0.5),
    "edm": (390_625, 512, 1e-3, 19_531.25, (0.9, 0.999), 0.0, 0.0, 0.13, 0.5),
}
SYSTEM: dict[str, dict[str, Any]] = {  # dotted key of the model or run -> value
    "ddpm": {
        "schedule": {"name": "linear_beta", "steps": 1000, "beta_start": 1e-4, "beta_end": 0.02},
        "prediction": "eps",
        "scaling": "vp",
        "objective": {"name": "simple", "stratified": False},
        "sampling": ("ancestral", 1000, {"variance": "beta", "clip": 1.0}),
    },
    "iddpm": {
        "schedule": {"name": "cosine", "steps": 4000, "s": 0.008, "max_beta": 0.999, "gamma_limit": 23.0},
        "prediction": "eps",
        "scaling": "vp",
        "objective": {"name": "hybrid", "vlb_weight": 0.001, "stratified": False},
        "sampling": ("ancestral", 4000, {"variance": "learned", "clip": 1.0}),
    },
    "vdm": {
        "schedule": {"name": "learned", "gamma_min": -13.3, "gamma_max": 5.0, "shape": "scalar", "learn_ends": True},
        "prediction": "eps",
        "scaling": "vp",
        "objective": {"name": "vlb", "steps": 0, "stratified": True},
        "sampling": ("ancestral", 1000, {}),
    },
    "ddpmpp_subvp": {
        "schedule": {"name": "subvp", "beta_min": 0.1, "beta_max": 20.0, "t_min": 1e-3},
        "prediction": "eps",
        "scaling": "subvp",
        "objective": {"name": "simple", "stratified": False},
        "sampling": ("sde", 1000, {}),
    },
    "edm": {
        "schedule": {"name": "edm", "sigma_min": 0.002, "sigma_max": 80.0, "p_mean": -1.2, "p_std": 1.2},
        "prediction": "edm",
        "scaling": "ve",
        "objective": {"name": "edm", "p_mean": -1.2, "p_std": 1.2, "stratified": False},
        "sampling": ("heun", 18, {"churn": 0.0}),
    },
}
published = pytest.mark.parametrize("name", CIFAR10)


def cifar10(name: str) -> RunConfig:
    return load_config(str(CONFIGS / f"cifar10_{name}.yaml"))


@published
def test_cifar10_network(name: str) -> None:
    model = cifar10(name).model
    assert (model.size, model.channels, model.classes) == (32, 3, 0)
    network = build_choice(backbones.BACKBONES, model.network, "network")
    with torch.device("meta"):
        built = backbones.build(network, 3, 32, 0, 6 if model.learned_variance else 3)
    value, digits = PARAMETERS[name]
    assert round(sum(p.numel() for p in built.parameters()), digits) == value
    if name in NETWORKS:
        theirs = asdict(PUBLISHED[NETWORKS[name]].config)
        assert {k for k, v in asdict(network).items() if v != theirs[k]} == OTHER.get(name, set())
    else:  # score_sde's DDPM++: EDM's with four resolutions, and no dropout of 0.13
        theirs = asdict(PUBLISHED["ddpmpp_cifar10"].config)
        differing = {k: v for k, v in asdict(network).items() if v != theirs[k]}
        assert differing == {
            "multipliers": (1, 2, 2, 2), "dropout": 0.1, "label_at": "output", "augmentation_labels": 0,
        }  # fmt: skip


@published
def test_cifar10_training(name: str) -> None:
    config = cifar10(name)
    training, batch = config.training, config.stream.batch_size
    found = (
        training.images / batch, batch, training.learning_rate, training.warmup_images / batch, training.betas,
        training.weight_decay, training.clip_norm, config.model.network["dropout"], config.stream.flip,
    )  # fmt: skip
    assert found == TRAINING[name]
    assert training.law == "constant"
    if name == "edm":
        assert (training.ema_half_life_images, training.ema_ramp_up) == (500_000, 0.05)
    else:
        assert 0.5 ** (batch / training.ema_half_life_images) == pytest.approx(0.9999, abs=1e-9)
        ramp = training.ema_ramp_up
        # score_sde: the decay is at most (1 + n) / (10 + n)
        assert ramp is None if name != "ddpmpp_subvp" else ramp == pytest.approx(math.log(2) / 9, rel=1e-2)


@published
def test_cifar10_system(name: str) -> None:
    config, expected = cifar10(name), SYSTEM[name]
    model, how = config.model, config.evaluation.sampling
    assert model.schedule == expected["schedule"]
    assert (model.prediction, model.scaling) == (expected["prediction"], expected["scaling"])
    assert config.objective == expected["objective"]
    assert (how.sampler, how.steps, how.options) == expected["sampling"]
    assert model.learned_variance == (name == "iddpm")
    build_choice(OBJECTIVES, config.objective, "objective")
    assert config.evaluation.samples == 50_000


# what an evaluation has of its source: samples, sampler, steps, grid, its options; estimators with every option
EVALUATION: dict[str, tuple[int, tuple[str, int, str, dict[str, Any]], dict[str, dict[str, Any]]]] = {
    # Ho et al. 2020: fixed-large variance, x_hat clipped in sampling and in the bound over all steps, Gaussian decoder
    "ddpm": (
        50_000,
        ("ancestral", 1000, "linspace", {"variance": "beta", "clip": 1.0}),
        {"vlb_discrete": {"variance": "beta", "decoder": "gaussian", "clip": 1.0}},
    ),
    # Nichol & Dhariwal 2021: clip_denoised is on in image_sample and image_nll
    "iddpm": (
        50_000,
        ("ancestral", 4000, "linspace", {"variance": "learned", "clip": 1.0}),
        {"vlb_discrete": {"variance": "learned", "decoder": "gaussian", "clip": 1.0}},
    ),
    # Kingma et al. 2021: continuous time, softmax decoder, nothing clipped; 128 times a batch, spread evenly
    "vdm": (50_000, ("ancestral", 1000, "uniform_t", {}), {"vlb": {"levels": 128, "decoder": "softmax"}}),
    # Song et al. 2021: RK45 at 1e-5, one fixed Rademacher vector, uniform dequantisation
    "ddpmpp_subvp": (
        50_000,
        ("sde", 1000, "uniform_t", {}),
        {"ode": {"tolerance": 1e-5, "solver": "dopri5", "trace": "fixed", "dequantisation": "uniform"}},
    ),
    # Karras et al. 2022: 18 steps of Heun without churn; they publish no likelihood
    "edm": (50_000, ("heun", 18, "rho", {"churn": 0.0}), {"ode": {"tolerance": 1e-3}}),
}
OURS = {"judge_images", "part", "chunk", "features", "near_copy_share", "resamples", "seed"}  # in no source
DEMANDS = {"min_agreement", "max_frechet_ratio"}


@published
def test_cifar10_evaluation(name: str) -> None:
    found, plain = cifar10(name).evaluation, EvaluationConfig()
    samples, (sampler, steps, levels, options), estimators = EVALUATION[name]
    assert found.samples == samples
    assert found.sampling == Sampling(sampler, steps, levels, None, 1.0, options)
    assert found.estimators == estimators
    assert found.images == 0, "all held-out images"
    known = {"samples", "sampling", "estimators", "images", *OURS, *DEMANDS}
    assert {field.name for field in fields(found)} == known
    assert all(getattr(found, key) == getattr(plain, key) for key in DEMANDS)


@published
def test_cifar10_network_is_told_the_level_as_published(name: str) -> None:
    config = cifar10(name).model
    small = {"name": "mlp", "width": 8, "blocks": 1}
    denoiser = build(replace(config, network=small, size=4, learned_variance=False))

    def told(gamma: float) -> float:
        level = denoiser.level(denoiser.schedule, torch.tensor([gamma], dtype=torch.float64))
        return float(level.detach()) * config.network.get("level_scale", 1.0)

    schedule = denoiser.schedule
    if name == "edm":
        assert told(2 * math.log(0.7)) == pytest.approx(math.log(0.7) / 4)  # c_noise
        return
    first, last = {"iddpm": (0.0, 999.75), "vdm": (0.0, 1000.0)}.get(name, (0.0, 999.0))  # IDDPM: t 1000 / 4000
    assert told(schedule.gamma_min) == pytest.approx(first, abs=1e-6)
    assert told(schedule.gamma_max) == pytest.approx(last)
