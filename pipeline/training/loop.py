"""The training loop: a generator of events, the same with and without a cluster.

The state of a training is one integer (the step), the weights, their EMA, the optimizer's and, where the objective has
one, its memory. Everything else is computed from the step: the data, every random draw, the learning rate, when to
evaluate and to save.
"""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from pipeline.training import events as say
from pipeline.training import hardware
from pipeline.training.agreement import Agreement
from pipeline.training.checkpoint import folder, newest
from pipeline.training.config import TrainingConfig
from pipeline.training.guards import Diverged
from pipeline.training.learner import Learner, StepOutcome
from pipeline.training.metrics import StepMetrics
from pipeline.training.periodic_evaluation import evaluated, sampled
from pipeline.training.prefetch import Prefetcher
from pipeline.training.progress import Progress
from pipeline.training.recovery import Recovery
from pipeline.training.restore import RunError, restore
from pipeline.training.retention import Keep
from pipeline.training.saver import Saver
from pipeline.training.start import make_ready
from pipeline.training.task import Hooks, Task, check, check_finished, check_identity

__all__ = ["Diverged", "Hooks", "RunError", "Task", "TrainingConfig", "standing", "train"]


def train(task: Task) -> Iterator[say.Event]:
    """Trains from the newest verified checkpoint (or the start) to the end of the budget, telling what happens.

    Every rank runs it, and runs it to its end. With place.world > 1 torch.distributed must be initialised.

    Raises:
        RunError: workers without a logical shard, precision that the hardware lacks, a checkpoint of another run, a
            store that another job took over.
        Diverged: the guards left out `skip_limit` steps in a row, or went back as often from one place.
    """
    check(task)
    with hardware.deterministic(task.config.deterministic):
        run = _Run(task)
        try:
            yield from run.events()
        finally:
            run.saver.close()


def standing(
    config: TrainingConfig, batch_size: int, store: str, identity: Mapping[str, Any], about: Mapping[str, Any]
) -> say.Finished | None:
    """The end of a training that is there already, verified; None where there is something left to do.

    Raises:
        RunError: what is there is of another run, or has ended and would be changed, see `check_finished`.
    """
    state, _ = newest(store)
    if state is None:
        return None
    check_identity(state.facts["identity"], identity, store)
    check_finished((state.step, state.facts), config, batch_size, about, store)
    progress = Progress.of(state.step, state.facts)
    end = progress.end(config, batch_size)
    if progress.ended is None or end is None:
        return None
    return say.Finished(progress.step, progress.images, end, folder(store, state.step))


