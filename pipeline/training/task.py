"""What the training loop is given: the task, its data, and what it asks of outside."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from pipeline.conditioner import Conditioner
from pipeline.data.reading.stream import Batch
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.objectives.loss import Objective
from pipeline.diffusion.space import Space
from pipeline.training import hardware
from pipeline.training.config import TrainingConfig
from pipeline.training.progress import Progress
from pipeline.training.restore import RunError
from pipeline.training.step import Place


class Batches(Protocol):
    """An endless iterator of this rank's logical shards, in the order rank, rank + W, ..., step after step.

    It is read by a thread, one step ahead.
    """

    def __next__(self) -> Batch: ...
    def __iter__(self) -> Iterator[Batch]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class HeldOut:
    """Scores of the n held-out images, zeros where another rank scores the image: their sum over ranks is exact.

    bits_per_dim: (n,). gamma, error: (n, k), the levels each was asked at and the mean square of eps_hat - eps there.
    All float64 on the CPU.
    """

    bits_per_dim: Tensor
    gamma: Tensor
    error: Tensor


@dataclass(frozen=True)
class Hooks:
    """What the loop asks of outside.

    evaluate: (denoiser, place) -> this rank's part of the scores; on every rank.
    sample: denoiser -> uint8 (n, C, H, W); rank 0 alone is asked.
    stop, save: whether to save a checkpoint now, and to stop or to go on; asked once a step on every rank, one yes is
    enough.
    commit: raises `lease.Lost` where the checkpoints' place is another job's by now; rank 0 asks before it commits one.
    """

    evaluate: Callable[[Denoiser, Place], HeldOut] | None = None
    sample: Callable[[Denoiser], Tensor] | None = None
    stop: Callable[[], bool] = lambda: False
    save: Callable[[], bool] = lambda: False
    commit: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Task:
    """What to train, where, from which data.

    open_batches: step -> the data from that step on. identity: JSON facts that a checkpoint must share to be continued
    (model, objective, data digest, batch); store: URL of the checkpoints. about: JSON facts that a model's card is to
    tell of this run (name, classes, data), kept in every checkpoint.
    """

    config: TrainingConfig
    denoiser: Denoiser
    objective: Objective
    conditioner: Conditioner
    space: Space
    open_batches: Callable[[int], Batches]
    batch_size: int
    logical_shards: int
    seed: int
    store: str
    identity: Mapping[str, Any] = field(default_factory=dict)
    place: Place = field(default_factory=Place)
    hooks: Hooks = field(default_factory=Hooks)
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def total_steps(self) -> int:
        return math.ceil(self.config.images / self.batch_size)


def check(task: Task) -> None:
    """Raises RunError for what can be known before any work is done."""
    if task.place.world > task.logical_shards:
        raise RunError(
            f"{task.place.world} workers for {task.logical_shards} logical shards: some would have nothing to do; set "
            f"cluster.workers to at most {task.logical_shards}, or stream.logical_shards to at least {task.place.world}"
        )
    if task.config.precision == "bf16" and not hardware.has_bf16(task.place.device):
        raise RunError(f"training.precision: this {task.place.device.type} has no bf16 arithmetic; use fp32")


def check_identity(before: Mapping[str, Any], now: Mapping[str, Any], store: str) -> None:
    """Raises RunError where a checkpoint is of another run; names what differs."""
    differing = [
        f"{key} was {before[key]!r}, is {value!r}" for key, value in now.items() if before.get(key, value) != value
    ]
    if differing:
        raise RunError(
            f"the checkpoints at {store} are of another run: {'; '.join(differing[:4])}; give this run another output, "
            f"or remove them"
        )


def check_finished(
    state: tuple[int, Mapping[str, Any]], config: TrainingConfig, batch_size: int, about: Mapping[str, Any], store: str
) -> None:
    """state: a checkpoint's step and facts.

    Raises:
        RunError: the training is at its end, and settings are changed that would only count in further steps; names
            them.
    """
    progress = Progress.of(*state)
    if progress.ended in (None, "stopped") or progress.end(config, batch_size) is None:
        return
    history = state[1].get("history")
    before = {**(history[-1] if history else {}), "name": state[1].get("about", {}).get("name")}
    now = {**config.settings, "name": about.get("name")}
    changed = [
        f"{'' if key == 'name' else 'training.'}{key} was {before[key]!r}, is {value!r}"
        for key, value in now.items()
        if key != "images" and before.get(key) is not None and before[key] != value
    ]
    if changed:
        raise RunError(
            f"the run at {store} has ended ({progress.ended}, {progress.images:,} images) and nothing would be trained "
            f"with what was changed: {'; '.join(changed)}; change it back, extend the run (training.images), or give "
            f"the new one another output"
        )
