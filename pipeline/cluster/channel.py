"""Between workers and driver: events and signs of life one way, the wish to stop the other way, through one small actor
beside the driver.

A worker's thread hands its lines over every `EVERY_S`, so that the training thread never waits; lines are JSON, so that
the actor's process loads nothing but Ray.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.cluster.watch import STEPPING, Sign, Verdict, Watch, stacks

EVERY_S = 0.25
MOST_LINES = 20_000  # held for a driver that does not read; beyond it the oldest go


class Orders(NamedTuple):
    """What a worker is told when it gives a sign: to stop; to tell its stacks."""

    stop: bool
    tell: bool


class _Channel:
    """What runs in the actor."""

    def __init__(self, hang_factor: float, hang_floor_s: float) -> None:
        self.lines: deque[str] = deque(maxlen=MOST_LINES)
        self.stopping = False
        self.watch = Watch(hang_factor, hang_floor_s)
        self.verdict: Verdict | None = None
        self.told: dict[int, str] = {}

    def put(self, lines: list[str], sign: Sign) -> Orders:
        self.lines.extend(lines)
        self.watch.see(sign, time.monotonic())
        return Orders(self.stopping, self.verdict is not None and sign.rank not in self.told)

    def leave(self, lines: list[str], rank: int) -> None:
        self.lines.extend(lines)
        self.watch.left(rank)

    def tell(self, rank: int, text: str) -> None:
        self.told[rank] = text

    def take(self, stop: bool) -> tuple[list[str], Verdict | None, int]:
        self.stopping = self.stopping or stop
        self.verdict = self.verdict or self.watch.verdict(time.monotonic())
        taken, self.lines = list(self.lines), deque(maxlen=MOST_LINES)
        return taken, self.verdict, self.watch.step()

    def told_by(self) -> set[int]:
        return set(self.told)

    def settle(self) -> dict[int, str]:
        """rank -> stacks, of the workers that told them; forgets the verdict and the group."""
        told, self.told, self.verdict = self.told, {}, None
        self.watch.clear()
        return told


def open_channel(hang_factor: float, hang_floor_s: float) -> Any:
    """A channel's handle; the actor lives on the driver's node and ends with the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": 3, "scheduling_strategy": here}
    return ray.remote(_Channel).options(**options).remote(hang_factor, hang_floor_s)


class Speaker:
    """A worker's end: `say` costs nothing, a thread does the rest; `stopping` says whether the driver wants to stop.

    step, steps and doing are what the worker sets as it goes, see `Sign`.
    """

    def __init__(self, channel: Any, rank: int) -> None:
        self.stopping = False
        self.step, self.steps, self.doing = 0, 0, "start"
        self._rank, self._node = rank, ray.get_runtime_context().get_node_id()
        self._channel = channel
        self._lines: deque[str] = deque()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="speaker", daemon=True)
        self._thread.start()

    def say(self, line: str) -> None:
        self._lines.append(line)

    def begin_step(self) -> None:
        self.steps, self.step, self.doing = self.steps + 1, self.step + 1, STEPPING

    def close(self) -> None:
        """Delivers what is left."""
        self._closed.set()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while not self._closed.wait(EVERY_S):
            sign = Sign(self._rank, os.getpid(), self._node, self.steps, self.step, self.doing)
            orders: Orders = ray.get(self._channel.put.remote(self._taken(), sign))
            self.stopping = orders.stop or self.stopping
            if orders.tell:
                ray.get(self._channel.tell.remote(self._rank, stacks()))
        ray.get(self._channel.leave.remote(self._taken(), self._rank))

    def _taken(self) -> list[str]:
        return [self._lines.popleft() for _ in range(len(self._lines))]


def listen(channel: Any, alive: threading.Thread, stop: Callable[[], bool]) -> Iterator[str | Verdict | int]:
    """The driver's end: lines as they come, until the thread `alive` ends, and a verdict where the workers stand still,
    to be settled before the next is asked for; a number is the last step that the group has done. A wish to stop goes
    back.
    """
    told = 0
    while True:
        ended = not alive.is_alive()
        lines, verdict, step = ray.get(channel.take.remote(bool(stop())))
        yield from lines
        if step != told:
            told = step
            yield step
        if ended:
            return
        if verdict is not None:
            yield verdict
        time.sleep(EVERY_S)
