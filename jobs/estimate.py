"""`jobs.train --dry-run`: what a run will take, measured on this machine before anything starts."""

import math
import time
from dataclasses import dataclass
from statistics import median

import torch

from jobs import cli
from pipeline import assembly
from pipeline.choose import build as build_choice
from pipeline.conditioner import numbered
from pipeline.config import RunConfig
from pipeline.data.reading.stream import Batch
from pipeline.diffusion.objectives.objective import OBJECTIVES
from pipeline.diffusion.randomness import StepKey
from pipeline.model import build, space_of
from pipeline.training.config import AUTOCAST
from pipeline.training.hardware import finish, has_bf16
from pipeline.training.prepare import checkpoint_blocks, compile_blocks, laid_out
from pipeline.training.step import Place, TrainingModule, backward

ROUNDS = 3
ENOUGH_S = 10.0  # after this long no further round
ROWS_WITHOUT_GPU = 4  # of a logical shard that was meant for a GPU; the rest by proportion


@dataclass(frozen=True)
class Estimate:
    """Of one worker. state_bytes: weights, gradients, two moments and EMA; saved_bytes: what one logical shard's
    forward keeps for its backward, with checkpointed activations where the run file has them, half of it where the
    precision halves it; shard_s: seconds of its forward and backward, each time; device: where measured.
    """

    parameters: int
    state_bytes: int
    saved_bytes: int
    shard_s: tuple[float, ...]
    precision: str
    device: str


def estimate(config: RunConfig) -> Estimate:
    """Runs a few logical shards of random images through the run's network on this machine's device, as the training
    would: in the faster precision, with compiled blocks and checkpointed activations where asked.
    """
    gpus = config.cluster.gpus_per_worker > 0
    device = torch.device("cuda" if gpus and torch.cuda.is_available() else "cpu")
    training, found = config.training, assembly.needs(config)
    denoiser = laid_out(build(config.model), device, training.compile != "none").train()
    if training.checkpoint_activations:
        checkpoint_blocks(denoiser.network)
    objective = build_choice(OBJECTIVES, config.objective, "objective")
    conditioner = numbered(config.model.condition, config.model.classes)
    module = TrainingModule(denoiser, objective, conditioner, space_of(config.model), None, training.label_dropout)
    size = config.stream.shard_batch
    if gpus and device.type == "cpu":
        size = min(size, ROWS_WITHOUT_GPU)
    share = config.stream.shard_batch / size
    tried = {name: _seconds(module, config, size, name, device) for name in _precisions(training.precision, device)}
    precision = min(tried, key=lambda name: median(tried[name]))
    times = tried[precision]
    if training.compile != "none":  # after the choice, as the training does
        compile_blocks(denoiser.network, training.compile)
        times = _seconds(module, config, size, precision, device)
    saved = found.saved // 2 if precision == "bf16" else found.saved
    return Estimate(found.parameters, found.state, saved, tuple(s * share for s in times), precision, device.type)


def _precisions(asked: str, device: torch.device) -> list[str]:
    if asked != "auto":
        return [asked]
    return [name for name, kind in AUTOCAST.items() if kind is None or has_bf16(device)]


def _seconds(module: TrainingModule, config: RunConfig, size: int, precision: str, device: torch.device) -> list[float]:
    """Of a logical shard's forward and backward, a few times after one for warming up."""
    module.autocast = AUTOCAST[precision]
    labels, tags = torch.zeros(size, dtype=torch.int64), torch.zeros(size, config.model.classes, dtype=torch.uint8)
    images = torch.randint(256, (size, *config.model.image_shape), dtype=torch.uint8)
    batch = Batch(0, 0, images, labels, torch.arange(size), tags)
    keys = [StepKey(config.seed, 0, 0, config.stream.logical_shards)]
    times: list[float] = []
    while len(times) <= 1 or (len(times) <= ROUNDS and sum(times[1:]) < ENOUGH_S):
        started = time.perf_counter()
        backward(module, [batch], keys, Place(device=device))
        finish(device)
        times.append(time.perf_counter() - started)
        module.zero_grad(set_to_none=True)
    return times[1:]


def show(config: RunConfig) -> None:
    """Print the estimate: memory of a worker, steps and hours."""
    found = estimate(config)
    workers, shards = config.cluster.most_workers, config.stream.logical_shards
    steps = math.ceil(config.training.images / config.stream.batch_size)
    each = math.ceil(shards / workers)
    step_s = [s * each for s in (median(found.shard_s), min(found.shard_s), max(found.shard_s))]
    hours = [steps * s / 3600 for s in step_s]
    for what, value in (
        ("parameters", f"{found.parameters:,}"),
        ("steps", f"{steps:,} of {config.stream.batch_size} images ({shards} logical shards on {workers} workers)"),
        ("weights, gradients, moments, EMA", f"{found.state_bytes / 2**20:,.0f} MiB a worker"),
        ("kept for the backward", f"{found.saved_bytes / 2**20:,.0f} MiB a worker"),
        (
            "a step",
            f"{step_s[0]:.3f} s ({step_s[1]:.3f} to {step_s[2]:.3f} in {len(found.shard_s)} tries) in "
            f"{found.precision} by this machine's {found.device}, evaluation and start-up not counted",
        ),
        ("the run", f"{hours[0]:,.2f} hours ({hours[1]:,.2f} to {hours[2]:,.2f})"),
        ("export to diffusers", _exportable(config)),
    ):
        cli.console.print(f"  {what:<34}{value}", soft_wrap=True)


def _exportable(config: RunConfig) -> str:
    try:
        assembly.exportable(config)
    except ValueError as error:
        return f"not possible: {error}"
    return "possible"
