"""`jobs.train --dry-run`: what a run will take, measured on this machine before anything starts."""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from jobs import cli
from pipeline.choose import build as build_choice
from pipeline.conditioner import numbered
from pipeline.config import RunConfig
from pipeline.data.reading.stream import Batch
from pipeline.diffusion.objectives.objective import OBJECTIVES
from pipeline.diffusion.randomness import StepKey
from pipeline.model import build, space_of
from pipeline.training.step import Place, TrainingModule, backward

ROUNDS = 3
ENOUGH_S = 10.0  # after this long no further round
ROWS_WITHOUT_GPU = 4  # of a logical shard that was meant for a GPU; the rest by proportion


@dataclass(frozen=True)
class Estimate:
    """Of one worker. state_bytes: weights, gradients, two moments and EMA; saved_bytes: what one logical shard's
    forward keeps for its backward; shard_s: seconds of its forward and backward; device: where measured.
    """

    parameters: int
    state_bytes: int
    saved_bytes: int
    shard_s: float
    device: str


def estimate(config: RunConfig) -> Estimate:
    """Runs a few logical shards of random images through the run's network on this machine's device."""
    gpus = config.cluster.gpus_per_worker > 0
    device = torch.device("cuda" if gpus and torch.cuda.is_available() else "cpu")
    denoiser = build(config.model).to(device)
    autocast = torch.bfloat16 if config.training.precision == "bf16" else None
    module = TrainingModule(
        denoiser,
        build_choice(OBJECTIVES, config.objective, "objective"),
        numbered(config.model.condition, config.model.classes),
        space_of(config.model),
        autocast,
    )
    size = config.stream.shard_batch
    if gpus and device.type == "cpu":
        size = min(size, ROWS_WITHOUT_GPU)
    labels, tags = torch.zeros(size, dtype=torch.int64), torch.zeros(size, config.model.classes, dtype=torch.uint8)
    images = torch.randint(256, (size, *config.model.image_shape), dtype=torch.uint8)
    batch = Batch(0, 0, images, labels, torch.arange(size), tags)
    keys = [StepKey(config.seed, 0, 0, config.stream.logical_shards)]
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def timed() -> float:
        started = time.perf_counter()
        backward(module, [batch], keys, Place(device=device))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        times = [timed()]
    while len(times) <= ROUNDS and sum(times) < ENOUGH_S:
        times.append(timed())
    parameters = sum(p.numel() for p in denoiser.parameters())
    weights = sum(p.numel() * p.element_size() for p in denoiser.parameters())
    weight_places = {p.untyped_storage().data_ptr() for p in denoiser.parameters()}
    activations = sum(count for place, count in saved.items() if place not in weight_places)
    share = config.stream.shard_batch / size
    return Estimate(parameters, 5 * weights, round(activations * share), min(times) * share, device.type)


def show(config: RunConfig) -> None:
    """Print the estimate: memory of a worker, steps and hours."""
    found = estimate(config)
    workers, shards = config.cluster.most_workers, config.stream.logical_shards
    steps = math.ceil(config.training.images / config.stream.batch_size)
    step_s = found.shard_s * math.ceil(shards / workers)
    for what, value in (
        ("parameters", f"{found.parameters:,}"),
        ("steps", f"{steps:,} of {config.stream.batch_size} images ({shards} logical shards on {workers} workers)"),
        ("weights, gradients, moments, EMA", f"{found.state_bytes / 2**20:,.0f} MiB a worker"),
        ("kept for the backward", f"{found.saved_bytes / 2**20:,.0f} MiB a worker"),
        ("a step", f"{step_s:.3f} s by this machine's {found.device}, evaluation and start-up not counted"),
        ("the run", f"{steps * step_s / 3600:,.2f} hours"),
    ):
        cli.console.print(f"  {what:<34}{value}", soft_wrap=True)
