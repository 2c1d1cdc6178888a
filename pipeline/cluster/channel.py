"""Events from a worker to the driver, and the wish to stop the other way: one small actor beside the driver.

A worker's thread hands its lines over every `EVERY_S`, so that the training thread never waits; lines are JSON, so that
the actor's process loads nothing but Ray.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

EVERY_S = 0.25
MOST_LINES = 20_000  # held for a driver that does not read; beyond it the oldest go


class _Channel:
    """What runs in the actor."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=MOST_LINES)
        self.stopping = False

    def put(self, lines: list[str]) -> bool:
        self.lines.extend(lines)
        return self.stopping

    def take(self, stop: bool) -> list[str]:
        self.stopping = self.stopping or stop
        taken, self.lines = list(self.lines), deque(maxlen=MOST_LINES)
        return taken


def open_channel() -> Any:
    """A channel's handle; the actor lives on the driver's node and ends with the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": 3, "scheduling_strategy": here}
    return ray.remote(_Channel).options(**options).remote()


class Speaker:
    """A worker's end: `say` costs nothing, a thread does the rest; `stopping` says whether the driver wants to stop."""

    def __init__(self, channel: Any) -> None:
        self.stopping = False
        self._channel = channel
        self._lines: deque[str] = deque()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="speaker", daemon=True)
        self._thread.start()

    def say(self, line: str) -> None:
        self._lines.append(line)

    def close(self) -> None:
        """Delivers what is left."""
        self._closed.set()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        last = False
        while not last:
            last = self._closed.wait(EVERY_S)
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            self.stopping = bool(ray.get(self._channel.put.remote(lines))) or self.stopping


def listen(channel: Any, alive: threading.Thread, stop: Callable[[], bool]) -> Iterator[str]:
    """The driver's end: lines as they come, until the thread `alive` ends. A wish to stop goes back."""
    while True:
        ended = not alive.is_alive()
        yield from ray.get(channel.take.remote(bool(stop())))
        if ended:
            return
        time.sleep(EVERY_S)
