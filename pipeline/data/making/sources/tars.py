"""Tars in WebDataset's convention that somebody else made: members of one sample follow each other and share their
name up to the first dot.

Read by a walk of our own and not by `webdataset` or `tarfile`: those take a damaged header for the end of the archive,
read members of any size into memory, and follow what PAX headers say. Here a tar is read once, front to back; only
members with the asked suffixes are opened, up to a size; links, devices, sparse files and archives that are cut off
are named among the rejected. Nothing is ever extracted, so a member's name is only a name.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO

from pipeline import storage
from pipeline.data.config import SHARD_BYTES, ShardConfig
from pipeline.data.formats import tar
from pipeline.data.making.sources.base import (
    IMAGE_SUFFIXES,
    MOST_TEXT_BYTES,
    Found,
    Labels,
    Unit,
    listed_files,
    root_of,
)

BLOCK = tar.BLOCK
MOST_HEADER_BYTES = 64 << 10  # of a PAX or long-name header
MOST_REFUSED = 1000  # named one by one, a tar
EXECUTABLE = ("pkl", "pickle", "pt", "pth", "pyd", "joblib", "dill")  # that some readers would run

_REGULAR = (b"0", b"\x00", b"7")
_SKIPPED = {b"5": "folder", b"g": "global PAX header", b"K": "long link name"}
_REFUSED = {b"1": "hard link", b"2": "symbolic link", b"3": "character device", b"4": "block device", b"6": "fifo"}
_PAX = re.compile(rb"([1-9][0-9]{0,9}) ")
_CLASS = re.compile(rb"[0-9]{1,9}")


@dataclass(frozen=True)
class Member:
    """A member whose body the file stands before; `refused` says why it must not be opened."""

    name: str
    size: int
    refused: str = ""


class TarSource:
    """Tars; one slice is a run of them of at least SHARD_BYTES."""

    mixed = False
    slice_weight = SHARD_BYTES

    def __init__(self, config: ShardConfig) -> None:
        self.config, self.root = config, root_of(config.source, ".tar")
        self.class_suffix = config.class_field or "cls"
        self.first: str | None = None

    def units(self) -> Iterator[Unit]:
        for entry in listed_files(self.config.source, ".tar"):
            self.first = self.first or entry.path
            yield Unit(entry.path, entry.size, 0, max(1, entry.size))

    def labels(self) -> Labels:
        extras: list[str] = []
        if self.config.classes and (self.config.class_field or self._first_has_classes()):
            extras.append(tar.CLASS)
        if self.config.tags_field:
            extras.append(tar.TAGS)
        if self.config.caption_field:
            extras.append(tar.CAPTION)
        return Labels(tuple(extras), frozenset())

    def read(self, units: Iterable[Unit]) -> Iterator[Found]:
        wanted = {suffix[1:]: self.config.max_image_bytes for suffix in IMAGE_SUFFIXES}
        if self.config.classes:
            wanted[self.class_suffix] = 16
        for suffix in (self.config.tags_field, self.config.caption_field):
            if suffix:
                wanted[suffix] = MOST_TEXT_BYTES
        for unit in units:
            empty = True
            with storage.open_ranges(f"{self.root}/{unit.path}") as file:
                for key, members in samples(file, wanted):
                    empty = False
                    name = f"{unit.path}#{key}"
                    if isinstance(members, ValueError):
                        yield Found(name, members)
                    else:
                        yield self._found(name, members)
            if empty:
                yield Found(unit.path, ValueError("no image among its members"))

    def _found(self, name: str, members: dict[str, bytes]) -> Found:
        image = next((suffix[1:] for suffix in IMAGE_SUFFIXES if suffix[1:] in members), None)
        if image is None:
            return Found(name, ValueError(f"no image among its members ({', '.join(sorted(members))})"))
        try:
            label = None
            if self.config.classes and self.class_suffix in members:
                text = members[self.class_suffix].strip()
                if not _CLASS.fullmatch(text):
                    raise ValueError(f"its class is {text!r}, not a number of 1 to 9 digits")
                label = int(text)
            tags = tags_of(members.get(self.config.tags_field, b"[]")) if self.config.tags_field else ()
            caption = members.get(self.config.caption_field, b"").decode("utf-8").strip()
        except ValueError as error:  # UnicodeDecodeError is one
            return Found(name, ValueError(str(error)))
        return Found(name, members[image], label, tags, caption)

    def _first_has_classes(self) -> bool:
        """Whether the first tar's first sample has a class."""
        if self.first is None:
            return False
        with storage.open_ranges(f"{self.root}/{self.first}") as file:
            for _, found in samples(file, {self.class_suffix: 16} | {suffix[1:]: 0 for suffix in IMAGE_SUFFIXES}):
                if not isinstance(found, ValueError):
                    return self.class_suffix in found
        return False


def tags_of(text: bytes) -> tuple[str, ...]:
    """A JSON list of strings or whole numbers, each once, sorted.

    Raises:
        ValueError: anything else.
    """
    try:
        listed = json.loads(text)
    except RecursionError:
        raise ValueError("its tags are nested too deeply") from None
    if not isinstance(listed, list) or not all(isinstance(item, str | int) for item in listed):
        raise ValueError(f"its tags are {text[:60]!r}, not a JSON list of strings")
    return tuple(sorted({str(item) for item in listed}))


