"""Tars in WebDataset's convention that somebody else made: members of one sample follow each other and share their
name up to the first dot of its last part. Every member is in the set, or named with its reason.

Read by a walk of our own and not by `webdataset` or `tarfile`: those take a damaged header for the end of the archive,
read members of any size into memory, and follow what PAX headers say. Here a tar is read once, front to back; only
members with the asked suffixes are opened, up to a size; links, devices, sparse files and archives that are cut off
are named among the rejected. Nothing is ever extracted, so a member's name is only a name.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
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
    files_of,
    no_image,
    root_of,
    shown,
)

BLOCK = tar.BLOCK
ZEROS = 1 << 16  # read at a time
MOST_HEADER_BYTES = 64 << 10  # of a PAX or long-name header
SIDES = {
    "cls": "classes: true",
    "json": "tags_field: json",
    "txt": "caption_field: txt",
    "caption": "caption_field: caption",
}
EXECUTABLE = ("pkl", "pickle", "pt", "pth", "pyd", "joblib", "dill")  # that some readers would run

_REGULAR = (b"0", b"\x00", b"7")
_SKIPPED = {b"5": "folder", b"g": "global PAX header", b"K": "long link name"}
_REFUSED = {b"1": "hard link", b"2": "symbolic link", b"3": "character device", b"4": "block device", b"6": "fifo"}
_PAX = re.compile(rb"([1-9][0-9]{0,9}) ")
_CLASS = re.compile(rb"[0-9]{1,9}")


@dataclass(frozen=True)
class Member:
    """A member whose body the file stands before; `refused` says why it must not be opened; `archive` counts the end
    marks before it.
    """

    name: str
    size: int
    refused: str = ""
    archive: int = 0


@dataclass(frozen=True)
class Sample:
    """Members that belong together, by suffix."""

    key: str
    members: dict[str, bytes]


@dataclass(frozen=True)
class Refused:
    """A member that is no part of a sample, and why; `beside`: no image was expected of it."""

    name: str
    reason: str
    beside: bool = False


class TarSource:
    """Tars; one slice is a run of them of at least SHARD_BYTES."""

    mixed = False
    slice_weight = SHARD_BYTES

    def __init__(self, config: ShardConfig) -> None:
        self.config, self.root = config, root_of(config.source)
        self.class_suffix = config.class_field or "cls"
        self.images = (config.image.lower(),) if config.image else tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
        self.first: str | None = None

    def units(self) -> Iterator[Unit]:
        for entry in files_of(self.config.source):
            archive = entry.size >= 0 and entry.path.lower().endswith(".tar")
            if archive:
                self.first = self.first or entry.path
            yield Unit(entry.path, entry.size, 0, max(1, entry.size) if archive else 0)

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
        wanted = dict.fromkeys(self.images, self.config.max_image_bytes)
        if self.config.classes:
            wanted[self.class_suffix] = 16
        for suffix in (self.config.tags_field, self.config.caption_field):
            if suffix:
                wanted[suffix] = MOST_TEXT_BYTES
        for unit in units:
            if unit.weight:
                yield from _numbered(unit.path, self._read(unit.path, wanted))
            else:
                yield no_image(unit.path, "tars")

    def _read(self, path: str, wanted: dict[str, int]) -> Iterator[Found]:
        with storage.open_ranges(f"{self.root}/{path}") as file:
            for found in samples(file, wanted, self.config.key):
                if isinstance(found, Refused):
                    yield Found(shown(f"{path}#{found.name}"), ValueError(found.reason), beside=found.beside)
                else:
                    yield from self._found(path, found)

    def _found(self, path: str, sample: Sample) -> Iterator[Found]:
        """A sample, or all its members where it has no image."""
        members, name = sample.members, shown(f"{path}#{sample.key}")
        images = [suffix for suffix in self.images if suffix in members]
        sides = tuple(f"{name}.{suffix}" for suffix in members if suffix not in images)
        if not images:
            reason = f"no image among its members ({', '.join(sorted(members))})"
            for number, side in enumerate(sides):
                yield Found(side, ValueError(reason), beside=number > 0)
            return
        for other in images[1:]:
            reason = (
                f"a second image of its key, of which .{images[0]} is taken; "
                f"image: {other} takes this one, key: last-dot both"
            )
            yield Found(f"{name}.{other}", ValueError(reason), beside=True)
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
            yield Found(name, ValueError(str(error)), sides=sides)
            return
        yield Found(name, members[images[0]], label, tags, caption, sides)

    def _first_has_classes(self) -> bool:
        """Whether the first tar's first sample has a class."""
        if self.first is None:
            return False
        wanted = {self.class_suffix: 16} | dict.fromkeys(self.images, 0)
        with storage.open_ranges(f"{self.root}/{self.first}") as file:
            for found in samples(file, wanted, self.config.key):
                if isinstance(found, Sample):
                    return self.class_suffix in found.members
        return False


