"""What the kinds of source have in common."""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from braceexpand import braceexpand

from pipeline import storage

T = TypeVar("T")
R = TypeVar("R")

READS_AHEAD = 8
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jfif", ".jpe", ".apng")
PACKED = {
    ".tar.gz": "a compressed tar: gunzip it",
    ".tgz": "a compressed tar: gunzip it",
    ".tar.bz2": "a compressed tar: bunzip2 it",
    ".tar.xz": "a compressed tar: unxz it",
    ".tar.zst": "a compressed tar: unzstd it",
    ".gz": "a compressed file: gunzip it",
    ".zip": "a zip archive: unzip it",
    ".7z": "a 7-Zip archive: unpack it",
    ".rar": "a RAR archive: unpack it",
}
MOST_TEXT_BYTES = 1 << 20  # a caption, a list of tags


@dataclass(frozen=True)
class Unit:
    """What a task takes or leaves: `path` below the source, its size in bytes, the row group of a table, and how much
    it counts towards a slice.
    """

    path: str
    size: int
    group: int
    weight: int


@dataclass(frozen=True)
class Found:
    """One image of a source: where it was, its bytes or why there are none, its labels. `label` is a class number, or
    a name that the plan has numbered; `sides` are the members that its labels were read from.

    `beside` is something of which no image was expected (a member beside the images of a tar, a file beside the tars):
    it is named, and takes no number among the images.
    """

    name: str
    data: bytes | ValueError
    label: int | str | None = None
    tags: tuple[str, ...] = ()
    caption: str = ""
    sides: tuple[str, ...] = ()
    beside: bool = False


@dataclass(frozen=True)
class Labels:
    """Which labels the source's images have ("cls", "json", "txt"), and the classes' names where they must be numbered
    before work begins.
    """

    extras: tuple[str, ...]
    classes: frozenset[str]


class Source(Protocol):
    """A kind of source, opened.

    Attributes:
        mixed: units are single images, to be ordered by a hash of their path, so that every shard mixes all classes;
            otherwise slices keep the listed order.
        slice_weight: of the units that make one slice.
    """

    mixed: bool
    slice_weight: int

    def units(self) -> Iterator[Unit]:
        """Everything there, in a fixed order."""
        ...

    def labels(self) -> Labels:
        """What is known of the labels when all units have been listed.

        Raises:
            ValueError: labels that were asked for and are not there.
        """
        ...

    def read(self, units: Iterable[Unit]) -> Iterator[Found]:
        """The images of some units, in a fixed order."""
        ...


def ahead(call: Callable[[T], R], jobs: Iterable[T], url: str) -> Iterator[R]:
    """call(job) for each job in order; on S3, READS_AHEAD of them are under way."""
    if not storage.is_s3(url):
        yield from map(call, jobs)
        return
    with ThreadPoolExecutor(READS_AHEAD) as pool:
        waiting: deque[Future[R]] = deque()
        for job in jobs:
            waiting.append(pool.submit(call, job))
            if len(waiting) > READS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def image_bytes(url: str, size: int | None, limit: int) -> bytes | ValueError:
    """One image's bytes, or why it cannot be read."""
    if size is not None and size > limit:
        return ValueError(f"{size} bytes, more than the limit of {limit}")
    try:
        return storage.read_bytes(url, 0, limit + 1)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        return ValueError(f"cannot be read: {error.strerror or error}")
    except ValueError as error:  # a key that is no URL
        return error


def is_file(source: str) -> str:
    """The suffix of a source that is one table or tar, or a pattern of them; "" for a folder."""
    return next((suffix for suffix in (".tar", ".parquet") if source.lower().endswith(suffix)), "")


def files_of(source: str) -> Iterator[storage.Entry]:
    """The files of a source: of a folder all, of a file itself, of a pattern such as part-{000..099}.tar each (braces
    as WebDataset has them).

    Raises:
        ValueError: braces that do not match, a file of the pattern that is not there.
    """
    if not is_file(source):
        yield from storage.list_files(source, odd=True)
        return
    root = root_of(source)
    for url in braceexpand(source) if _BRACES.search(source) else [source]:
        try:
            yield storage.Entry(url.removeprefix(f"{root}/"), storage.size_of(url))
        except FileNotFoundError:
            raise ValueError(f"source {source}: there is no {url}") from None


def root_of(source: str) -> str:
    """The folder or prefix below which a source's files lie."""
    if not is_file(source):
        return source.rstrip("/") or "/"
    return source.partition("{")[0].rpartition("/")[0] or "."


def no_image(path: str, wanted: str) -> Found:
    """A file of a source that is none of the wanted ones."""
    packed = next((say for suffix, say in PACKED.items() if path.lower().endswith(suffix)), "")
    return Found(shown(path), ValueError(f"other: {packed or f'a file beside the {wanted}'}"), beside=True)


def shown(path: str) -> str:
    """A path as text that any encoder takes; another one where a local name is not UTF-8."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


_BRACES = re.compile(r"\{[^{}]*(\.\.|,)[^{}]*\}")