def samples(file: IO[bytes], wanted: dict[str, int]) -> Iterator[tuple[str, dict[str, bytes] | ValueError]]:
    """The samples of a tar: key, and the wanted members by suffix (those with size limit 0 are not read); or what was
    refused and why, the first MOST_REFUSED one by one.
    """
    key, held, refused = "", dict[str, bytes](), 0
    walk = members(file)
    while True:
        try:
            member = next(walk, None)
        except ValueError as error:
            if held:
                yield key, held
            yield "", error
            return
        if member is None:
            break
        folder, slash, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        suffix = suffix.lower()
        reason = member.refused or (f"a .{suffix} member is never opened" if suffix in EXECUTABLE else "")
        limit = wanted.get(suffix)
        if not reason and limit is None:
            continue
        if not reason and limit and member.size > limit:
            reason = f"{member.size} bytes, more than the limit of {limit}"
        if reason:
            refused += 1
            if refused <= MOST_REFUSED:
                yield member.name, ValueError(reason)
            continue
        name = folder + slash + stem
        if name != key:
            if held:
                yield key, held
            key, held = name, {}
        held[suffix] = file.read(member.size) if limit else b""
    if held:
        yield key, held
    if refused > MOST_REFUSED:
        yield "", ValueError(f"{refused - MOST_REFUSED} more members were refused")


def members(file: IO[bytes]) -> Iterator[Member]:
    """The members of a tar (ustar, GNU, PAX), the file standing before each one's body.

    Raises:
        ValueError: a damaged header, an archive that is cut off, a header beyond MOST_HEADER_BYTES, a sparse file;
            names the byte.
    """
    file.seek(0, 2)
    end, at = file.tell(), 0
    name: str | None = None
    size: int | None = None
    while True:
        head = _at(file, at, BLOCK)
        if len(head) < BLOCK:
            raise ValueError(f"the archive is cut off at byte {at}: there is no end mark")
        if not any(head):
            return
        own, kind = _checked(head, at)
        length = own if size is None or kind not in _REGULAR else size
        body, at = at + BLOCK, at + BLOCK + length + -length % BLOCK
        if body + length > end:
            raise ValueError(f"the archive is cut off at byte {end}: a member of {length} bytes begins at {body}")
        if kind in (b"x", b"L", b"K", b"g") and length > MOST_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes at byte {body}; at most {MOST_HEADER_BYTES} are read")
        if kind == b"L":
            name = _text(_at(file, body, length))
        elif kind == b"x":
            name, size = _pax(_at(file, body, length), body, name)
        elif kind not in _SKIPPED:
            if kind == b"S":
                raise ValueError(f"a sparse file at byte {body}: nothing after it is read")
            file.seek(body)
            yield Member(name or _ustar_name(head), length, "" if kind in _REGULAR else _kind(kind))
            name = size = None
        elif kind == b"5":
            name = size = None


def _kind(kind: bytes) -> str:
    return f"a {_REFUSED[kind]} is never opened" if kind in _REFUSED else f"a member of type {kind!r} is never opened"


def _at(file: IO[bytes], at: int, length: int) -> bytes:
    file.seek(at)
    return file.read(length)


def _text(data: bytes) -> str:
    return data.split(b"\x00")[0].decode("utf-8", "replace")


def _ustar_name(head: bytes) -> str:
    prefix = _text(head[345:500]) if head[257:263] == b"ustar\x00" else ""
    return f"{prefix}/{_text(head[:100])}" if prefix else _text(head[:100])


def _checked(head: bytes, at: int) -> tuple[int, bytes]:
    """Size and type of a header whose checksum is right."""
    total = sum(head) - sum(head[148:156]) + 8 * ord(" ")
    try:
        said = int(head[148:156].split(b"\x00")[0].strip() or b"0", 8)
        if head[124] & 0x80:  # GNU: base 256
            size = int.from_bytes(head[125:136], "big") if head[124] == 0x80 else -1
        else:
            size = int(head[124:136].split(b"\x00")[0].strip() or b"0", 8)
    except ValueError:
        raise ValueError(f"a damaged header at byte {at}: its numbers are not octal") from None
    if said != total:
        raise ValueError(f"a damaged header at byte {at}: its checksum is {said}, its bytes give {total}")
    if not 0 <= size < 1 << 50:
        raise ValueError(f"a damaged header at byte {at}: a size of {head[124:136]!r}")
    return size, head[156:157]


def _pax(data: bytes, at: int, name: str | None) -> tuple[str | None, int | None]:
    """Name and size of the next member, where its PAX header gives them."""
    size, place = None, 0
    while place < len(data) and data[place]:
        match = _PAX.match(data, place)
        if match is None:
            raise ValueError(f"a damaged PAX header at byte {at}")
        stop = place + int(match.group(1))
        field, equals, value = data[match.end() : stop - 1].partition(b"=")
        if stop > len(data) or stop <= match.end() or not equals or data[stop - 1 : stop] != b"\n":
            raise ValueError(f"a damaged PAX header at byte {at}")
        if field.startswith(b"GNU.sparse"):
            raise ValueError(f"a sparse file at byte {at}: nothing after it is read")
        if field == b"path":
            name = _text(value)
        elif field == b"size":
            if not value.isdigit() or len(value) > 15:
                raise ValueError(f"a damaged PAX header at byte {at}: size {value[:20]!r}")
            size = int(value)
        place = stop
    return name, size
