"""Whether a group of workers still moves: each tells its signs of life, and the verdict says who stands still.

Pure: time is given, nothing is started or killed here.
"""

import sys
import threading
import traceback
from collections import deque
from dataclasses import dataclass
from statistics import median

PATIENCE = 10  # times the floor: before the second step (compilation, probes), and while samples are drawn or scored
STEPPING = "step"
MEDIAN_OF = 101


@dataclass(frozen=True)
class Sign:
    """A worker's sign of life. steps: begun in this process; step: of the training; doing: `STEPPING`, or what keeps it
    from it.
    """

    rank: int
    pid: int
    node: str
    steps: int
    step: int
    doing: str


@dataclass(frozen=True)
class Verdict:
    """The group stands still. reason: one line; workers: their last signs; silent: the ranks that give none."""

    reason: str
    workers: tuple[Sign, ...]
    silent: frozenset[int] = frozenset()


class Watch:
    """Judges the signs of one group after another; a rank's new process is a new group.

    A group stands still where no rank begins a step for `factor` times the median step, or where a rank gives no sign
    at all; neither is said before `floor_s` (0: never).
    """

    def __init__(self, factor: float, floor_s: float) -> None:
        self.factor, self.floor_s = factor, floor_s
        self.clear()

    def clear(self) -> None:
        """Forgets the group."""
        self.signs: dict[int, tuple[Sign, float]] = {}
        self.steps, self.moved = 0, 0.0
        self.step_s: deque[float] = deque(maxlen=MEDIAN_OF)

    def see(self, sign: Sign, now: float) -> None:
        known = self.signs.get(sign.rank)
        if known is not None and known[0].pid != sign.pid:
            self.clear()
            known = None
        self.signs[sign.rank] = sign, now
        if known is None or known[0].doing != sign.doing:
            self.moved = now
        if sign.steps > self.steps:
            if self.steps and sign.doing == STEPPING:
                self.step_s.append((now - self.moved) / (sign.steps - self.steps))
            self.steps, self.moved = sign.steps, now

    def left(self, rank: int) -> None:
        """A worker that came to its end."""
        self.signs.pop(rank, None)

    def limit_s(self) -> float:
        """Seconds without a step that the group is given now."""
        if not self.step_s or any(sign.doing != STEPPING for sign, _ in self.signs.values()):
            return PATIENCE * self.floor_s
        return max(self.floor_s, self.factor * median(self.step_s))

    def step(self) -> int:
        """The last step that the slowest rank has done; 0 where none has begun one."""
        begun = [sign.step for sign, _ in self.signs.values() if sign.steps]
        return max(0, min(begun, default=1) - 1)

    def verdict(self, now: float) -> Verdict | None:
        """None while the group moves."""
        if not self.floor_s or not self.signs:
            return None
        workers = tuple(sign for _, (sign, _) in sorted(self.signs.items()))
        silent = {rank: now - seen for rank, (_, seen) in sorted(self.signs.items()) if now - seen > self.floor_s}
        if silent:
            reason = ", ".join(f"rank {rank} gave no sign for {seconds:.0f} s" for rank, seconds in silent.items())
            return Verdict(reason, workers, frozenset(silent))
        if now - self.moved <= self.limit_s():
            return None
        typical = f"; a step takes {median(self.step_s):.3g} s" if self.step_s else ""
        where = ", ".join(f"rank {sign.rank} in {sign.doing} {sign.step}" for sign in workers)
        return Verdict(f"no step for {now - self.moved:.0f} s{typical}; {where}", workers)


def stacks() -> str:
    """What every thread of this process is doing."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames().items()
    return "\n".join(f"{names.get(i, i)}:\n{''.join(traceback.format_stack(frame))}" for i, frame in frames)
