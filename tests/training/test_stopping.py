"""Signals, as terminals and wrappers send them: twice, late, and with the terminal gone."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.training import checkpoint, stopping
from pipeline.training import events as say
from pipeline.training.loop import train
from pipeline.training.stopping import WAIT, stop_on_signals
from tests.training.runs import BATCH, task

ROOT = Path(__file__).parents[2]
TRAINING = """
import sys
import torch
from jobs.progress import bar
from jobs.terminal import Terminal
from pipeline.training import stopping
from pipeline.training.loop import Hooks, train
from tests.training.runs import BATCH, task
torch.set_num_threads(1)
store, stopping.WISH_S = sys.argv[1], float(sys.argv[2])
with stopping.stop_on_signals() as stop, bar("train", 100_000, "images") as live:
    terminal = Terminal(live)
    for event in train(task(store, hooks=Hooks(stop=stop), images=10**6, checkpoint_every_minutes=0)):
        terminal.handle(event)
        if event.step == 3:
            open(store + "-began", "w").close()
"""


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_signals_close_together_are_one_wish(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stopping, "WISH_S", 0.3)
    heard: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as stop:  # noqa: PT012
        assert not stop()
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            send(number)
            heard.append(number)
        assert stop()
        assert WAIT not in capfd.readouterr().err
        time.sleep(0.35)
        send(signal.SIGINT)
        send(signal.SIGINT)
        heard.append(0)
        assert capfd.readouterr().err.count(WAIT) == 1
        time.sleep(0.35)
        send(signal.SIGINT)
        heard.append(1)
    assert len(heard) == 5, "the third wish interrupts, and nothing before it"
    assert signal.getsignal(signal.SIGINT) is before


def test_what_belongs_to_the_wish_may_come_when_the_training_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "WISH_S", 0.3)
    began = time.monotonic()
    with stop_on_signals():
        send(signal.SIGINT)
    assert time.monotonic() - began >= 0.3
    with stop_on_signals() as outer, stop_on_signals() as inner:
        send(signal.SIGTERM)
        assert inner()
        assert outer()


def test_an_ignored_signal_stays_ignored() -> None:
    """As `nohup` starts a process."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            send(signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)


class Training:
    """A training in a process of its own, at a terminal of its own, a few steps on its way."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.terminal, slave = pty.openpty()
        command = ["setsid", "--ctty", sys.executable, "-c", TRAINING, str(store), "1.0"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)

    def wait_for_steps(self) -> None:
        end = time.monotonic() + 60
        while not Path(f"{self.store}-began").exists():
            assert self.process.poll() is None, os.read(self.terminal, 10_000).decode()
            assert time.monotonic() < end
            time.sleep(0.02)
        assert checkpoint.committed(str(self.store)) == []


def test_a_training_saves_where_its_wrapper_signals_twice_and_where_its_terminal_closes(tmp_path: Path) -> None:
    twice, closed = Training(tmp_path / "twice"), Training(tmp_path / "closed")
    try:
        closed.wait_for_steps()
        os.close(closed.terminal)  # the kernel sends SIGHUP, and every write fails from now on
        twice.wait_for_steps()
        twice.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        twice.process.send_signal(signal.SIGINT)
        for each in (closed, twice):
            assert each.process.wait(30) == 0
            assert checkpoint.committed(str(each.store))[0] >= 3
    finally:
        for each in (closed, twice):
            each.process.kill()
            each.process.wait()
        os.close(twice.terminal)


def test_a_checkpoint_by_time(tmp_path: Path) -> None:
    def saves(name: str, minutes: float) -> list[int]:
        given = {"images": 2 * BATCH, "checkpoint_every_minutes": minutes}
        events = list(train(task(str(tmp_path / name), **given)))
        return [event.step for event in events if isinstance(event, say.CheckpointBegun)]

    assert saves("by time", 1e-9) == [1, 2]
    assert saves("never", 0.0) == [2]
    assert task("x").config.checkpoint_every_minutes == 10.0
