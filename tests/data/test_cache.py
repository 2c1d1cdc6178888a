"""The node's cache on disk: bounded, shared, and never trusted."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline import storage
from pipeline.data.reading import cache
from pipeline.data.reading.cache import DiskCache


def blob(i: int, size: int = 10_000) -> tuple[str, np.ndarray]:
    data = np.random.default_rng(i).integers(0, 256, size, dtype=np.uint8)
    return storage.digest(data), data


def test_kept_verified_bounded(tmp_path: Path) -> None:
    kept = DiskCache(tmp_path / "cache", 35_000)
    fetched: list[int] = []

    def get(i: int) -> np.ndarray:
        name, data = blob(i)
        return kept.get(name, len(data), lambda: (fetched.append(i), data)[1])

    for i in (0, 1, 0, 1, 2, 0):
        assert np.array_equal(get(i), blob(i)[1])
        time.sleep(0.002)
    assert fetched == [0, 1, 2]
    get(3)  # drops 1, which was used longest ago
    names = {p.name for p in (tmp_path / "cache").iterdir()}
    assert names == {blob(i)[0] for i in (0, 2, 3)}
    path = tmp_path / "cache" / blob(0)[0]
    for bad in (b"", path.read_bytes()[:-1], b"x" * 10_000, path.read_bytes() + b"x"):
        path.write_bytes(bad)
        fetched.clear()
        assert np.array_equal(get(0), blob(0)[1])
        assert fetched == [0]
    kept.get("0" * 64, 3, lambda: np.zeros(3, np.uint8))  # wrong bytes are handed out and not kept
    assert not (tmp_path / "cache" / ("0" * 64)).exists()
    assert DiskCache(tmp_path / "cache", 100).get(*blob(9)[:1], 10_000, lambda: blob(9)[1]) is not None


def test_a_full_disk_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: object) -> None:
        with open(self, "wb") as file:
            file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    name, data = blob(0)
    assert np.array_equal(DiskCache(tmp_path, 1 << 20).get(name, len(data), lambda: data), data)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    assert np.array_equal(DiskCache(tmp_path, 1 << 20).get(name, len(data), lambda: data), data)


def test_a_folder_of_another_kind_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").write_bytes(b"")
    name, data = blob(0)
    for place in ("link", "file"):
        assert np.array_equal(DiskCache(tmp_path / place, 1 << 20).get(name, len(data), lambda: data), data)
    assert list((tmp_path / "real").iterdir()) == []


def worker(folder: str, log: str, seed: int) -> None:
    kept = DiskCache(Path(folder), 100_000)
    for i in np.random.default_rng(seed).permutation(np.repeat(np.arange(8), 5)).tolist():
        name, data = blob(i)

        def fetch(i: int = i, data: np.ndarray = data) -> np.ndarray:
            with open(log, "a") as file:
                file.write(f"{i}\n")
            time.sleep(0.01)
            return data

        assert np.array_equal(kept.get(name, len(data), fetch), data)


def test_processes_fetch_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    log = tmp_path / "log"
    log.touch()
    running = [context.Process(target=worker, args=(str(tmp_path / "cache"), str(log), seed)) for seed in range(3)]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(log.read_text().split()) == [str(i) for i in range(8)]
    assert {p.name for p in (tmp_path / "cache").iterdir()} == {blob(i)[0] for i in range(8)}


def test_a_killed_writer_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    name, data = blob(0)
    code = f"""
import sys, time, numpy as np
from pathlib import Path
from pipeline.data.reading.cache import DiskCache
def slow(self, data):
    open(self, "wb").write(b"half")
    print("writing", flush=True)
    time.sleep(60)
Path.write_bytes = slow
data = np.random.default_rng(0).integers(0, 256, 10_000, dtype=np.uint8)
DiskCache(Path({str(tmp_path)!r}), 1 << 20).get({name!r}, 10_000, lambda: data)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".lock", ".lock", ".part"]
    kept = DiskCache(tmp_path, 1 << 20)
    assert np.array_equal(kept.get(name, len(data), lambda: data), data)
    other, more = blob(1)
    kept.get(other, len(more), lambda: more)
    assert {p.name for p in tmp_path.iterdir()} == {name, other}
    assert cache.default_folder().name.endswith(str(os.getuid()))
