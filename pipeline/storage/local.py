"""What only a local disk needs: atomic replacement, synced folders, a walk that ends."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO

from pipeline.storage.urls import Entry

NO_FILE = -1


def _walk(folder: str, prefix: str, above: tuple[tuple[int, int], ...], odd: bool = False) -> Iterator[Entry]:
    """odd: also what is neither file nor folder (a broken link, a device, a fifo), with the size NO_FILE."""
    try:
        status = os.stat(folder)
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry.path, f"{prefix}{entry.name}/", (*above, here), odd)
        elif entry.is_file():
            yield Entry(prefix + entry.name, entry.stat().st_size)
        elif odd:
            yield Entry(prefix + entry.name, NO_FILE)


NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # what file systems without them say


@contextlib.contextmanager
def _replacing(path: str, *, new: bool = False) -> Iterator[IO[bytes]]:
    """A file that takes the name `path` when the block ends well, and leaves nothing when it does not. new: only where
    the name is not taken (FileExistsError).
    """
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".writing-", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.fsync(file.fileno())
        _name(temporary, path) if new else os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = path  # a full disk, a quota: the system does not say of which file
        raise
    sync_folder(folder)


def _name(temporary: str, path: str) -> None:
    """As os.replace, but of two at once one has FileExistsError, where the file system has links."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from None
        os.replace(temporary, path)
    else:
        os.unlink(temporary)


def sync_folder(path: str | Path) -> None:
    """Waits until the names in a local folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@lru_cache(maxsize=1)
def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
