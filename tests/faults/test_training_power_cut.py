"""A power cut at every operation of a save and its pruning: what was synced is there, anything else may be or not.

The operations are recorded from a real save. The disk after a cut is built from them: contents that were synced, and
names in folders that were synced after the name came or went. Of the changes that were not, none, all, one alone and
all but one are taken.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.training import checkpoint
from pipeline.training.retention import Keep, prune
from tests.training.test_checkpoint import same, state

Change = tuple[str, str | None]  # a path, and the file's content by number, or None where the name went


@dataclass
class Disk:
    """Durable names, and changes of names that no sync of their folder has made durable yet."""

    names: dict[str, str | None] = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)

    def sync(self, folder: str) -> None:
        for change in [c for c in self.pending if os.path.dirname(c[0]) == folder]:
            self.pending.remove(change)
            self.apply(self.names, change)

    @staticmethod
    def apply(names: dict[str, str | None], change: Change) -> None:
        names[change[0]] = change[1]

    def after_a_cut(self) -> Iterator[dict[str, str | None]]:
        """Names with the content that they lead to."""
        every = self.pending
        choices = [[], every, *([c] for c in every), *([d for d in every if d is not c] for c in every)]
        for taken in choices:
            names = dict(self.names)
            for change in taken:
                self.apply(names, change)
            yield {
                path: content for path, content in names.items() if content is not None and self.reachable(names, path)
            }

    @staticmethod
    def reachable(names: dict[str, str | None], path: str) -> bool:
        parent = os.path.dirname(path)
        return parent == "" or (names.get(parent) is not None and Disk.reachable(names, parent))


class Recorder:
    """Follows a folder's operations; `contents` are what was synced of files, by their number."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, cut: Callable[[Disk], None]) -> None:
        self.root, self.disk, self.cut = str(root), Disk(), cut
        self.contents: dict[str, bytes] = {"folder": b""}
        self.synced: dict[str, str] = {}
        for name in ("fsync", "replace", "link", "unlink", "rmdir", "mkdir"):
            monkeypatch.setattr(os, name, self.followed(getattr(os, name), getattr(self, name)))

    def followed(self, call: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
        def followed(*args: Any, **options: Any) -> Any:
            folder = options.get("dir_fd")
            above = "" if folder is None else os.readlink(f"/proc/self/fd/{folder}") + "/"
            path = os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else above + os.fspath(args[0])
            found = call(*args, **options)
            note(path, *(os.fspath(arg) for arg in args[1:2] if isinstance(arg, str | os.PathLike)))
            self.cut(self.disk)
            return found

        return followed

    def inside(self, path: str) -> str:
        return os.path.relpath(path, self.root).removeprefix(".")

    def fsync(self, path: str) -> None:
        if os.path.isdir(path):
            self.disk.sync(self.inside(path))
            return
        number = str(len(self.contents))
        self.contents[number] = Path(path).read_bytes()
        self.synced[path] = number

    def replace(self, path: str, to: str) -> None:
        self.disk.pending.append((self.inside(to), self.synced[path]))

    link = replace

    def unlink(self, path: str) -> None:
        self.disk.pending.append((self.inside(path), None))

    def mkdir(self, path: str) -> None:
        self.disk.pending.append((self.inside(path), "folder"))

    rmdir = unlink


def disks_and_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """How many disks a power cut can leave, and how many of them have lost a checkpoint that was committed."""
    root = tmp_path / "store"
    root.mkdir()
    committed, disks = [0], set[tuple[int, frozenset[tuple[str, str]]]]()

    def cut(disk: Disk) -> None:
        for names in disk.after_a_cut():
            disks.add((committed[0], frozenset((path, str(content)) for path, content in names.items())))

    with monkeypatch.context() as patched:
        recorder = Recorder(root, patched, cut)
        for step in (1, 2, 3):
            checkpoint.write(str(root), state(step))
            committed[0] = step
            prune(str(root), Keep(1))
    losses = 0
    for number, (step, names) in enumerate(disks):
        store = tmp_path / f"{number}"
        for path, content in names:
            if content != "folder":
                (store / path).parent.mkdir(parents=True, exist_ok=True)
                (store / path).write_bytes(recorder.contents[content])
        found, rejected = checkpoint.newest(str(store))
        losses += bool(rejected) or (0 if found is None else found.step) < step
        assert found is None or same(found, state(found.step))
    return len(disks), losses


def test_a_power_cut_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disks, losses = disks_and_losses(tmp_path, monkeypatch)
    print(f"{disks} disks that a power cut can leave, {losses} that have lost a checkpoint")
    assert disks > 50
    assert losses == 0


def test_it_would_without_the_syncs_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_sync", lambda url: None)
    _, losses = disks_and_losses(tmp_path, monkeypatch)
    assert losses > 0
