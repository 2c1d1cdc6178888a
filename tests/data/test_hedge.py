"""Reads that fall silent: asked for again, not when they only take long, and never for more than a share of all."""

import threading
import time
from collections.abc import Callable

import pytest

from pipeline.storage import hedge
from pipeline.storage.hedge import Hedge


def answer(heard: Callable[[], None]) -> bytes:
    heard()
    return b"answer"


def warm() -> Hedge:
    """One that has seen reads answered at once, so that silence is SILENT_LEAST_S."""
    made = Hedge()
    for _ in range(9):
        assert made.run(answer) == b"answer"
    return made


@pytest.mark.parametrize("stalls", [1, 2, 3])
def test_stalled_reads_cost_little(stalls: int) -> None:
    under_test, runs, release = warm(), list[int](), threading.Event()

    def fetch(heard: Callable[[], None]) -> bytes:
        runs.append(1)
        if len(runs) <= stalls:
            release.wait(30)
        return answer(heard)

    began = time.monotonic()
    assert under_test.run(fetch) == b"answer"
    assert time.monotonic() - began < 5  # of 30
    assert len(runs) == stalls + 1
    assert under_test.asked_again == stalls
    release.set()


def test_a_long_body_is_not_asked_for_again() -> None:
    under_test = warm()

    def fetch(heard: Callable[[], None]) -> bytes:
        for _ in range(20):
            heard()
            time.sleep(hedge.SILENT_LEAST_S / 5)
        return b"long"

    assert under_test.run(fetch) == b"long"
    assert under_test.asked_again == 0


def test_a_slow_store_is_not_asked_for_much_more() -> None:
    """Every read takes ten times what the median says: no more is asked than was saved up, and the share of it."""
    under_test, runs = warm(), list[int]()

    def fetch(heard: Callable[[], None]) -> bytes:
        runs.append(1)
        time.sleep(10 * hedge.SILENT_LEAST_S)
        return answer(heard)

    readers = [threading.Thread(target=under_test.run, args=(fetch,)) for _ in range(60)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert 60 <= len(runs) <= 60 + hedge.SAVED_UP + 0.1 * 60


def test_an_error_is_raised_at_once_though_another_run_is_silent() -> None:
    under_test, runs, release = warm(), list[int](), threading.Event()

    def fetch(heard: Callable[[], None]) -> bytes:
        runs.append(1)
        if len(runs) == 1:
            release.wait(30)
        raise ConnectionError("reset")

    began = time.monotonic()
    with pytest.raises(ConnectionError, match="reset"):
        under_test.run(fetch)
    assert time.monotonic() - began < 5
    release.set()


def test_a_share_of_all_reads_may_be_asked_again() -> None:
    """What silent reads used up is saved up again, a SHARE a read answered, and no more than SAVED_UP."""
    under_test = warm()
    assert under_test.allowed == hedge.SAVED_UP
    under_test.allowed = 0.0
    for _ in range(30):
        under_test.run(answer)
    assert under_test.allowed == pytest.approx(30 * 0.1)
    assert hedge.SHARE == 0.1, "one request in ten"


def test_nothing_saved_up_nothing_asked_again() -> None:
    under_test, runs = warm(), list[int]()
    under_test.allowed = 0.5

    def fetch(heard: Callable[[], None]) -> bytes:
        runs.append(1)
        time.sleep(5 * hedge.SILENT_LEAST_S)
        return answer(heard)

    under_test.run(fetch)
    assert (len(runs), under_test.asked_again) == (1, 0)
