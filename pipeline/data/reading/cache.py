"""What readers keep: verified shards in a process's memory, and shard bytes on a node's disk for all its processes.

Both are bounded in bytes. The disk's copy is only a shortcut to the store: a file is named by its digest and read
back against it, so that one cut off by a kill or a full disk counts as absent. Whoever fetches a shard holds a lock
(flock, which the kernel drops with the process), so that two processes of a node fetch it once.
"""

import contextlib
import errno
import fcntl
import os
import re
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline import storage

UInt8s = NDArray[np.uint8]

_NAME = re.compile(r"[0-9a-f]{64}")


class _Sized(Protocol):
    @property
    def data(self) -> UInt8s: ...


S = TypeVar("S", bound=_Sized)


class MemoryCache(Generic[S]):
    """The values used last, up to a number of bytes; two threads that want the same one make it once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kept: OrderedDict[str, S] = OrderedDict()
        self.bytes = 0
        self.making: dict[str, threading.Lock] = {}

    def get(self, name: str, limit: int, make: Callable[[], S]) -> S:
        """The value, from memory or made; at most `limit` bytes stay afterwards."""
        found = self._kept(name)
        if found is not None:
            return found
        with self.lock:
            turn = self.making.setdefault(name, threading.Lock())
        with turn:
            found = self._kept(name)
            if found is not None:
                return found
            try:
                made = make()
            finally:
                with self.lock:
                    self.making.pop(name, None)
            with self.lock:
                self.kept[name] = made
                self.bytes += len(made.data)
                while self.kept and self.bytes > limit:
                    _, dropped = self.kept.popitem(last=False)
                    self.bytes -= len(dropped.data)
            return made

    def clear(self) -> None:
        """Forgets everything."""
        with self.lock:
            self.kept.clear()
            self.bytes = 0

    def _kept(self, name: str) -> S | None:
        with self.lock:
            found = self.kept.get(name)
            if found is not None:
                self.kept.move_to_end(name)
            return found


def default_folder() -> Path:
    """The cache of this user on this node."""
    return Path(tempfile.gettempdir(), f"raydiffusion-shards-{os.getuid()}")


class DiskCache:
    """Files of a folder named by their sha256, the last used ones, up to a number of bytes.

    A folder that another user owns is refused. A full or read-only disk means no cache, never an error.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def get(self, sha256: str, size: int, fetch: Callable[[], UInt8s]) -> UInt8s:
        """The bytes with this digest, from the disk or by `fetch` (whose bytes are kept only if the digest agrees)."""
        if size > self.limit or not self._ready():
            return fetch()
        path = self.folder / sha256
        found = _read(path, size, sha256)
        if found is not None:
            return found
        with self._turn(sha256):
            found = _read(path, size, sha256)
            if found is not None:
                return found
            data = fetch()
            if storage.digest(data) == sha256:
                with contextlib.suppress(OSError):  # ENOSPC, a quota, a folder that went away: not kept
                    self._keep(path, data)
            return data

    def _ready(self) -> bool:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return os.stat(self.folder, follow_symlinks=False).st_uid == os.getuid() and not self.folder.is_symlink()
        except OSError:
            return False

    def _keep(self, path: Path, data: UInt8s) -> None:
        with self._turn("room"):  # so that the bound holds whoever else writes, and any .part is a killed writer's
            self._make_room(len(data))
            part = path.with_suffix(".part")
            try:
                part.write_bytes(data.data)
                part.replace(path)
            except OSError:
                part.unlink(missing_ok=True)
                raise

    def _make_room(self, size: int) -> None:
        """Drops what killed processes left, then what was used longest ago until `size` bytes more fit."""
        files: list[tuple[int, int, str]] = []
        with os.scandir(self.folder) as found:
            for entry in found:
                if _NAME.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        files.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
                elif entry.name.endswith(".part"):
                    os.unlink(entry.path)
                elif entry.name.endswith(".lock") and entry.name != "room.lock":
                    self._drop_if_abandoned(entry.path)
        total = sum(length for _, length, _ in files) + size
        for _, length, name in sorted(files):
            if total <= self.limit:
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            total -= length

    @staticmethod
    def _drop_if_abandoned(path: str) -> None:
        with contextlib.suppress(OSError):  # held by someone, or gone
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
            finally:
                os.close(handle)

    @contextlib.contextmanager
    def _turn(self, name: str) -> Iterator[None]:
        """Holds a lock that dies with the process; no lock where the disk gives none."""
        path = self.folder / f"{name}.lock"
        while True:
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOENT):
                    raise
                yield
                return
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                if not _same_file(handle, path):
                    continue  # someone dropped the lock file while we waited: take the new one
                try:
                    yield
                finally:
                    with contextlib.suppress(OSError):
                        os.unlink(path)
                return
            finally:
                os.close(handle)


def _same_file(handle: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    here = os.fstat(handle)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _read(path: Path, size: int, sha256: str) -> UInt8s | None:
    """The file's bytes if it is there and has its digest; a damaged one is dropped."""
    try:
        data = storage.read_array(str(path), size + 1)
    except OSError:
        return None
    if storage.digest(data) != sha256:
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return data
