"""A disk that is full while a checkpoint is written: the training goes on, what was there stays, the alarm is raised.

As root on a small file system in memory that a file fills up; else with a limit on the size of the process's files.
"""

import json
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pipeline.training import checkpoint
from pipeline.training import events as say
from pipeline.training.loop import train
from pipeline.training.step import Place
from tests.training.runs import BATCH, in_group, task

DISK_BYTES = 4 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of DISK_BYTES, or a plain folder where that takes more rights."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    yield folder
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path) -> None:
    if not os.path.ismount(disk):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        return
    with suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def free(disk: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    (disk / "filler").unlink(missing_ok=True)


def course(place: Place, tell: Callable[[str], Any], disk: str) -> None:
    """Full from the checkpoint of step 4 on until it failed."""
    store = f"{disk}/checkpoints"
    over: dict[str, Any] = {"images": 12 * BATCH, "checkpoint_every_images": 4 * BATCH, "keep": 1}
    for event in train(task(store, place, **over)):
        if isinstance(event, say.CheckpointSaved) and event.step == 4:
            fill(Path(disk))
        if isinstance(event, say.CheckpointFailed):
            tell(json.dumps([event.step, event.reason, checkpoint.committed(store), os.listdir(store)]))
            free(Path(disk))
    tell(json.dumps(checkpoint.committed(store)))


def test_the_training_goes_on(disk: Path) -> None:
    said = in_group(str(disk.parent / "group"), 1, course, str(disk))
    (step, reason, committed, folders), end = (json.loads(line) for line in said[0].splitlines())
    print(f"step {step}: {reason}")
    assert step == 8
    assert "No space left" in reason if os.path.ismount(disk) else "File too large" in reason
    assert committed == [4]
    assert folders == ["step-000000004"], "what the failed save had written was given back"
    assert end == [12]
