"""What guards lead to: a step left out, or the run going back to the newest checkpoint that verifies."""

from collections.abc import Callable, Iterable

from pipeline.training import events as say
from pipeline.training.checkpoint import folder
from pipeline.training.guards import Diverged, Verdict
from pipeline.training.learner import Learner
from pipeline.training.restore import restore


class Recovery:
    """Decides by what is the same on every rank; every rank must call it alike.

    saved: waits until no checkpoint is being written.
    """

    def __init__(self, learner: Learner, saved: Callable[[], None]) -> None:
        self.learner, self.saved = learner, saved
        self.went_back = 0  # how often since a checkpoint was made

    def answer(self, verdict: Verdict) -> say.RolledBack | None:
        """What a step that changed no weight leads to, beside being left out.

        Raises:
            Diverged: too many of them.
        """
        config, step = self.learner.config, self.learner.progress.step
        back = None
        if verdict.cause == "spike" and config.on_spike == "rollback":
            back = self._go_back("spike", verdict.reason, range(step + 1 - config.rollback_skips, step + 1))
        elif verdict.cause == "not_finite":
            back = self.mend()
        if back is None and self.learner.progress.skipped_in_a_row >= config.skip_limit:
            raise Diverged(f"{config.skip_limit} steps in a row had to be left out; step {step}: {verdict.reason}")
        return back

    def mend(self) -> say.RolledBack | None:
        """Goes back where the state is not finite.

        Raises:
            Diverged: there is no checkpoint, or it was done too often.
        """
        part = self.learner.broken()
        if part is None:
            return None
        reason = f"{part} not finite at step {self.learner.progress.step}"
        back = self._go_back("state", reason, ())
        if back is None:
            raise Diverged(f"{reason}, and there is no checkpoint to go back to")
        return back

    def _go_back(self, cause: str, reason: str, skip_steps: Iterable[int]) -> say.RolledBack | None:
        """Takes over the newest checkpoint that verifies; None where there is none."""
        if self.went_back == self.learner.config.skip_limit:
            raise Diverged(f"went back {self.went_back} times without coming to another checkpoint; {reason}")
        task, before = self.learner.task, self.learner.progress
        self.saved()
        state, _ = restore(task.store, task.place)
        if state is None:
            return None
        self.learner.load(state)
        self.went_back += 1
        now = self.learner.progress
        now.skipped, now.rollbacks = before.skipped, before.rollbacks + 1
        now.skip_steps = sorted({*now.skip_steps, *before.skip_steps, *(s for s in skip_steps if s > now.step)})
        url = folder(task.store, now.step)
        return say.RolledBack(now.step, now.images, before.step, cause, reason, url, tuple(now.skip_steps))
