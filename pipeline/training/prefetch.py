"""This rank's batches, read one step ahead of the training."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from pipeline.data.reading.stream import Batch
from pipeline.training.task import Batches


class Prefetcher:
    """Reads steps `step` + 1 to `last` in a thread, each while the one before it is trained on.

    count: this rank's logical shards.
    """

    def __init__(self, open_batches: Callable[[int], Batches], step: int, last: int, count: int) -> None:
        self._batches, self._left, self._count = open_batches(step), last - step, count
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: Future[list[Batch]] | None = None
        self._ahead()

    def _ahead(self) -> None:
        self._left -= 1
        if self._left >= 0:
            self._next = self._pool.submit(lambda: list(islice(self._batches, self._count)))

    def read(self) -> tuple[list[Batch], float]:
        """The next step's batches, and the seconds that were waited for them."""
        assert self._next is not None, "a reader is open for the steps that are left, at least one"
        start = time.perf_counter()
        batches = self._next.result()
        waited = time.perf_counter() - start
        self._ahead()
        return batches, waited

    def close(self) -> None:
        """Waits for what is being read."""
        self._pool.shutdown(cancel_futures=True)
        self._batches.close()
