"""Progress on a terminal: a live bar, or one plain line every few seconds where there is no terminal (logs, `ray job
submit`).
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jobs.cli import console

if TYPE_CHECKING:
    from pipeline.cluster.monitoring import JobMetrics

PLAIN_EVERY_S = 5.0


class Bar:
    """One measured piece of work of `total` units; `update` may be called as often as one likes."""

    def __init__(self, what: str, total: float, unit: str, progress: Progress | None) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.progress = progress
        self.task = None if progress is None else progress.add_task(what, total=total, rate="", note="")
        self.started = time.monotonic()
        self.first: float | None = None  # where it stood at the start: resumed work has no rate
        self.printed = self.started
        self.metrics = _metrics(what)

    def update(self, done: float, note: str = "") -> None:
        """`done` units so far in all; `note` is what else to show (loss, bits/dim)."""
        now = time.monotonic()
        if self.first is None:
            self.first = done
        if self.metrics is not None:
            self.metrics.update(done, self.total)
        elapsed = now - self.started
        rate = (done - self.first) / elapsed if elapsed > 0 else 0.0
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=done, rate=f"{rate:,.0f} {self.unit}/s", note=note)
        elif now - self.printed >= PLAIN_EVERY_S and done < self.total:
            left = f"{(self.total - done) / rate:,.0f} s left" if rate > 0 else "starting"
            share = f"{done:,.0f}/{self.total:,.0f} {self.unit}"
            parts = [share, f"{rate:,.0f} {self.unit}/s", left, note]
            console.print(f"  {self.what}: {', '.join(part for part in parts if part)}", soft_wrap=True)
            self.printed = now


def _metrics(what: str) -> "JobMetrics | None":
    """Where the job has a Ray session, what Prometheus reads of it there."""
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    from pipeline.cluster.monitoring import JobMetrics

    return JobMetrics(what)


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
        TimeRemainingColumn(compact=True),
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
