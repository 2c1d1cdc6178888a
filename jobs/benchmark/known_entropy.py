"""A likelihood held against the truth: a variational diffusion model trained on fields whose entropy is known.

`mat` and `mix` of `pipeline.diffusion.oracles.fields` are random 8 x 8 images of 8 bits of which log P of each is
known. A network of less than 150,000 parameters sees fresh ones, through the project's own denoiser, objective `vlb`
and averaged weights. On held-out images its bound is then paired with the truth: the gap, bound minus exact bits/dim of
the same images, is what the model and the estimator together do not know, and can never be below 0 but by chance. The
near-exact denoiser, put to the same estimator, shows what the estimator alone is worth; by the probability-flow ODE
too.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.benchmark.step import machine
from jobs.cli import console
from jobs.progress import bar
from pipeline import __version__
from pipeline.choose import build as build_choice
from pipeline.choose import choose
from pipeline.conditioner import numbered
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Denoiser, Process
from pipeline.diffusion.likelihood.estimators import ESTIMATORS
from pipeline.diffusion.objectives.objective import OBJECTIVES
from pipeline.diffusion.oracles.fields import FIELDS, QuantisedField
from pipeline.diffusion.procedure import Answerer, drive
from pipeline.diffusion.randomness import Noise, StepKey, key_seed, keyed_generator
from pipeline.diffusion.scaling import prior_variance
from pipeline.diffusion.schedule import SCHEDULES
from pipeline.model import ModelConfig, build, space_of
from pipeline.training.ema import EMA, decay
from pipeline.training.optim import AdamW, clip_scale, gradient_norm, learning_rate
from pipeline.training.step import TrainingModule

BATCH = 128
PARAMETERS = 150_000  # at most
MODEL = ModelConfig(
    size=8,
    channels=1,
    network={"name": "vdm", "width": 24, "layers": 2, "fourier_exponents": [7], "dropout": 0.0, "norm_groups": 1},
    schedule={"name": "linear_gamma", "gamma_min": -13.3, "gamma_max": 5.0},
    prediction="eps",
    level="normalised_gamma",
)


@dataclass(frozen=True)
class Training:
    """images: seen in all, fresh ones each; the rates are AdamW's."""

    images: int
    learning_rate: float = 8e-3
    warmup_images: int = 10_000
    clip_norm: float = 1.0
    half_life_images: float = 10_000
    ramp_up: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Bar:
    """What a field's run must reach. images: of training; gap: bits/dim."""

    images: int
    gap: float


BARS = {"mat": Bar(200_000, 0.03), "mix": Bar(300_000, 0.05)}
STANDARD_ERROR = 0.003  # at most, bits/dim, of the paired gap
ODE_GAP = 0.002  # at most, bits/dim, of the near-exact denoiser


Progress = Callable[[int, str], None]  # images done, what else to show


def _silent(done: int, note: str) -> None:
    pass


# --- training ---------------------------------------------------------------------------------------------------------


def train(field: QuantisedField, how: Training, progress: Progress = _silent) -> Denoiser:
    """The averaged weights after `how.images` fresh images, a pure function of `how` on one machine."""
    torch.manual_seed(how.seed)
    denoiser = build(MODEL)
    count = sum(p.numel() for p in denoiser.parameters())
    if count > PARAMETERS:
        raise AssertionError(f"the network has {count} parameters, more than {PARAMETERS}")
    module = TrainingModule(denoiser, OBJECTIVES["vlb"](), numbered("labels", 0), space_of(MODEL))
    optimizer = AdamW(module.named_parameters(), (0.9, 0.99), 0.01)
    average = EMA(denoiser)
    recent = 0.0
    for step in range(math.ceil(how.images / BATCH)):
        seen = (step + 1) * BATCH
        images = field.sample(BATCH, keyed_generator("known-entropy", "train", how.seed, step))
        loss = module(images, Conditioning(), StepKey(how.seed, step, 0, 1)).per_image.mean()
        optimizer.zero_grad()
        loss.backward()
        scale = clip_scale(gradient_norm(optimizer.gradients()), how.clip_norm)
        optimizer.step(learning_rate(how.learning_rate, "cosine", how.warmup_images, how.images, seen), scale)
        average.update(decay(BATCH, seen - BATCH, how.half_life_images, how.ramp_up))
        recent = float(loss.detach()) if step == 0 else 0.98 * recent + 0.02 * float(loss.detach())
        progress(min(seen, how.images), f"{recent:.3f} bits/dim")
    return average.model


# --- scoring ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gap:
    """bits/dim over `images` held-out images: their mean by the estimator, the truth, the paired difference of the two
    with its standard error (over images and draws). evaluations: of the network, an image.
    """

    images: int
    bits_per_dim: float
    exact: float
    gap: float
    standard_error: float
    evaluations: float
    seconds: float

    @property
    def sigmas(self) -> float:
        return self.gap / self.standard_error

    def line(self) -> str:
        return (
            f"{self.bits_per_dim:.4f} bits/dim, truth {self.exact:.4f}, "
            f"gap {self.gap:+.4f} +- {self.standard_error:.4f} "
            f"({self.images:,} images, {self.evaluations:,.0f} evaluations each, {self.seconds:.0f} s)"
        )


@dataclass(frozen=True)
class Scoring:
    """How held-out images are scored: an estimator with its options, on how many images, `part` at a time."""

    estimator: str
    options: dict[str, Any]
    images: int = 5000
    part: int = 250


BOUND = Scoring("vlb", {"levels": 64, "rows": 2000})
FLOW = Scoring("ode", {"probes": 4, "tolerance": 1e-3}, images=2000)


