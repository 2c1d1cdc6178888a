"""A process that ends at every write, fsync, rename, delete and upload of saving, committing and pruning.

Each death is `os._exit` in a process of its own, before the operation or in the middle of it; the loader, in another
process, must find a checkpoint no older than the one before. A power cut is played on a model of a disk that keeps only
what was synced.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import storage
from pipeline.storage import s3
from pipeline.training import checkpoint
from pipeline.training.checkpoint import State
from pipeline.training.retention import Keep
from pipeline.training.saver import Saver
from tests.training.runs import PROCESSES

DIED, BROKEN = 77, 99
KEEP = Keep(1, best=1)
BITS = {1: 2.0, 2: 4.0, 3: 3.0, 4: 5.0}  # the best is the first one, so that it stays


def state(step: int) -> State:
    torch.manual_seed(step)
    tensors = {stem: {"w": torch.randn(40, 50)} for stem in ("model", "ema", "optimizer")}
    return State(step, tensors, {"images": step, "bits_per_dim": BITS[step], "identity": {}})


def save(store: str, *steps: int) -> None:
    saver = Saver(store, KEEP)
    for step in steps:
        saver.save(state(step))
    outcomes = saver.outcomes(wait=True)
    saver.close()
    assert all(outcome.failure is None for outcome in outcomes), outcomes


class Countdown:
    """Ends the process at the `left`-th operation."""

    def __init__(self, left: int) -> None:
        self.left = left

    def tick(self) -> bool:
        self.left -= 1
        return self.left == 0

    def before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, dying before it is made."""

        def counted(*args: Any, **options: Any) -> Any:
            if self.tick():
                os._exit(DIED)
            return call(*args, **options)

        return counted

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, dying before it or when it was answered."""

        def counted(*args: Any, **options: Any) -> Any:
            if self.tick():
                os._exit(DIED)
            found = call(*args, **options)
            if self.tick():
                os._exit(DIED)
            return found

        return counted


class HalfWritten:
    """A file whose write may be cut in the middle."""

    def __init__(self, file: Any, countdown: Countdown) -> None:
        self.file, self.countdown = file, countdown

    def write(self, data: Any) -> int:
        if self.countdown.tick():
            self.file.write(bytes(data)[: len(data) // 2])
            self.file.flush()
            os._exit(DIED)
        return self.file.write(data)

    def __enter__(self) -> "HalfWritten":
        return self

    def __exit__(self, *given: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def die_on_disk(left: int) -> None:
    """From now on the process counts its operations on files."""
    countdown = Countdown(left)
    for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, countdown.before(getattr(os, name)))
    fdopen = os.fdopen
    os.fdopen = lambda *args, **options: HalfWritten(fdopen(*args, **options), countdown)  # pyright: ignore


def die_on_s3(left: int) -> None:
    countdown = Countdown(left)
    client = s3.client()
    for name in ("put_object", "delete_object"):
        setattr(client, name, countdown.around(getattr(client, name)))


DEATHS: dict[str, Callable[[int], None]] = {"disk": die_on_disk, "s3": die_on_s3}


def in_child(work: Callable[[], int]) -> int:
    """The exit code of a forked process that does `work`."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        code = work()
    except BaseException as error:
        print(repr(error), flush=True)
        code = BROKEN
    os._exit(code)


def enumerate_deaths(where: str, root: str, report: str) -> None:
    """Runs in a process without threads: one line a death, the exit code and the step found after it."""
    torch.set_num_threads(1)
    with open(report, "w") as said:
        for place in range(1, 1000):
            store = f"{root}/{place}"

            def dying(store: str = store, place: int = place) -> int:
                save(store, 1, 2)
                DEATHS[where](place)
                save(store, 3)
                return 0

            code = in_child(dying)
            found = in_child(lambda store=store: loaded(store))
            said.write(f"{code} {found}\n")
            if code != DIED:
                return


def loaded(store: str) -> int:
    """The step of the checkpoint that the loader takes, if it is whole and nothing was rejected, and if the next save
    leaves nothing behind of the one that was cut off.
    """
    found, rejected = checkpoint.newest(store)
    whole = found is not None and torch.equal(found.tensors["ema"]["w"], state(found.step).tensors["ema"]["w"])
    save(store, 4)
    left = {entry.path.split("/")[0] for entry in storage.list_files(store)}
    good = whole and not rejected and left == {"step-000000001", "step-000000004"}
    return found.step if found is not None and good else BROKEN


def check(report: Path, least: int) -> None:
    lines = [tuple(map(int, line.split())) for line in report.read_text().splitlines()]
    *deaths, last = lines
    assert last == (0, 3), "the last one ends without a death"
    assert all(code == DIED for code, _ in deaths)
    assert {found for _, found in deaths} == {2, 3}, deaths
    print(f"{len(deaths)} places to die at")
    assert len(deaths) >= least


def test_on_a_disk(tmp_path: Path) -> None:
    process = PROCESSES.Process(target=enumerate_deaths, args=("disk", str(tmp_path / "store"), f"{tmp_path}/report"))
    process.start()
    process.join(timeout=240)
    check(tmp_path / "report", least=35)


@pytest.mark.slow
def test_on_s3(tmp_path: Path, s3_bucket: str) -> None:
    given = {name: os.environ[name] for name in os.environ if name.startswith("AWS_")}
    process = PROCESSES.Process(target=_on_s3, args=(given, s3_bucket, f"{tmp_path}/report"))
    process.start()
    process.join(timeout=400)
    check(tmp_path / "report", least=20)


def _on_s3(given: dict[str, str], bucket: str, report: str) -> None:
    os.environ.update(given)
    client = s3.client()  # made once, no connection yet: it may cross a fork
    s3.client = lambda: client
    enumerate_deaths("s3", f"{bucket}/checkpoints", report)
