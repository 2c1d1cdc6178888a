"""Reading ahead: one step, not beyond the last one, and what went wrong comes out where it is needed."""

import threading
import time
from collections.abc import Iterator

import pytest

from pipeline.data.reading.stream import Batch
from pipeline.training.prefetch import Prefetcher
from tests.training.runs import batch_of


class Slow:
    """Two shards a step, each of which takes a moment; counts what was read."""

    def __init__(self, takes_s: float = 0.0, bad: int | None = None) -> None:
        self.takes_s, self.bad, self.read, self.closed = takes_s, bad, 0, False
        self.threads: set[str] = set()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        time.sleep(self.takes_s)
        self.threads.add(threading.current_thread().name)
        if self.read == self.bad:
            raise OSError("the store is gone")
        self.read += 1
        return batch_of((self.read - 1) // 2, (self.read - 1) % 2)

    def close(self) -> None:
        self.closed = True


def test_the_next_step_is_read_during_this_one() -> None:
    """Reading takes 40 ms a step, the step 80: the training waits for the first one alone."""
    source = Slow(0.02)
    reader = Prefetcher(lambda step: source, 0, 6, 2)
    waits: list[float] = []
    for step in range(6):
        batches, waited = reader.read()
        assert [(batch.step, batch.logical_shard) for batch in batches] == [(step, 0), (step, 1)]
        waits.append(waited)
        time.sleep(0.08)
        assert source.read == min(2 * (step + 2), 12), "one step ahead, and none after the last"
    reader.close()
    assert source.closed
    assert waits[0] > 0.03
    assert sum(waits[1:]) < 0.02 * 5 * 0.08, waits
    assert source.threads == {"batches_0"}


def test_a_failure_comes_with_its_own_step() -> None:
    reader = Prefetcher(lambda step: Slow(bad=2), 0, 6, 2)
    reader.read()
    with pytest.raises(OSError, match="the store is gone"):
        reader.read()
    reader.close()
