"""Bytes at a URL: a local path or s3://bucket/key, and nothing else.

Every file the system reads or writes goes through here, so this is where other schemes (`pipe:`, `http:`, `file:`)
and relative paths that leave their root are refused. Writing is atomic: a reader sees the old bytes or the new ones.
"""

import contextlib
import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.storage import s3
from pipeline.storage.local import _replacing, _walk
from pipeline.storage.urls import Entry, is_s3, parse

ONE_PUT_BYTES = 5 << 30
LIST_PAGE = 1000
READS = 8  # of bytes with a wrong digest, before they count as damaged
RANGE_BYTES = 1 << 20  # read at a time by a file over ranges


def digest(data: bytes | bytearray | memoryview | NDArray[np.uint8]) -> str:
    """sha256 in hex."""
    return hashlib.sha256(data.data if isinstance(data, np.ndarray) else data).hexdigest()


def digest_of(url: str) -> str:
    """sha256 in hex of what lies at a URL, read in pieces of 8 MiB."""
    total = hashlib.sha256()
    location = parse(url)
    if location.bucket is None:
        with open(location.path, "rb") as file:
            while piece := file.read(8 << 20):
                total.update(piece)
    else:
        size, at = size_of(url), 0
        while at < size:
            piece = read_bytes(url, at, min(at + (8 << 20), size))
            total.update(piece)
            at += len(piece)
    return total.hexdigest()


def exists(url: str) -> bool:
    """Whether a file (not a folder) lies at the URL."""
    try:
        size_of(url, attempts_if_missing=1)
    except (FileNotFoundError, IsADirectoryError):
        return False
    return True


def size_of(url: str, attempts_if_missing: int = s3.MISSING_ATTEMPTS) -> int:
    """Bytes of the file at the URL.

    Raises:
        FileNotFoundError: nothing there. IsADirectoryError: a local folder.
    """
    location = parse(url)
    if location.bucket is None:
        if os.path.isdir(location.path):
            raise IsADirectoryError(f"{url} is a folder")
        return os.stat(location.path).st_size
    where = {"Bucket": location.bucket, "Key": location.path}
    return int(s3.retried(url, lambda: s3.client().head_object(**where)["ContentLength"], attempts_if_missing))


