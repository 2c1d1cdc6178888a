"""The ends of a training: each with its reason, alike on every rank, and gone on from where a limit is raised."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.diffusion.denoiser import Denoiser
from pipeline.storage.lease import Lost
from pipeline.training import checkpoint
from pipeline.training import events as say
from pipeline.training.loop import RunError, standing, train
from pipeline.training.step import Place
from pipeline.training.task import HeldOut, Hooks
from tests.training.runs import BATCH, digests, spawn, task


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def course(store: Path, bits: list[float] | None = None, **over: Any) -> list[say.Event]:
    """A training of 6 steps; bits: what the evaluations find, one after the other."""
    left = iter(bits or [])

    def evaluate(denoiser: Denoiser, place: Place) -> HeldOut:
        column = torch.zeros(4, 1, dtype=torch.float64)
        return HeldOut(torch.full((4,), next(left), dtype=torch.float64), column, column)

    hooks = Hooks(evaluate) if bits else Hooks()
    return list(train(task(str(store), hooks=hooks, **{"images": 6 * BATCH, "evaluate_raw": False, **over})))


def end(events: list[say.Event]) -> tuple[str, int]:
    last = events[-1]
    assert isinstance(last, say.Finished)
    return last.reason, last.step


def test_a_number_of_steps(tmp_path: Path) -> None:
    assert end(course(tmp_path / "a", max_steps=4)) == ("max_steps", 4)
    assert [type(event) for event in course(tmp_path / "a", max_steps=4)] == [say.Started, say.Finished]
    assert end(course(tmp_path / "a", max_steps=5)) == ("max_steps", 5)
    assert end(course(tmp_path / "a")) == ("budget", 6)
    course(tmp_path / "b")
    assert digests(str(tmp_path / "a"), 6) == digests(str(tmp_path / "b"), 6), "a limit changes no law"


def test_hours_count_restarts(tmp_path: Path) -> None:
    first = course(tmp_path, max_steps=2)
    assert isinstance(first[-1], say.Finished)
    assert first[-1].complete
    spent = checkpoint.read(str(tmp_path), 2).facts["seconds"]
    assert spent > 0
    assert end(course(tmp_path, max_hours=0.999 * spent / 3600)) == ("max_hours", 2), "they are over already"
    assert end(course(tmp_path, max_hours=(spent + 1e-3) / 3600)) == ("max_hours", 3)
    assert checkpoint.read(str(tmp_path), 3).facts["seconds"] >= spent + 1e-3
    assert end(course(tmp_path, max_hours=1.0)) == ("budget", 6)


def test_a_target(tmp_path: Path) -> None:
    every: dict[str, Any] = {"evaluate_every_images": 2 * BATCH, "target_bits_per_dim": 3.0, "images": 8 * BATCH}
    events = course(tmp_path, [4.0, 3.0], **every)
    assert end(events) == ("target", 4)
    assert sum(isinstance(event, say.Evaluated) for event in events) == 2, "it is not measured again at the end"
    assert end(course(tmp_path, [], **every)) == ("target", 4)
    assert end(course(tmp_path, [3.0, 2.0], **{**every, "target_bits_per_dim": 2.5})) == ("target", 6)


def test_standing_says_which_end_it_is(tmp_path: Path) -> None:
    over: dict[str, Any] = {"images": 6 * BATCH, "max_steps": 4}
    made = task(str(tmp_path), **over)
    assert standing(made.config, BATCH, made.store, made.identity, {}) is None
    events = list(train(made))
    assert standing(made.config, BATCH, made.store, made.identity, {}) == events[-1]
    longer = task(str(tmp_path), **{**over, "max_steps": 5})
    assert standing(longer.config, BATCH, longer.store, longer.identity, {}) is None


def test_an_output_that_another_job_took_over_ends_it(tmp_path: Path) -> None:
    """Its checkpoints are refused from then on, and it says so in place of training on for nothing."""
    asked: list[int] = []
    each = 0

    def commit() -> None:
        asked.append(1)
        if each and len(asked) > each:
            raise Lost("taken over by another job")

    hooks = Hooks(commit=commit)
    list(train(task(str(tmp_path / "one"), hooks=hooks, images=2 * BATCH, checkpoint_every_images=2 * BATCH)))
    each = len(asked)
    asked.clear()
    with pytest.raises(RunError, match="taken over by another job"):
        list(train(task(str(tmp_path / "run"), hooks=hooks, images=9 * BATCH, checkpoint_every_images=2 * BATCH)))
    assert len(asked) == each + 1, "for every file and the record of the first checkpoint, once for the second"
    assert checkpoint.committed(str(tmp_path / "run")) == [2]
    assert checkpoint.folders(str(tmp_path / "run")).keys() == {2}


def test_every_rank_stops_for_one(tmp_path: Path) -> None:
    """The hours are up by rank 0's clock; both ranks say the same and the run goes on to its end."""
    ranks = spawn(str(tmp_path / "run"), 2, images=4 * BATCH, max_hours=1e-9)
    assert [end(events) for events in ranks] == [("max_hours", 1)] * 2
    assert end(course(tmp_path / "run", images=4 * BATCH)) == ("budget", 4)
