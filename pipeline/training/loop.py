"""The training loop: a generator of events, the same with and without a cluster.

The state of a training is one integer (the step), the weights, their EMA, the optimizer's and, where the objective has
one, its memory. Everything else is computed from the step: the data, every random draw, the learning rate, when to
evaluate and to save.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Annotated, Any, Protocol

import torch
import torch.distributed
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.choose import choose
from pipeline.data.stream import Batch
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.loss import Objective
from pipeline.diffusion.randomness import StepKey
from pipeline.training import events as say
from pipeline.training import hardware
from pipeline.training.checkpoint import Saver, State, folder, newest
from pipeline.training.ema import EMA, decay
from pipeline.training.optim import LAWS, AdamW, clip_scale, gradient_norm, learning_rate
from pipeline.training.prepare import COMPILE, checkpoint_blocks, compile_blocks, laid_out
from pipeline.training.restore import RunError, restore
from pipeline.training.step import Place, Table, TrainingModule, backward, tabulate

AUTOCAST: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}
PRECISIONS = (*AUTOCAST, "auto")


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how to train. Everything is counted in images, so that another batch size keeps the same laws."""

    images: Annotated[int, "images to see in all"] = 200_000
    learning_rate: Annotated[float, "peak learning rate of AdamW"] = 2e-4
    law: Annotated[str, "learning rate after the warm-up: " + ", ".join(LAWS)] = "constant"
    warmup_images: Annotated[int, "images of linear warm-up from 0"] = 10_000
    betas: Annotated[tuple[float, float], "AdamW's decay rates of mean and square"] = (0.9, 0.999)
    weight_decay: Annotated[float, "AdamW's decay of matrices and kernels"] = 0.0
    clip_norm: Annotated[float, "largest gradient norm; 0 never clips"] = 1.0
    ema_half_life_images: Annotated[float, "half-life of the weights' moving average, images"] = 500_000
    ema_ramp_up: Annotated[float | None, "the half-life is at most this share of the images seen; null: no ramp"] = 0.05
    label_dropout: Annotated[float, "share of images trained without their label, for guidance"] = 0.0
    precision: Annotated[str, "fp32, bf16 (autocast, where the hardware has it), or auto: the faster here"] = "fp32"
    compile: Annotated[str, "of the network's blocks, at the first step: " + ", ".join(COMPILE)] = "none"
    checkpoint_activations: Annotated[bool, "keep less memory and compute each block twice"] = False
    log_every_images: Annotated[int, "images between two points of the loss curve"] = 2_048
    evaluate_every_images: Annotated[int, "images between two held-out bits/dim; 0: at the end only"] = 50_000
    evaluate_images: Annotated[int, "held-out images of such a measurement; 0: none is made"] = 1_000
    evaluate_levels: Annotated[int, "network evaluations an image of such a measurement"] = 16
    sample_every_images: Annotated[int, "images between two sample grids; 0: at the end only"] = 50_000
    sample_images: Annotated[int, "images of a sample grid; 0: none is made"] = 64
    checkpoint_every_images: Annotated[int, "images between two checkpoints; 0: at the end only"] = 50_000
    keep: Annotated[int, "checkpoints kept, the newest ones"] = 3
    skip_limit: Annotated[int, "steps in a row with a loss or gradient that is not finite before the run stops"] = 10

    def __post_init__(self) -> None:
        for name in ("images", "log_every_images", "keep", "skip_limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} must be at least 1, got {getattr(self, name)}")
        for name in (
            *("learning_rate", "warmup_images", "weight_decay", "clip_norm", "ema_half_life_images"),
            *(
                "evaluate_every_images",
                "evaluate_images",
                "sample_every_images",
                "sample_images",
                "checkpoint_every_images",
            ),
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"training.{name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"training.label_dropout must be a share, 0 to below 1, got {self.label_dropout:g}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"training.betas must lie in [0, 1), got {list(self.betas)}")
        if self.ema_ramp_up is not None and not self.ema_ramp_up > 0:
            raise ValueError(f"training.ema_ramp_up must be positive or null, got {self.ema_ramp_up}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"training.precision must be one of {', '.join(PRECISIONS)}, got '{self.precision}'")
        choose(LAWS, self.law, "training.law")
        choose(dict.fromkeys(COMPILE), self.compile, "training.compile")


class Diverged(RunError):
    """Too many steps in a row without a finite loss and gradient."""


class Batches(Protocol):
    """An endless iterator of this rank's logical shards, in the order rank, rank + W, ..., step after step."""

    def __next__(self) -> Batch: ...
    def __iter__(self) -> Iterator[Batch]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Hooks:
    """What the loop asks of outside.

    evaluate: (EMA denoiser, place) -> bits/dim, float64 (m,), of this rank's share of held-out images; on every rank.
    sample: EMA denoiser -> uint8 (n, C, H, W); rank 0 alone is asked.
    stop: whether to save and stop now; asked once a step on every rank, one yes is enough.
    """

    evaluate: Callable[[Denoiser, Place], Tensor] | None = None
    sample: Callable[[Denoiser], Tensor] | None = None
    stop: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Task:
    """What to train, where, from which data.

    open_batches: step -> the data from that step on. identity: JSON facts that a checkpoint must share to be continued
    (model, objective, data digest, batch); store: URL of the checkpoints.
    """

    config: TrainingConfig
    denoiser: Denoiser
    objective: Objective
    classes: int
    open_batches: Callable[[int], Batches]
    batch_size: int
    logical_shards: int
    seed: int
    store: str
    identity: Mapping[str, Any] = field(default_factory=dict)
    place: Place = field(default_factory=Place)
    hooks: Hooks = field(default_factory=Hooks)

    @property
    def total_steps(self) -> int:
        return math.ceil(self.config.images / self.batch_size)


def train(task: Task) -> Iterator[say.Event]:
    """Trains from the newest verified checkpoint (or the start) to the end of the budget, telling what happens.

    Every rank runs it, and runs it to its end. With place.world > 1 torch.distributed must be initialised.

    Raises:
        RunError: workers without a logical shard, precision that the hardware lacks, a checkpoint of another run.
        Diverged: `skip_limit` steps in a row were not finite.
    """
    check(task)
    run = _Run(task)
    try:
        yield from run.events()
    finally:
        run.saver.close()


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


def standing(config: TrainingConfig, batch_size: int, store: str, identity: Mapping[str, Any]) -> say.Finished | None:
    """The end of a training that is there already, verified; None where there is something left to do.

    Raises:
        RunError: what is there is of another run.
    """
    state, _ = newest(store)
    if state is None:
        return None
    check_identity(state.facts["identity"], identity, store)
    if not state.facts["finished"] or state.step < math.ceil(config.images / batch_size):
        return None
    return say.Finished(state.step, state.step * batch_size, "budget", folder(store, state.step))


class _Run:
    """A training under way: owns the network, its EMA, the optimizer and the saver."""

    def __init__(self, task: Task) -> None:
        config, place = task.config, task.place
        self.task, self.config, self.place = task, config, place
        if place.device.type == "cpu":
            hardware.keep_memory()
        self.denoiser = laid_out(task.denoiser, place.device, config.compile != "none").train()
        self.module = TrainingModule(self.denoiser, task.objective, task.classes, None, config.label_dropout)
        self.ema = EMA(self.denoiser)
        self.optimizer = AdamW(self.denoiser.named_parameters(), config.betas, config.weight_decay)
        self.saver = Saver(task.store, config.keep)
        self.gamma_range = (self.denoiser.schedule.gamma_min, self.denoiser.schedule.gamma_max)
        self.step = 0
        self.skipped_in_a_row = 0
        self.skipped = 0
        self.finished = False
        self.window = _Window()
        self.flops_per_image = self.peak_flops = 0.0

    # --- the state ----------------------------------------------------------------------------------------------------

    def state(self) -> State:
        tensors = {
            "model": self.denoiser.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if hasattr(self.task.objective, "state_dict"):
            tensors["objective"] = self.task.objective.state_dict()  # pyright: ignore[reportAttributeAccessIssue]
        facts = {
            "identity": dict(self.task.identity),
            "images": self.images,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "finished": self.finished,
        }
        return State(self.step, tensors, facts)

    def load(self, state: State) -> None:
        """Takes over a checkpoint's state.

        Raises:
            RunError: it is of another run or another architecture; names what differs.
        """
        facts = state.facts
        check_identity(facts["identity"], self.task.identity, self.task.store)
        try:
            self.denoiser.load_state_dict(dict(state.tensors["model"]))
            self.ema.load_state_dict(dict(state.tensors["ema"]))
            self.optimizer.load_state_dict(dict(state.tensors["optimizer"]))
        except (RuntimeError, KeyError, ValueError) as error:
            where = f"the checkpoint of step {state.step} at {self.task.store}"
            raise RunError(f"{where} does not fit the network: {error}") from None
        if hasattr(self.task.objective, "load_state_dict"):
            self.task.objective.load_state_dict(state.tensors["objective"])  # pyright: ignore[reportAttributeAccessIssue]
        self.step, self.finished = state.step, facts["finished"]
        self.skipped, self.skipped_in_a_row = facts["skipped"], facts["skipped_in_a_row"]

    @property
    def images(self) -> int:
        return self.step * self.task.batch_size

    # --- the course of it ---------------------------------------------------------------------------------------------

    def events(self) -> Iterator[say.Event]:
        state, rejected = restore(self.task.store, self.place)
        if state is not None:
            self.load(state)
        yield self._started(rejected)
        if self.finished and self.step >= self.task.total_steps:
            yield say.Finished(self.step, self.images, "budget", self._url())
            return
        if self.step and self.step < self.task.total_steps:
            yield from self._look()  # what the process before may not have lived to tell
        batches = self.task.open_batches(self.step)
        try:
            yield from self._steps(batches)
        finally:
            batches.close()

    def _steps(self, batches: Batches) -> Iterator[say.Event]:
        shards = self.place.shards(self.task.logical_shards)

        def read() -> list[Batch]:
            return list(islice(batches, len(shards)))

        with ThreadPoolExecutor(1) as pool:  # readers start while the device is measured: each takes a while
            reading = pool.submit(read)
            self.peaks = {
                name: hardware.peak_rate(self.place.device, kind or torch.float32) for name, kind in self._precisions()
            }
            mine = reading.result()
        yield self._prepare(mine, shards)
        network = self._network()
        self._settle(network, mine, shards)
        waited, start = 0.0, time.perf_counter()
        while self.step < self.task.total_steps:
            table, norm, rate = self._step(network, mine, shards)
            self.window.add(table, norm, rate, waited, time.perf_counter() - start, self.task.batch_size)
            yield from self._after_step(table, norm)
            if table.stop:
                break
            start = time.perf_counter()
            if self.step < self.task.total_steps:
                mine = read()
            waited = time.perf_counter() - start
        yield from self._finish()

    def _step(
        self, network: torch.nn.Module, mine: Sequence[Batch], shards: Sequence[int]
    ) -> tuple[Table, float, float]:
        task, config = self.task, self.config
        keys = [StepKey(task.seed, self.step, shard, task.logical_shards) for shard in shards]
        losses = backward(network, mine, keys, self.place)
        table = tabulate(losses, task.logical_shards, self.place, task.hooks.stop(), self.gamma_range)
        norm = gradient_norm(self.optimizer.gradients())
        finite = float(norm)  # the same bits on every rank: so is the decision
        seen = self.images
        self.step += 1
        rate = learning_rate(config.learning_rate, config.law, config.warmup_images, config.images, self.images)
        if math.isfinite(finite) and table.bad_shard() is None:
            self.optimizer.step(rate, clip_scale(norm, config.clip_norm))
            self.ema.update(decay(task.batch_size, seen, config.ema_half_life_images, config.ema_ramp_up))
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        if table.observed is not None and hasattr(task.objective, "update"):
            task.objective.update(table.observed)  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.zero_grad()
        return table, finite, rate

    def _after_step(self, table: Table, norm: float) -> Iterator[say.Event]:
        if self.skipped_in_a_row:
            reason = self._blame(table, norm)
            yield say.Skipped(self.step, self.images, reason)
            if self.skipped_in_a_row >= self.config.skip_limit:
                raise Diverged(f"{self.skipped_in_a_row} steps in a row without a finite loss and gradient; {reason}")
        config, end = self.config, self.step >= self.task.total_steps
        if end or self._due(config.log_every_images):
            yield say.Step(self.step, self.images, self._metrics())
            self.window = _Window()
        if not end and not table.stop:
            if self._due(config.checkpoint_every_images):
                yield self._save()
            yield from self._look()
        yield from self._saved()

    def _look(self) -> Iterator[say.Event]:
        """Held-out bits/dim and samples, where they are due."""
        end = self.step >= self.task.total_steps
        if self.task.hooks.evaluate is not None and (end or self._due(self.config.evaluate_every_images)):
            mean, error, count = _joined(self.task.hooks.evaluate(self.ema.model, self.place), self.place)
            metrics = {"held_out/bits_per_dim": mean, "held_out/standard_error": error, "held_out/images": count}
            yield say.Evaluated(self.step, self.images, metrics)
        due = end or self._due(self.config.sample_every_images)
        if self.task.hooks.sample is not None and due and self.place.rank == 0:
            yield say.Samples(self.step, self.images, self.task.hooks.sample(self.ema.model))

    def _finish(self) -> Iterator[say.Event]:
        end = self.step >= self.task.total_steps
        if end:
            yield from self._look()
        self.finished = end
        yield self._save()
        failed = None
        for event in self._saved(wait=True):
            failed = event if isinstance(event, say.CheckpointFailed) and event.step == self.step else failed
            yield event
        if failed is not None:
            raise OSError(f"the last checkpoint could not be saved: {failed.reason}")
        yield say.Finished(self.step, self.images, "budget" if end else "stopped", self._url())

    # --- parts --------------------------------------------------------------------------------------------------------

    def _precisions(self) -> list[tuple[str, torch.dtype | None]]:
        """Those of this hardware that the run may use or is told the time of."""
        bf16 = self.config.precision != "fp32" and hardware.has_bf16(self.place.device)
        return [(name, kind) for name, kind in AUTOCAST.items() if kind is None or bf16]

    def _prepare(self, mine: Sequence[Batch], shards: Sequence[int]) -> say.Prepared:
        """Settles the precision and wraps the blocks, before DDP is put around the network."""
        config, shape = self.config, mine[0].images.shape[1:]
        self.flops_per_image = hardware.training_flops(self.denoiser.network, shape, self.task.classes)
        if config.checkpoint_activations:
            checkpoint_blocks(self.denoiser.network)
        tried = {} if config.precision == "fp32" else self._tried(mine, shards)
        precision = min(tried, key=lambda name: tried[name]) if config.precision == "auto" else config.precision
        self.module.autocast = AUTOCAST[precision]
        compile_blocks(self.denoiser.network, config.compile)
        self.peak_flops = self.peaks[precision]
        return say.Prepared(
            step=self.step,
            images=self.images,
            precision=precision,
            forward_backward_s=tried,
            flops_per_image=self.flops_per_image,
            peak_flops=self.peak_flops,
            compile=config.compile,
            checkpoint_activations=config.checkpoint_activations,
        )

    def _tried(self, mine: Sequence[Batch], shards: Sequence[int]) -> dict[str, float]:
        """Seconds of a logical shard's forward and backward pass in each precision of this hardware, the mean over
        ranks, so that all of them decide alike."""
        key = StepKey(self.task.seed, self.step, shards[-1], self.task.logical_shards)
        found: dict[str, float] = {}
        for name, kind in self._precisions():
            self.module.autocast = kind
            run = partial(backward, self.module, mine[-1:], [key], self.place)
            found[name] = hardware.seconds(run, self.place.device)
        self.module.zero_grad(set_to_none=True)
        times = torch.tensor(list(found.values()), device=self.place.device)
        if self.place.world > 1:
            torch.distributed.all_reduce(times)
        return dict(zip(found, (times / self.place.world).tolist(), strict=True))

    def _metrics(self) -> dict[str, float]:
        found = self.window.metrics(self.skipped)
        rate = found["images_per_s"] * self.flops_per_image / self.place.world
        found["peak_memory_gib"] = hardware.peak_memory(self.place.device) / 2**30
        return found | {"tflops": rate / 1e12, "mfu": rate / self.peak_flops}

    def _network(self) -> torch.nn.Module:
        """What a step calls: the module, for several workers with DDP around it."""
        if self.place.world == 1:
            return self.module
        return DistributedDataParallel(self.module, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def _settle(self, network: torch.nn.Module, mine: Sequence[Batch], shards: Sequence[int]) -> None:
        """Brings DDP's gradient buckets into their final order.

        DDP rebuilds its buckets after the first backward, so that the first step after a restart would add up gradients
        of three or more ranks in another order than the same step of an uninterrupted run. Two throwaway backwards at
        every start, the very first included, leave nothing but the order behind: gradients are cleared, and every draw
        of a step is keyed anew.
        """
        if self.place.world == 1:
            return
        key = StepKey(self.task.seed, self.step, shards[-1], self.task.logical_shards)
        with warnings.catch_warnings():  # said once a process: 1x1 kernels have two names for the same strides
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            for _ in range(2):
                backward(network, mine[-1:], [key], self.place)
        self.optimizer.zero_grad()

    def _due(self, every: int) -> bool:
        """Whether the step just done passed a multiple of `every` images."""
        return every > 0 and self.step > 0 and self.images // every > (self.images - self.task.batch_size) // every

    def _save(self) -> say.CheckpointBegun:
        if self.place.rank == 0:
            self.saver.save(self.state())
        return say.CheckpointBegun(self.step, self.images)

    def _saved(self, wait: bool = False) -> Iterator[say.Event]:
        for done in self.saver.outcomes(wait):
            images = done.step * self.task.batch_size
            if done.failure is not None:
                yield say.CheckpointFailed(done.step, images, done.url, done.failure)
            else:
                yield say.CheckpointSaved(done.step, images, done.url, done.wait_s, done.write_s)

    def _url(self) -> str:
        return folder(self.task.store, self.step)

    def _started(self, rejected: Sequence[str]) -> say.Started:
        return say.Started(
            step=self.step,
            images=self.images,
            total_steps=self.task.total_steps,
            total_images=self.task.total_steps * self.task.batch_size,
            batch_size=self.task.batch_size,
            world_size=self.place.world,
            parameters=sum(p.numel() for p in self.denoiser.parameters()),
            precision=self.config.precision,
            checkpoint=self._url() if self.step else None,
            rejected=tuple(rejected),
        )

    def _blame(self, table: Table, norm: float) -> str:
        """Which step, rank and noise level."""
        shard = table.bad_shard()
        what = "loss"
        if shard is None:
            what, shard = f"gradient (norm {norm})", int(table.per_image.mean(1).argmax())
        values = table.per_image[shard]
        bad = ~torch.isfinite(values)
        image = int(bad.nonzero()[0]) if bool(bad.any()) else int(values.argmax())
        where = f"logical shard {shard} (rank {shard % self.place.world}), gamma {float(table.gamma[shard, image]):.3f}"
        return f"step {self.step}: {what} not finite; {'in' if what == 'loss' else 'largest loss in'} {where}"


class _Window:
    """Sums over the steps since the last event."""

    def __init__(self) -> None:
        self.steps = self.images = 0
        self.wait_s = self.busy_s = 0.0
        self.sums: dict[str, float] = {}
        self.quarters = torch.zeros(4, 2, dtype=torch.float64)
        self.last: dict[str, float] = {}

    def add(self, table: Table, norm: float, rate: float, wait_s: float, busy_s: float, images: int) -> None:
        self.steps, self.images = self.steps + 1, self.images + images
        self.wait_s, self.busy_s = self.wait_s + wait_s, self.busy_s + busy_s
        values = {"loss": table.loss, "grad_norm": norm}
        values |= {f"part/{name}": float(part.mean()) for name, part in table.parts.items()}
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.quarters += table.quarters
        self.last = {"learning_rate": rate}

    def metrics(self, skipped: int) -> dict[str, float]:
        means = {name: value / self.steps for name, value in self.sums.items()}
        for index, (total, count) in enumerate(self.quarters.tolist()):
            if count:
                means[f"loss_quarter_{index + 1}"] = total / count
        speed = {"images_per_s": self.images / self.busy_s, "data_wait": self.wait_s / self.busy_s}
        return means | self.last | speed | {"skipped_steps": float(skipped)}


def _joined(values: Tensor, place: Place) -> tuple[float, float, float]:
    """Mean, standard error and number of all ranks' values (m,)."""
    values = values.double()
    sums = torch.stack([torch.tensor(float(len(values))), values.sum().cpu(), values.square().sum().cpu()]).double()
    if place.world > 1:
        sums = sums.to(place.device)
        torch.distributed.all_reduce(sums)
    count, total, squares = sums.tolist()
    mean = total / count
    variance = max(0.0, squares / count - mean**2) * count / max(1.0, count - 1)
    return mean, math.sqrt(variance / count), count
