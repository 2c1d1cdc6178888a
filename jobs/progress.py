"""Progress on a terminal: a live bar, or one plain line every few seconds where there is no terminal (logs, `ray job
submit`).
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn

from jobs.cli import console

if TYPE_CHECKING:
    from pipeline.cluster.monitoring import JobMetrics

PLAIN_EVERY_S = 5.0


class Bar:
    """One measured piece of work of `total` units; `update` may be called as often as one likes."""

    def __init__(self, what: str, total: float, unit: str, progress: Progress | None) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.progress = progress
        self.task = None if progress is None else progress.add_task(what, total=total, rate="", left="", note="")
        self.started = time.monotonic()
        self.first: float | None = None  # where it stood at the start: resumed work has no rate
        self.moved: tuple[float, float] | None = None  # when it first moved, and to where: the start counts in no rate
        self.printed = self.started
        self.metrics = _metrics(what)

    def _rate(self, done: float, now: float) -> float:
        """Units a second since the first move; 0 before the second."""
        if self.first is None:
            self.first = done
        if self.moved is None:
            if done > self.first:
                self.moved = now, done
            return 0.0
        since, at = self.moved
        return (done - at) / (now - since) if done > at and now > since else 0.0

    def update(self, done: float, note: str = "") -> None:
        """`done` units so far in all; `note` is what else to show (loss, bits/dim)."""
        now = time.monotonic()
        if self.metrics is not None:
            self.metrics.update(done, self.total)
        rate = self._rate(done, now)
        left = f"{_clock((self.total - done) / rate)} left" if rate > 0 and done < self.total else ""
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=done, rate=f"{rate:,.0f} {self.unit}/s", left=left, note=note)
        elif now - self.printed >= PLAIN_EVERY_S and done < self.total:
            share = f"{done:,.0f}/{self.total:,.0f} {self.unit}"
            parts = [share, f"{rate:,.0f} {self.unit}/s", left or "starting", note]
            console.print(f"  {self.what}: {', '.join(part for part in parts if part)}", soft_wrap=True)
            self.printed = now


def _metrics(what: str) -> "JobMetrics | None":
    """Where the job has a Ray session, what Prometheus reads of it there."""
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    from pipeline.cluster.monitoring import JobMetrics

    return JobMetrics(what)


def _clock(seconds: float) -> str:
    """12 s, 3:25, 2:03:25."""
    hours, rest = divmod(round(seconds), 3600)
    if not hours and rest < 60:
        return f"{rest} s"
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


@contextmanager
def bar(what: str, total: float, unit: str) -> Iterator[Bar]:
    """A bar for the length of the block."""
    if not console.is_terminal:
        yield Bar(what, total, unit, None)
        return
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=28),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}"),
        TextColumn("{task.fields[left]}"),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(what, total, unit, progress)


@contextmanager
def phases(unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """One bar after another: the yielded function takes (what, done, total) and opens a bar where `what` changes."""
    with ExitStack() as stack:
        current: dict[str, Bar] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in current:
                stack.pop_all().close()
                current.clear()
                current[what] = stack.enter_context(bar(what, total, unit))
            current[what].update(done)

        yield show
