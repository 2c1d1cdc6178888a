"""Reads that fall silent are asked for again, and the first answer counts: one stalled connection would hold up a whole
ordered stream, and stores do stall (Dean and Barroso, "The tail at scale", CACM 56(2), 2013).

A read is silent when nothing came for SILENT_TIMES the median time after which the last reads began to be answered,
however long its body takes, and twice as long for each further request. Requests beside a silent one stay a small share
of all, so that a store that is slow as a whole is not asked for more.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait

SILENT_TIMES, SILENT_LEAST_S, SILENT_FIRST_S = 4.0, 0.03, 1.0  # the last: before any read was answered
MOST_AT_ONCE = 4  # requests of one read
SHARE, SAVED_UP = 0.1, 16.0  # requests that may be made a read beside silent ones; how many are saved up at most

Fetch = Callable[[Callable[[], None]], bytes]  # calls its argument whenever something came


class Hedge:
    """Asks for the reads of a process.

    Attributes:
        asked_again: how many requests were made beside a silent one.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.waits: deque[float] = deque(maxlen=64)  # seconds to the first sign of an answer
        self.allowed = SAVED_UP
        self.asked_again = 0

    def run(self, fetch: Fetch) -> bytes:
        """What `fetch` returns; raises what the first of its runs to end raised. Those that lost end by themselves."""
        tries = [_Try(fetch)]
        while True:
            more = len(tries) < MOST_AT_ONCE and self.allowed >= 1
            left = self._patience() * 2 ** (len(tries) - 1) - tries[-1].silent_s if more else None
            if left is not None and left <= 0:
                with self.lock:
                    self.allowed -= 1
                    self.asked_again += 1
                tries.append(_Try(fetch))
                continue
            wait([each.data for each in tries], left, FIRST_COMPLETED)
            ended = [each for each in tries if each.data.done()]
            if ended:
                best = next((each for each in ended if each.data.exception() is None), ended[0])
                data = best.data.result()
                self._answered(best.wait_s)
                return data

    def _patience(self) -> float:
        with self.lock:
            typical = sorted(self.waits)[len(self.waits) // 2] if self.waits else None
        return SILENT_FIRST_S if typical is None else max(SILENT_LEAST_S, SILENT_TIMES * typical)

    def _answered(self, wait_s: float) -> None:
        with self.lock:
            self.waits.append(wait_s)
            self.allowed = min(SAVED_UP, self.allowed + SHARE)


class _Try:
    """One request, in a thread that nobody waits for: an executor would wait for a stalled one when Python ends.

    Attributes:
        wait_s: seconds until something came, 0 before.
    """

    def __init__(self, fetch: Fetch) -> None:
        self.data: Future[bytes] = Future()
        self.began = self.heard = time.monotonic()
        self.wait_s = 0.0
        threading.Thread(target=self._work, args=(fetch,), name="s3-read", daemon=True).start()

    @property
    def silent_s(self) -> float:
        """Seconds since something came."""
        return time.monotonic() - self.heard

    def _work(self, fetch: Fetch) -> None:
        try:
            self.data.set_result(fetch(self._hear))
        except BaseException as error:
            self.data.set_exception(error)

    def _hear(self) -> None:
        self.heard = time.monotonic()
        self.wait_s = self.wait_s or self.heard - self.began
