"""What a training says on a terminal that is none: one clean line at a time."""

import io

import pytest
from rich.console import Console
from rich.progress import Progress

from jobs import cli, progress
from jobs.progress import Bar, bar
from jobs.terminal import Terminal
from pipeline.training import events as say


def test_every_event_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "console", Console(width=80, highlight=False, force_terminal=False))
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    monkeypatch.setattr(progress, "console", cli.console)
    with bar("train", 200, "images") as live:
        terminal = Terminal(live)
        for event in (
            say.Started(0, 0, 20, 200, 10, 1, 1234, "fp32", None, ("step 9 is damaged",)),
            say.Step(2, 20, {"loss": 0.5}),
            say.Evaluated(2, 20, {"held_out/bits_per_dim": 3.5, "held_out/standard_error": 0.01}),
            say.CheckpointFailed(2, 20, "/x/step-2", "no [space] left", False),
            say.Hung(3, 30, "rank 1 gave no sign for 12 s", "/x/logs/hung.txt"),
            say.Step(4, 40, {"loss": 0.25}),
        ):
            terminal.handle(event)
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("  ") for line in lines)
    assert "\x1b" not in "".join(lines)
    told = [line.strip() for line in lines if not line.strip().startswith("train:")]
    assert told == [
        "not used: step 9 is damaged",
        "1,234 parameters, batch 10, 1 worker, from the start",
        "/x/step-2 not saved: no [space] left; training goes on",
        "workers stood still, and start anew: rank 1 gave no sign for 12 s; stacks in /x/logs/hung.txt",
    ]
    assert lines[-1].startswith("  train: 40/200 images, ")
    assert lines[-1].endswith("loss 0.2500, held-out 3.500 ± 0.010 bits/dim")


def test_the_time_left_is_known_after_the_second_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the start took, and however rare the points of the loss curve are."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress(console=Console(file=io.StringIO(), force_terminal=True)) as shown:
        live = Bar("train", 10_000, "images", shown)
        terminal = Terminal(live)

        def left(at_s: float, event: say.Event) -> str:
            now[0] = at_s
            terminal.handle(event)
            return shown.tasks[0].fields["left"]

        assert left(60, say.Started(0, 0, 100, 10_000, 100, 1, 1, "fp32")) == ""
        assert left(100, say.Moved(1, 100)) == ""
        assert left(101, say.Moved(2, 200)) == "1:38 left"
        assert shown.tasks[0].completed == 200
        assert left(103, say.Moved(4, 400)) == "1:36 left"
        assert left(200, say.Finished(100, 10_000, "budget", "x")) == ""
    assert [progress._clock(seconds) for seconds in (7.2, 59.6, 7405)] == ["7 s", "1:00", "2:03:25"]
