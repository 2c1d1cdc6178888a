"""Stopping well: a signal asks a training to save and stop; only a third wish interrupts it."""

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

WISH_S = 3.0  # terminals and wrappers such as `timeout` pass a signal on twice: within so many seconds it is one wish
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
WAIT = "a checkpoint is being written; a further signal interrupts it, and loses the work since the one before"

_open: list["_Wishes"] = []  # of this process: a block within a block is the outer one


class _Wishes:
    """Counts the wishes that signals are. asked_s: when the last one began."""

    def __init__(self) -> None:
        self.asked, self.count, self.asked_s = threading.Event(), 0, 0.0

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == getattr(signal, "SIGHUP", None):
            leave_terminal()
        now = time.monotonic()
        if self.count and now - self.asked_s < WISH_S:
            return
        self.count, self.asked_s = self.count + 1, now
        if self.count > 2:
            raise KeyboardInterrupt
        if self.count == 2:
            _say(WAIT)
        self.asked.set()

    def settle(self) -> None:
        """Waits until no part of the last wish can come any more."""
        while self.count and (left := self.asked_s + WISH_S - time.monotonic()) > 0:
            time.sleep(left)


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Within the block SIGINT (Ctrl-C), SIGTERM (a stopped job) and SIGHUP (a closed terminal) make the yielded
    function return True.

    Signals within `WISH_S` of a wish's first belong to it. The second wish says that a checkpoint is being written, the
    third raises KeyboardInterrupt. A signal that the process was started to ignore (`nohup`) stays ignored. Outside the
    main thread, where no handler can be set, the function returns what that of the main thread does.
    """
    if _open or threading.current_thread() is not threading.main_thread():
        yield _open[0].asked.is_set if _open else lambda: False
        return
    wishes = _Wishes()
    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, wishes.on_signal) for number in heard}
    _open.append(wishes)
    try:
        yield wishes.asked.is_set
        wishes.settle()
    finally:
        _open.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_terminal() -> None:
    """What is printed from now on goes nowhere, where it went to a terminal: a closed one fails at every write."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        if _is_terminal(number):
            os.dup2(nowhere, number)
    os.close(nowhere)


def _is_terminal(number: int) -> bool:
    """Also of one that is closed, which no longer says so (EIO)."""
    try:
        os.ttyname(number)
    except OSError as error:
        return error.errno != errno.ENOTTY
    return True


def _say(line: str) -> None:
    """From a signal handler, which must not enter a buffer that is being written."""
    try:
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{line}\n".encode())
    except (OSError, ValueError):
        leave_terminal()