def score(field: QuantisedField, answerer: Answerer, how: Scoring, progress: Progress = _silent, seed: int = 0) -> Gap:
    """The paired gap of whatever answers queries as a denoiser of `MODEL`'s schedule would."""
    law = build_choice(SCHEDULES, MODEL.schedule, "schedule")
    process = Process(MODEL.scaling, law.gamma_min, law.gamma_max, prior_variance(MODEL.scaling, law.gamma_max))
    started = time.monotonic()
    levels = field.sample(how.images, keyed_generator("known-entropy", "held-out", seed))
    exact = field.bits_per_dim(levels)
    found: list[Tensor] = []
    evaluations = 0.0
    for first in range(0, how.images, how.part):
        rows = range(first, min(first + how.part, how.images))
        noise = Noise([key_seed("known-entropy", "score", seed, row) for row in rows])
        x = field.images(levels[rows.start : rows.stop])
        estimator = choose(ESTIMATORS, how.estimator, "estimator")
        result = drive(estimator.start(x, process, noise, Conditioning(), pixels=field.pixels, **how.options), answerer)
        found.append(result.bits_per_dim)
        evaluations += float(result.evaluations.sum())
        gap = torch.cat(found) - exact[: rows.stop]
        progress(rows.stop, f"gap {float(gap.mean()):+.4f}")
    bits = torch.cat(found)
    gap = bits - exact
    return Gap(
        how.images,
        float(bits.mean()),
        float(exact.mean()),
        float(gap.mean()),
        float(gap.std()) / math.sqrt(how.images),
        evaluations / how.images,
        time.monotonic() - started,
    )


# --- the verdict ------------------------------------------------------------------------------------------------------


def missed(name: str, trained: Gap, oracle: Gap, oracle_ode: Gap) -> list[str]:
    """The bars of a full run that were not reached, in words."""
    allowed = BARS[name].gap
    checks = {
        f"the trained model's gap {trained.gap:+.4f} is above {allowed:g}": trained.gap > allowed,
        f"the trained model's bound lies {-trained.sigmas:.1f} standard errors below the truth": trained.sigmas < -3,
        f"the standard error {trained.standard_error:.4f} is above {STANDARD_ERROR:g}": trained.standard_error
        > STANDARD_ERROR,
        f"the near-exact denoiser's gap is {oracle.sigmas:+.1f} standard errors": abs(oracle.sigmas) > 3,
        f"the near-exact denoiser's gap by the ODE, {oracle_ode.gap:+.4f}, is beyond {ODE_GAP:g}": abs(oracle_ode.gap)
        > ODE_GAP,
    }
    return [what for what, bad in checks.items() if bad]


def run(name: str, how: Training) -> dict[str, Any]:
    """Train and score one field, with progress; what was found, as JSON has it."""
    field = choose(FIELDS, name, "field")()
    started = time.monotonic()
    with bar(f"{name}: train", how.images, "images") as shown:
        denoiser = train(field, how, lambda done, note: shown.update(done, note))
    seconds = time.monotonic() - started
    parameters = sum(p.numel() for p in denoiser.parameters())
    console.print(f"{name}: {parameters:,} parameters, {how.images:,} images in {seconds:.0f} s", soft_wrap=True)
    found: dict[str, Gap] = {}
    rows: list[tuple[str, str, Answerer, Scoring]] = [
        ("bound", "the trained model by the bound", denoiser, BOUND),
        ("oracle_bound", "the near-exact denoiser by the bound", field, BOUND),
        ("oracle_ode", "the near-exact denoiser by the ODE", field, FLOW),
    ]
    for key, what, answerer, scoring in rows:
        with bar(f"{name}: {what}", scoring.images, "images") as shown:
            found[key] = score(field, answerer, scoring, lambda done, note: shown.update(done, note))
        console.print(f"{name}: {what}: {found[key].line()}", soft_wrap=True)
    return {
        "training": asdict(how),
        "training_seconds": seconds,
        "parameters": parameters,
        "network": MODEL.network,
        **{key: asdict(gap) for key, gap in found.items()},
        "missed": missed(name, found["bound"], found["oracle_bound"], found["oracle_ode"]),
    }


def main(argv: list[str]) -> int:
    """0 all bars reached (or a shorter training asked for), 1 a bar missed."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.benchmark known_entropy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("fields", nargs="*", help=f"of {', '.join(FIELDS)}; none: all of them")
    parser.add_argument("--images", type=int, help="training images; the bars are stated for the default")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of all draws of the training")
    parser.add_argument("--output", type=Path, default=Path("tests/benchmarks/results/known_entropy.json"))
    args = parser.parse_args(argv)
    for name in args.fields:
        choose(FIELDS, name, "field")
    if args.images is not None and args.images < BATCH:
        raise ValueError(f"--images must be at least one batch, {BATCH}, got {args.images}")
    record: dict[str, Any] = {
        "benchmark": "known_entropy",
        "version": __version__,
        "machine": machine("cpu"),
        "threads": torch.get_num_threads(),
        "fields": {},
    }
    for name in args.fields or list(FIELDS):
        record["fields"][name] = run(name, Training(args.images or BARS[name].images, seed=args.seed))
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    bad = [f"{name}: {what}" for name, found in record["fields"].items() for what in found["missed"]]
    for what in bad:
        console.print(f"missed: {what}", soft_wrap=True)
    console.print(f"written to {args.output}", soft_wrap=True)
    return 1 if bad and args.images is None else 0
