"""What a training run says while it goes: frozen values, and their one-line JSON form for a spool or a channel."""

import base64
import json
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Event:
    """Where the run stands. step: global batches done; images: images seen."""

    step: int
    images: int


@dataclass(frozen=True)
class Started(Event):
    """A run's first start, or its going on from `checkpoint`; `rejected` says why newer checkpoints were not used."""

    total_steps: int
    total_images: int
    batch_size: int
    world_size: int
    parameters: int
    precision: str
    checkpoint: str | None = None
    rejected: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared(Event):
    """What was found out before the first step of this process.

    precision: that of the steps. forward_backward_s: seconds of one logical shard in each precision that was tried.
    flops_per_image: operations of its forward and backward pass. peak_flops: operations a second of the best square
    matrix product in that precision, on this worker's device. compile, checkpoint_activations: as configured.
    """

    precision: str
    forward_backward_s: dict[str, float]
    flops_per_image: float
    peak_flops: float
    compile: str
    checkpoint_activations: bool


@dataclass(frozen=True)
class Step(Event):
    """Means over the steps since the last one.

    Keys: loss, part/NAME for the objective's parts, loss_quarter_1..4 (quarters of the gamma range, low noise first),
    grad_norm, learning_rate, images_per_s, data_wait (share of the time spent waiting for data), skipped_steps, tflops
    (of a worker; operations of forward and backward, 1e12 a second), mfu (its share of the peak), peak_memory_gib (the
    most that this worker has held).
    """

    metrics: dict[str, float]


@dataclass(frozen=True)
class Evaluated(Event):
    """Held-out metrics of the EMA weights: held_out/bits_per_dim, held_out/standard_error."""

    metrics: dict[str, float]


@dataclass(frozen=True)
class Samples(Event):
    """Images from the EMA weights, fixed seeds. pixels: uint8 (n, C, H, W)."""

    pixels: Tensor


@dataclass(frozen=True)
class Skipped(Event):
    """A step whose loss or gradient was not finite: no weight changed."""

    reason: str


@dataclass(frozen=True)
class CheckpointBegun(Event):
    """The state of this step was copied and is being written; on every rank alike, though rank 0 alone writes."""


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """Committed; `step` is the checkpoint's, wait_s what the training thread spent on it."""

    checkpoint: str
    wait_s: float
    write_s: float


@dataclass(frozen=True)
class CheckpointFailed(Event):
    """A save failed; the training goes on, earlier checkpoints are untouched."""

    checkpoint: str
    reason: str


@dataclass(frozen=True)
class Finished(Event):
    """reason: 'budget' when all images were seen, 'stopped' when asked to stop (it goes on from `checkpoint`)."""

    reason: str
    checkpoint: str


KINDS: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (
        Started,
        Prepared,
        Step,
        Evaluated,
        Samples,
        Skipped,
        CheckpointBegun,
        CheckpointSaved,
        CheckpointFailed,
        Finished,
    )
}


def encode(event: Event) -> str:
    """One line of JSON; pixels as base64."""
    values: dict[str, Any] = {"event": type(event).__name__}
    for item in fields(event):
        value = getattr(event, item.name)
        if isinstance(value, Tensor):
            data = base64.b64encode(value.contiguous().cpu().numpy().tobytes()).decode()
            value = {"shape": list(value.shape), "uint8": data}
        values[item.name] = value
    return json.dumps(values)


def decode(line: str) -> Event:
    """Undoes `encode`.

    Raises:
        ValueError: not such a line.
    """
    values = json.loads(line)
    kind = KINDS.get(values.pop("event", None))
    if kind is None:
        raise ValueError(f"not an event: {line[:100]!r}")
    if "pixels" in values:
        data = bytearray(base64.b64decode(values["pixels"]["uint8"]))
        values["pixels"] = torch.frombuffer(data, dtype=torch.uint8).reshape(values["pixels"]["shape"])
    if "rejected" in values:
        values["rejected"] = tuple(values["rejected"])
    return kind(**values)
