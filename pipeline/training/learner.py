"""What a training changes: the network, its moving average, the optimizer, and what objective and guard remember."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from pipeline.data.reading.stream import Batch
from pipeline.diffusion.randomness import StepKey
from pipeline.training.agreement import Agreement, agree
from pipeline.training.checkpoint import State, Tensors
from pipeline.training.ema import EMA, decay
from pipeline.training.guards import Guard, Verdict, all_finite
from pipeline.training.optim import AdamW, clip_scale, gradient_norm, learning_rate
from pipeline.training.prepare import laid_out
from pipeline.training.progress import Progress
from pipeline.training.reduction import Reduction
from pipeline.training.restore import RunError
from pipeline.training.step import TrainingModule
from pipeline.training.task import Task, check_identity


@runtime_checkable
class Remembers(Protocol):
    """An objective with memory."""

    def update(self, observed: Tensor) -> None: ...
    def state_dict(self) -> Mapping[str, Tensor]: ...
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class StepOutcome:
    """What became of a step. table: None where its batch was not looked at; verdict: why no weight changed, or None."""

    table: Agreement | None
    verdict: Verdict | None
    learning_rate: float


class Learner:
    """The state of a training, and one step of it. `reduction` is set when the network is ready to train."""

    reduction: Reduction

    def __init__(self, task: Task) -> None:
        config = task.config
        self.task, self.config, self.place = task, config, task.place
        self.denoiser = laid_out(task.denoiser, task.place.device, config.compile != "none").train()
        self.module = TrainingModule(
            self.denoiser, task.objective, task.conditioner, task.space, None, config.label_dropout
        )
        self.ema = EMA(self.denoiser)
        self.optimizer = AdamW(self.denoiser.named_parameters(), config.betas, config.weight_decay)
        self.memory = task.objective if isinstance(task.objective, Remembers) else None
        self.guard = Guard(config)
        self.progress = Progress()
        self.history: list[dict[str, Any]] = [{"from_images": 0, **config.settings}]

    def keys(self, shards: Sequence[int]) -> list[StepKey]:
        """What the draws of the coming step depend on."""
        return [StepKey(self.task.seed, self.progress.step, shard, self.task.logical_shards) for shard in shards]

    def step(self, batches: Sequence[Batch], wishes: Sequence[bool]) -> StepOutcome:
        """One global batch. wishes: to stop, see `Agreement`."""
        task, config, progress = self.task, self.config, self.progress
        number, seen = progress.step + 1, progress.images
        shards = self.place.shards(task.logical_shards)
        rate = learning_rate(
            config.learning_rate, config.law, config.warmup_images, config.images, seen + task.batch_size
        )
        if number in progress.skip_steps or number in config.skip_steps:
            self._advance(left_out=True)
            return StepOutcome(None, Verdict("asked", "it was to be left out"), rate)
        losses = self.reduction.backward(batches, self.keys(shards))
        norm = gradient_norm(self.optimizer.gradients())
        lost = sum(len(batch.lost) for batch in batches)
        table = agree(losses, norm, task.logical_shards, self.place, wishes, lost)
        verdict = self.guard.judge(table)
        if verdict is None:
            self.optimizer.step(rate, clip_scale(norm, config.clip_norm))
            self.ema.update(decay(task.batch_size, seen, config.ema_half_life_images, config.ema_ramp_up))
            if table.observed is not None and self.memory is not None:
                self.memory.update(table.observed)
        self.optimizer.zero_grad()
        self._advance(left_out=verdict is not None)
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if verdict is not None else 0
        return StepOutcome(table, verdict, rate)

    def _advance(self, left_out: bool) -> None:
        progress = self.progress
        progress.step += 1
        progress.images += self.task.batch_size
        progress.skipped += left_out
        progress.skip_steps = [step for step in progress.skip_steps if step > progress.step]
        progress.bits_per_dim = progress.ended = None

    def broken(self) -> str | None:
        """None, or the part of the state (model, ema, optimizer, objective) that is not finite on some rank; every rank
        must call it.
        """
        return all_finite(self.tensors(), self.place)

    # --- to and from a checkpoint -------------------------------------------------------------------------------------

    def tensors(self) -> Tensors:
        """The state by name, not copied."""
        tensors = {
            "model": self.denoiser.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        return tensors if self.memory is None else tensors | {"objective": self.memory.state_dict()}

    def state(self, seconds: float) -> State:
        """What a checkpoint holds. seconds: of training until now."""
        progress = asdict(self.progress) | {"seconds": seconds}
        facts = {**progress, "identity": dict(self.task.identity), "guard": self.guard.state()}
        facts |= {"about": dict(self.task.about), "history": self.history}
        return State(self.progress.step, self.tensors(), facts)

    def load(self, state: State) -> None:
        """Takes over a checkpoint's state.

        Raises:
            RunError: it is of another run or another architecture; names what differs.
        """
        check_identity(state.facts["identity"], self.task.identity, self.task.store)
        try:
            self.denoiser.load_state_dict(dict(state.tensors["model"]))
            self.ema.load_state_dict(dict(state.tensors["ema"]))
            self.optimizer.load_state_dict(dict(state.tensors["optimizer"]))
            if self.memory is not None:
                self.memory.load_state_dict(state.tensors["objective"])
        except (RuntimeError, KeyError, ValueError) as error:
            where = f"the checkpoint of step {state.step} at {self.task.store}"
            raise RunError(f"{where} does not fit the network: {error}") from None
        self.guard.load(state.facts["guard"])
        self.progress = Progress.of(state.step, state.facts)
        self.history = self._gone_on(state.facts.get("history", []))

    def _gone_on(self, history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Which settings the weights were made with, from which number of images on: those of before, and the present
        ones where they differ.
        """
        now = self.config.settings
        known = [dict(part) for part in history]
        if known and {**known[-1], "from_images": 0} == {"from_images": 0, **now}:
            return known
        return [*known, {"from_images": self.progress.images, **now}]
