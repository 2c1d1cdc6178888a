"""Looking at a training from outside: held-out scores, losses by noise level, sample grids."""

import math
from collections.abc import Iterator

import torch
import torch.distributed

from pipeline.diffusion.objectives.loss import binned
from pipeline.training import events as say
from pipeline.training.learner import Learner
from pipeline.training.metrics import BINS, StepMetrics, bin_means
from pipeline.training.step import Place
from pipeline.training.task import HeldOut


def evaluated(learner: Learner, window: StepMetrics) -> Iterator[say.Evaluated | say.Curve]:
    """Held-out scores of the EMA weights and, where configured, of the weights themselves; every rank must come here.

    The bits/dim found becomes a fact of the training at this step.
    """
    evaluate, progress = learner.task.hooks.evaluate, learner.progress
    if evaluate is None:
        return
    ema = _joined(evaluate(learner.ema.model, learner.place), learner.place)
    raw = None
    if learner.config.evaluate_raw:
        with learner.ema.showing_source() as model:
            raw = _joined(evaluate(model, learner.place), learner.place)
    mean, error = _mean_and_error(ema)
    metrics = {
        "held_out/bits_per_dim": mean,
        "held_out/standard_error": error,
        "held_out/images": float(len(ema.bits_per_dim)),
    }
    if raw is not None:
        metrics["held_out/raw_bits_per_dim"], metrics["held_out/raw_standard_error"] = _mean_and_error(raw)
    progress.bits_per_dim = mean
    yield say.Evaluated(progress.step, progress.images, metrics)
    low, high = window.gamma_range
    yield say.Curve(
        progress.step,
        progress.images,
        edges=tuple(low + (high - low) * index / BINS for index in range(BINS + 1)),
        held_out=_by_level(ema, window),
        raw=() if raw is None else _by_level(raw, window),
        training=window.curve(),
    )


def sampled(learner: Learner) -> Iterator[say.Samples]:
    """Grids of samples; rank 0 alone makes them."""
    sample, progress = learner.task.hooks.sample, learner.progress
    if sample is None or learner.place.rank != 0:
        return
    yield say.Samples(progress.step, progress.images, sample(learner.ema.model))
    if learner.config.sample_raw:
        with learner.ema.showing_source() as model:
            pixels = sample(model)
        yield say.Samples(progress.step, progress.images, pixels, "raw")


def _joined(mine: HeldOut, place: Place) -> HeldOut:
    """The scores of all images, on every rank."""
    if place.world == 1:
        return mine
    shapes = [mine.bits_per_dim.shape, mine.gamma.shape, mine.error.shape]
    joined = torch.cat([mine.bits_per_dim, mine.gamma.flatten(), mine.error.flatten()]).to(place.device)
    torch.distributed.all_reduce(joined)
    parts = joined.cpu().split([shape.numel() for shape in shapes])
    return HeldOut(*(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))


def _mean_and_error(scores: HeldOut) -> tuple[float, float]:
    values = scores.bits_per_dim
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return values.mean().item(), error


def _by_level(scores: HeldOut, window: StepMetrics) -> tuple[float | None, ...]:
    return bin_means(binned(scores.error, scores.gamma, *window.gamma_range, BINS))
