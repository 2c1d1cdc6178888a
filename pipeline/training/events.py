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
    matrix product in that precision, on this worker's device. compile, checkpoint_activations, reduction,
    deterministic: as configured.
    """

    precision: str
    forward_backward_s: dict[str, float]
    flops_per_image: float
    peak_flops: float
    compile: str
    checkpoint_activations: bool
    reduction: str = "ddp"
    deterministic: bool = False


@dataclass(frozen=True)
class Moved(Event):
    """The run has come so far; told to a terminal alone, as often as it likes, and no part of a run's record."""


@dataclass(frozen=True)
class Step(Event):
    """Means over the steps since the last one.

    Keys: loss, part/NAME for the objective's parts, loss_quarter_1..4 (quarters of the gamma range, low noise first),
    grad_norm, learning_rate, images_per_s, data_wait (share of the time spent waiting for data), skipped_steps and
    rollbacks (of the whole run), tflops (of a worker; operations of forward and backward, 1e12 a second), mfu (its
    share of the peak), peak_memory_gib (the most that this worker has held); lost_images, where there are any: damaged
    or taken down, others stood in for them.
    """

    metrics: dict[str, float]


@dataclass(frozen=True)
class Evaluated(Event):
    """Held-out metrics: held_out/bits_per_dim, held_out/standard_error, held_out/images of the EMA weights, and
    held_out/raw_bits_per_dim, held_out/raw_standard_error of the weights themselves where they are evaluated.
    """

    metrics: dict[str, float]


@dataclass(frozen=True)
class Curve(Event):
    """Losses against the noise level, in equal bins of gamma, low noise first; None in a bin without a draw.

    edges: gamma, one more than there are bins. held_out, raw: mean square of eps_hat - eps on held-out images, of the
    EMA weights and of the weights themselves (empty where these are not evaluated). training: mean of the objective's
    loss over the images trained on since the last curve.
    """

    edges: tuple[float, ...]
    held_out: tuple[float | None, ...]
    raw: tuple[float | None, ...]
    training: tuple[float | None, ...]


@dataclass(frozen=True)
class Samples(Event):
    """Images, fixed seeds. pixels: uint8 (n, C, H, W). weights: 'ema', or 'raw' for the weights themselves."""

    pixels: Tensor
    weights: str = "ema"


@dataclass(frozen=True)
class Skipped(Event):
    """A step that changed no weight. cause: 'not_finite' (loss or gradient), 'spike', 'asked' (skip_steps)."""

    reason: str
    cause: str = "not_finite"


@dataclass(frozen=True)
class RolledBack(Event):
    """The run went back to a checkpoint; step and images are where it stands now, and those of later events follow.

    from_step: where it stood. cause: 'spike', or 'state' (weights, EMA or optimizer not finite). skip_steps: the steps
    that it will leave out when it comes to them again.
    """

    from_step: int
    cause: str
    reason: str
    checkpoint: str
    skip_steps: tuple[int, ...] = ()


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
    """A save failed; the training goes on, earlier checkpoints are untouched. committed: the save itself went well, it
    was older checkpoints that could not be removed.
    """

    checkpoint: str
    reason: str
    committed: bool = False


@dataclass(frozen=True)
class System(Event):
    """What a node's processors, memory and network do; keys system/NODE/..."""

    metrics: dict[str, float]


@dataclass(frozen=True)
class Hung(Event):
    """The workers stood still and were killed, to start anew. log: URL of every worker's stacks."""

    reason: str
    log: str


@dataclass(frozen=True)
class Finished(Event):
    """The end of this process's part, with everything up to it in `checkpoint`.

    reason: 'budget' (all images were seen), 'target' (training.target_bits_per_dim was reached), 'max_steps' or
    'max_hours' (training.max_*), 'stopped' (asked to stop).
    """

    reason: str
    checkpoint: str

    @property
    def complete(self) -> bool:
        """Whether the run file's own limits ended it; one that was stopped goes on where the job is started again."""
        return self.reason != "stopped"


KINDS: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (
        Started,
        Prepared,
        Moved,
        Step,
        Evaluated,
        Curve,
        Samples,
        Skipped,
        RolledBack,
        CheckpointBegun,
        CheckpointSaved,
        CheckpointFailed,
        System,
        Hung,
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
    found: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return kind(**found)