class _Run:
    """A training under way on one rank."""

    def __init__(self, task: Task) -> None:
        config = task.config
        self.task, self.config, self.place = task, config, task.place
        if task.place.device.type == "cpu":
            hardware.keep_memory()
        self.learner = Learner(task)
        self.saver = Saver(task.store, Keep(config.keep, config.keep_best, config.keep_every_images), task.hooks.commit)
        schedule = self.learner.denoiser.schedule
        self.window = StepMetrics((schedule.gamma_min, schedule.gamma_max))
        self.prepared: say.Prepared | None = None
        self.stop: str | None = None  # why the ranks agreed to stop
        self.save = False  # they agreed to save now
        self.recovery = Recovery(self.learner, self.saver.wait)
        self.evaluated_at = self.sampled_at = -1  # the steps whose evaluation and samples were told
        self.clock, self.seconds_before = time.monotonic(), 0.0
        self.saved_s = self.clock  # when the last checkpoint was begun

    @property
    def progress(self) -> Progress:
        return self.learner.progress

    # --- the course of it ---------------------------------------------------------------------------------------------

    def events(self) -> Iterator[say.Event]:
        state, rejected = restore(self.task.store, self.place)
        if state is not None:
            self.learner.load(state)
            self.seconds_before = self.progress.seconds
            check_finished(
                (state.step, state.facts), self.config, self.task.batch_size, self.task.about, self.task.store
            )
        yield self._started(rejected)
        end = self._end()
        if end is not None and self.progress.ended is not None:
            yield say.Finished(*self._now, end, self._url())
            return
        if self.progress.step and end is None:
            yield from self._look()  # what the process before may not have lived to tell
        while self._end() is None:
            yield from self._stretch()
        yield from self._finish()

    def _stretch(self) -> Iterator[say.Event]:
        """Steps to the end, or to where the run goes back to a checkpoint."""
        count = len(self.place.shards(self.task.logical_shards))
        reader = Prefetcher(self.task.open_batches, self.progress.step, self.task.total_steps, count)
        try:
            went_back = False
            while self._end() is None and not went_back:
                mine, waited = reader.read()
                if self.prepared is None:
                    self.prepared, waited = make_ready(self.learner, mine), 0.0
                    if self.place.rank == 0:
                        self.saver.reserve(self.learner.tensors())
                    yield self.prepared
                start = time.perf_counter()
                outcome = self.learner.step(mine, self._wishes())
                if outcome.table is not None:
                    self.stop, self.save = _agreed(outcome.table), bool(outcome.table.wishes[2])
                    if outcome.verdict is None:
                        busy = waited + time.perf_counter() - start
                        self.window.add(outcome.table, self.task.batch_size, waited, busy)
                went_back = yield from self._after(outcome)
        finally:
            reader.close()

    def _after(self, outcome: StepOutcome) -> Generator[say.Event, None, bool]:
        """What follows a step: guards, metrics, looks, a checkpoint. Whether the run went back."""
        verdict, end = outcome.verdict, self._end()
        if verdict is not None:
            back = self.recovery.answer(verdict)
            if back is not None:
                return (yield from self._went_back(back))
            yield say.Skipped(*self._now, f"step {self.progress.step}: {verdict.reason}", verdict.cause)
        if self.window.steps and (end or self._due(self.config.log_every_images)):
            yield say.Step(*self._now, self._metrics(outcome.learning_rate))
        looks = self._due(self.config.evaluate_every_images) or self._due(self.config.sample_every_images)
        saves = self.save or self._due(self.config.checkpoint_every_images)
        if end or looks or saves:  # the state leaves this process: never one that is not finite
            back = self.recovery.mend()
            if back is not None:
                return (yield from self._went_back(back))
        if end is None:
            yield from self._look()
            if saves and self._end() is None:
                yield self._save()
        yield from self._saved()
        return False

    def _went_back(self, event: say.RolledBack) -> Generator[say.Event, None, bool]:
        """What was told of the steps after the checkpoint is told again."""
        self.evaluated_at = self.sampled_at = -1
        self.window.empty()
        yield event
        return True

    def _finish(self) -> Iterator[say.Event]:
        end = self._end()
        assert end is not None, "a training finishes at one of its ends"
        if end != "stopped":
            yield from self._look(end=True)
        yield self._save(end)
        failure = None
        for event in self._saved(wait=True):
            if isinstance(event, say.CheckpointFailed) and event.step == self.progress.step and not event.committed:
                failure = event.reason
            yield event
        if failure is not None:
            raise OSError(f"the last checkpoint could not be saved: {failure}")
        yield say.Finished(*self._now, end, self._url())

    def _look(self, end: bool = False) -> Iterator[say.Event]:
        """Evaluation and samples, where they are due and were not told."""
        step, config = self.progress.step, self.config
        if self.evaluated_at != step and (end or self._due(config.evaluate_every_images)):
            self.evaluated_at = step
            yield from evaluated(self.learner, self.window)
        if self.sampled_at != step and (end or self._due(config.sample_every_images)):
            self.sampled_at = step
            yield from sampled(self.learner)

    # --- decisions, the same on every rank ----------------------------------------------------------------------------

    def _end(self) -> str | None:
        """Why the training ends here, if it does."""
        return self.progress.end(self.config, self.task.batch_size) or self.stop

    def _wishes(self) -> tuple[bool, bool, bool]:
        hours = self.config.max_hours
        time_is_up = self.place.rank == 0 and hours > 0 and self._seconds() >= 3600 * hours
        return self.task.hooks.stop(), time_is_up, self.task.hooks.save() or self._much_to_lose()

    def _much_to_lose(self) -> bool:
        """Whether the last checkpoint is long ago, by rank 0's clock."""
        minutes = self.config.checkpoint_every_minutes
        return self.place.rank == 0 and 0 < 60 * minutes <= time.monotonic() - self.saved_s

    def _due(self, every: int) -> bool:
        """Whether the step just done passed a multiple of `every` images."""
        images = self.progress.images
        return every > 0 and self.progress.step > 0 and images // every > (images - self.task.batch_size) // every

    # --- parts --------------------------------------------------------------------------------------------------------

    @property
    def _now(self) -> tuple[int, int]:
        return self.progress.step, self.progress.images

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.clock

    def _url(self) -> str:
        return folder(self.task.store, self.progress.step)

    def _metrics(self, learning_rate: float) -> dict[str, float]:
        assert self.prepared is not None, "steps come after the preparation"
        found = self.window.metrics() | {"learning_rate": learning_rate}
        rate = found["images_per_s"] * self.prepared.flops_per_image / self.place.world
        found |= {"skipped_steps": float(self.progress.skipped), "rollbacks": float(self.progress.rollbacks)}
        found["peak_memory_gib"] = hardware.peak_memory(self.place.device) / 2**30
        return found | {"tflops": rate / 1e12, "mfu": rate / self.prepared.peak_flops}

    def _save(self, ended: str | None = None) -> say.CheckpointBegun:
        self.progress.ended = ended
        self.recovery.went_back, self.saved_s = 0, time.monotonic()
        if self.place.rank == 0:
            self.saver.save(self.learner.state(self._seconds()))
        return say.CheckpointBegun(*self._now)

    def _saved(self, wait: bool = False) -> Iterator[say.Event]:
        for done in self.saver.outcomes(wait):
            images = done.step * self.task.batch_size
            if done.lost:
                raise RunError(str(done.failure))
            if done.committed:
                yield say.CheckpointSaved(done.step, images, done.url, done.wait_s, done.write_s)
            if done.failure is not None:
                yield say.CheckpointFailed(done.step, images, done.url, done.failure, done.committed)

    def _started(self, rejected: Sequence[str]) -> say.Started:
        return say.Started(
            *self._now,
            total_steps=self.task.total_steps,
            total_images=self.task.total_steps * self.task.batch_size,
            batch_size=self.task.batch_size,
            world_size=self.place.world,
            parameters=sum(p.numel() for p in self.learner.denoiser.parameters()),
            precision=self.config.precision,
            checkpoint=self._url() if self.progress.step else None,
            rejected=tuple(rejected),
        )


def _agreed(table: Agreement) -> str | None:
    """Why some rank wishes to stop: being asked comes first."""
    asked, time_is_up, _ = table.wishes.tolist()
    return "stopped" if asked else "max_hours" if time_is_up else None