def _numbered(path: str, found: Iterator[Found]) -> Iterator[Found]:
    """The same, of which at least one takes a number: an archive without images is one rejected thing."""
    first = next(found, None)
    if first is None:
        yield Found(shown(path), ValueError("no image among its members: it has none"))
        return
    if not first.beside:
        yield first
        yield from found
        return
    for each in found:
        yield each
        if not each.beside:
            yield first
            yield from found
            return
    yield replace(first, beside=False)


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


def key_of(name: str, rule: str) -> tuple[str, str]:
    """A member's key and its suffix in lower case, by a rule of `config.KEYS`; the suffix is "" where there is none."""
    folder, slash, base = name.rpartition("/")
    at = base.find(".") if rule == "first-dot" else base.rfind(".")
    # WebDataset's pattern takes `a/.b.png` as key `a/`, unless that folder's name has a dot itself
    whole = slash and rule == "first-dot" and "." not in folder.rpartition("/")[2]
    if at < 0 or (at == 0 and not whole):
        return name, ""
    return folder + slash + base[:at], base[at + 1 :].lower()


def samples(file: IO[bytes], wanted: dict[str, int], rule: str = "first-dot") -> Iterator[Sample | Refused]:
    """The samples of a tar with the wanted members (those with size limit 0 are not read), and every other member with
    its reason.
    """
    key, held, archive = "", dict[str, bytes](), 0
    walk = members(file)
    while True:
        try:
            member = next(walk, None)
        except ValueError as error:
            if held:
                yield Sample(key, held)
            yield Refused("", str(error))
            return
        if member is None:
            break
        name, suffix = key_of(member.name, rule)
        limit = wanted.get(suffix)
        reason = member.refused or (f"a .{suffix} member is never opened" if suffix in EXECUTABLE else "")
        if not reason and limit is None:
            yield Refused(member.name, _unwanted(suffix), beside=True)
            continue
        if not reason and limit and member.size > limit:
            reason = f"{member.size} bytes, more than the limit of {limit}"
        if reason:
            yield Refused(member.name, reason)
            continue
        if (name, member.archive) != (key, archive):
            if held:
                yield Sample(key, held)
            key, held, archive = name, {}, member.archive
        if suffix in held:
            yield Refused(member.name, f"an earlier .{suffix} of its key, which this archive replaces", beside=True)
        held[suffix] = file.read(member.size) if limit else b""
    if held:
        yield Sample(key, held)


def _unwanted(suffix: str) -> str:
    """Why a member with a suffix that nobody asked for is left out."""
    if suffix.endswith(IMAGE_SUFFIXES):
        return (
            f"the image .{suffix} of its key (the name up to its first dot): "
            f"image: {suffix} takes it, key: last-dot every image"
        )
    if f".{suffix}" in IMAGE_SUFFIXES:
        return f"an image: image: {suffix} takes it"
    if suffix in SIDES:
        return f"other: .{suffix} is not asked for; {SIDES[suffix]} takes it"
    return f"other: .{suffix} is no image" if suffix else "other: a name without a suffix"


def members(file: IO[bytes]) -> Iterator[Member]:
    """The members of a tar (ustar, GNU, PAX), the file standing before each one's body.

    Raises:
        ValueError: a damaged header, an archive that is cut off, a header beyond MOST_HEADER_BYTES, a sparse file;
            names the byte.
    """
    file.seek(0, 2)
    end, at, archive = file.tell(), 0, 0
    name: str | None = None
    size: int | None = None
    while True:
        head = _at(file, at, BLOCK)
        if len(head) < BLOCK:
            raise ValueError(f"the archive is cut off at byte {at}: there is no end mark")
        if not any(head):
            at, archive = _after_end(file, at, end), archive + 1
            if at == end:
                return
            continue
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
            yield Member(name or _ustar_name(head), length, "" if kind in _REGULAR else _kind(kind), archive)
            name = size = None
        elif kind == b"5":
            name = size = None


def _after_end(file: IO[bytes], at: int, end: int) -> int:
    """Where the archive after an end mark begins (`cat a.tar b.tar`); `end` where only zeros follow."""
    while at < end:
        data = _at(file, at, min(ZEROS, end - at))
        rest = data.lstrip(b"\0")
        if rest:
            return at + (len(data) - len(rest)) // BLOCK * BLOCK
        at += len(data)
    return end


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
