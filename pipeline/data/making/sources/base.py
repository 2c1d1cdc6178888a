"""What the kinds of source have in common."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from pipeline import storage

T = TypeVar("T")
R = TypeVar("R")

READS_AHEAD = 8
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
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
    a name that the plan has numbered.
    """

    name: str
    data: bytes | ValueError
    label: int | str | None = None
    tags: tuple[str, ...] = ()
    caption: str = ""


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


def listed_files(source: str, suffix: str) -> Iterator[storage.Entry]:
    """The files of a source with a suffix; the source may be one such file itself."""
    if source.endswith(suffix):
        yield storage.Entry(source.rpartition("/")[2], storage.size_of(source))
        return
    for entry in storage.list_files(source):
        if entry.path.endswith(suffix):
            yield entry


def root_of(source: str, suffix: str) -> str:
    """The folder or prefix below which a source's files lie."""
    return source.rpartition("/")[0] or "." if source.endswith(suffix) else source.rstrip("/") or "/"