def read_bytes(url: str, start: int = 0, stop: int | None = None) -> bytes:
    """Bytes start..stop-1 of the file, or all of it.

    Raises:
        FileNotFoundError: nothing there. StorageError: the store did not deliver; also when it delivered fewer bytes
            than it announced.
    """
    location = parse(url)
    if stop is not None and stop <= start:
        return b""
    if location.bucket is None:
        with open(location.path, "rb") as file:
            file.seek(start)
            return file.read() if stop is None else file.read(stop - start)
    where: dict[str, Any] = {"Bucket": location.bucket, "Key": location.path}
    if start or stop is not None:
        where["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
    return s3.read(url, where)


def open_ranges(url: str) -> IO[bytes]:
    """A file to read and seek in without fetching it whole: local, or by range requests of at least RANGE_BYTES.

    Raises:
        FileNotFoundError: nothing there.
    """
    location = parse(url)
    if location.bucket is None:
        return open(location.path, "rb")
    return io.BufferedReader(_Ranges(url), RANGE_BYTES)


class _Ranges(io.RawIOBase):
    """An object of S3 as a file."""

    def __init__(self, url: str) -> None:
        self.url, self.size, self.at = url, size_of(url), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(0, offset + (0, self.at, self.size)[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        data = read_bytes(self.url, self.at, min(self.at + len(buffer), self.size))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def read_array(url: str, stop: int) -> NDArray[np.uint8]:
    """The first `stop` bytes of the file, or all where it has fewer, as an array: large ones lie in huge pages, which
    costs a third of what a bytes object does.

    Raises:
        FileNotFoundError: nothing there. StorageError: as `read_bytes`.
    """
    location = parse(url)
    if location.bucket is not None:
        return np.frombuffer(read_bytes(url, 0, stop), np.uint8)
    with open(location.path, "rb", buffering=0) as file:
        data, at = np.empty(min(stop, os.fstat(file.fileno()).st_size), np.uint8), 0
        while at < len(data):
            count = file.readinto(data.data[at:])
            if not count:
                break
            at += count
    return data[:at]


def read_sure(url: str, sha256: str | None, stop: int) -> tuple[NDArray[np.uint8] | None, bool]:
    """The first `stop` bytes at a URL (None: nothing is there), and whether they have that digest. From S3 they are
    read up to READS times, until they have it or were twice the same without it: the line may have erred.

    Raises:
        StorageError: as `read_bytes`.
    """
    data: NDArray[np.uint8] | None = None
    for attempt in range(READS if is_s3(url) else 1):
        before = data
        try:
            data = read_array(url, stop)
        except FileNotFoundError:
            data = None
        if data is not None and sha256 is not None and digest(data) == sha256:
            return data, True
        if attempt and (data is before if data is None or before is None else np.array_equal(data, before)):
            break
    return data, False


def write_bytes(url: str, data: bytes | bytearray | memoryview) -> None:
    """Writes a whole file atomically and durably: temporary file, fsync, rename; on S3 a single PUT."""
    location = parse(url)
    if location.bucket is None:
        with _replacing(location.path) as file:
            file.write(data)
        return
    body = bytes(data) if not isinstance(data, bytes) else data
    s3.retried(url, lambda: s3.client().put_object(Bucket=location.bucket, Key=location.path, Body=body))


def create_bytes(url: str, data: bytes) -> bool:
    """Writes a whole file as `write_bytes` where nothing is at the URL; False, and nothing is written, where something
    is. Of many at once one succeeds: on S3 by a conditional PUT (`If-None-Match: *`).
    """
    location = parse(url)
    if location.bucket is None:
        try:
            with _replacing(location.path, new=True) as file:
                file.write(data)
        except FileExistsError:
            return False
        return True
    s3.put_new(url, location.bucket, location.path, data)
    try:  # an earlier try may have written it without an answer, and a store without conditions overwrites
        return read_bytes(url) == data
    except FileNotFoundError:
        return False


def write_file(url: str, path: str | os.PathLike[str]) -> None:
    """Copies a local file to a URL, atomically; on S3 a single PUT up to 5 GiB, a multipart upload beyond."""
    location = parse(url)
    with open(path, "rb") as source:
        if location.bucket is None:
            with _replacing(location.path) as file:
                shutil.copyfileobj(source, file, 8 << 20)
            return

        def send() -> None:
            source.seek(0)
            if os.fstat(source.fileno()).st_size <= ONE_PUT_BYTES:
                s3.client().put_object(Bucket=location.bucket, Key=location.path, Body=source)
            else:
                s3.client().upload_fileobj(_Unclosed(source), location.bucket, location.path)

        s3.retried(url, send)


def fetch_file(url: str, path: str | os.PathLike[str]) -> None:
    """Copies what lies at a URL to a local file, atomically, 64 MiB in memory at a time."""
    size = size_of(url)
    with _replacing(os.fspath(path)) as file:
        at = 0
        while at < size:
            piece = read_bytes(url, at, min(at + (64 << 20), size))
            if not piece:
                raise s3.StorageError(f"{url} became shorter while it was read: {at} of {size} bytes")
            file.write(piece)
            at += len(piece)


def list_files(url: str, odd: bool = False) -> Iterator[Entry]:
    """Every file below a folder or prefix, one at a time, in a fixed order; nothing for an empty or missing one.

    Local names that begin with a dot are left out (temporary files among them); links are followed, a loop of folder
    links is not entered twice. odd: local entries that are neither file nor folder as well, with a size below 0.
    """
    location = parse(url)
    if location.bucket is None:
        yield from _walk(location.path, "", (), odd)
        return
    prefix = f"{location.path}/" if location.path else ""
    token: str | None = None
    while True:
        where: dict[str, Any] = {"Bucket": location.bucket, "Prefix": prefix, "MaxKeys": LIST_PAGE}
        if token is not None:
            where["ContinuationToken"] = token
        page = s3.retried(url, lambda where=where: s3.client().list_objects_v2(**where))
        for item in page.get("Contents", ()):
            relative = item["Key"][len(prefix) :]
            if (
                relative
                and not relative.endswith("/")
                and not any(part.startswith(".") for part in relative.split("/"))
            ):
                yield Entry(relative, int(item["Size"]))
        token = page.get("NextContinuationToken")
        if not token:
            return


def delete(url: str) -> None:
    """Removes one file; nothing happens where there is none."""
    location = parse(url)
    if location.bucket is None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(location.path)
        return
    s3.retried(url, lambda: s3.client().delete_object(Bucket=location.bucket, Key=location.path))


def delete_tree(url: str) -> None:
    """Removes every file below a folder or prefix, and the local folder itself."""
    location = parse(url)
    if location.bucket is None:
        if os.path.isdir(location.path):
            shutil.rmtree(location.path)
        return
    if not location.path:
        raise ValueError(f"refused to empty the whole bucket {url}")
    for entry in list_files(url):
        delete(f"{url.rstrip('/')}/{entry.path}")


class _Unclosed:
    """A file that boto3's transfer cannot close, so that a retry can rewind it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def read(self, size: int = -1) -> bytes:
        return self.file.read(size)
