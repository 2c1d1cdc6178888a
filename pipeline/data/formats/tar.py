"""Our tar shards: plain POSIX ustar in WebDataset's convention, written reproducibly and read by a walk over verified
bytes.

A sample is `KEY.png` (or .jpg, .webp, .npy), followed by those of `KEY.cls` (the class as decimal text), `KEY.json` (a
list of tags) and `KEY.txt` (a caption) that the set has, in this order; nothing else. Python's tarfile spends about
100 microseconds a member and takes a damaged header for the end of the archive; this walk takes less than 1 and knows
what must come next, so that links, devices, PAX and sparse records, foreign suffixes, missing and surplus members are
each an error that names its place.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]
UInt8s = NDArray[np.uint8]

BLOCK = 512
END = bytes(2 * BLOCK)
SUFFIX = {"png": b".png", "jpg": b".jpg", "webp": b".webp", "raw": b".npy"}  # encoding -> the image member's suffix
CLASS, TAGS, CAPTION = "cls", "json", "txt"
EXTRAS = (CLASS, TAGS, CAPTION)  # what may follow an image, in this order

_KEY = re.compile(rb"[0-9]{5,}-[0-9]{5,}")
_CLASS = re.compile(rb"0|[1-9][0-9]{0,8}")
_OCTAL = re.compile(rb"[0-7]{11}")
_EIGHTS = 8.0 ** np.arange(10, -1, -1)
_MAGIC, _MAGIC_AT = np.frombuffer(b"ustar\x0000", np.uint64)[0], 257
_HEADER = (
    b"%s\x000000644\x000000000\x000000000\x00%011o\x0000000000000\x00        0"
    + bytes(100)
    + b"ustar\x0000"
    + bytes(247)
)


class DamagedShard(ValueError):
    """A shard that is not what its manifest says; `offset` is the byte where the difference begins (of an image: where
    its bytes begin, since only their digest tells).
    """

    def __init__(self, shard: str, offset: int, expected: str, got: str) -> None:
        super().__init__(shard, offset, expected, got)  # so that it crosses processes whole
        self.shard, self.offset, self.expected, self.got = shard, offset, expected, got

    def __str__(self) -> str:
        return f"damaged shard {self.shard} at byte {self.offset}: expected {self.expected}, got {self.got}"


@dataclass(frozen=True)
class Members:
    """A shard's samples in tar order.

    Attributes:
        offsets, sizes: (n,) where each image's bytes are.
        labels: (n,) the class, -1 where the set has none.
        texts: by extra ("json", "txt"), (n, 2): offset and size of that member's bytes.
    """

    offsets: Int64s
    sizes: Int64s
    labels: Int64s
    texts: dict[str, Int64s]


def header(name: bytes, size: int) -> bytes:
    """The 512-byte ustar header of a regular file: mode 0644, owner 0, time 0."""
    if len(name) > 100:
        raise ValueError(f"tar member name of {len(name)} bytes; at most 100")
    made = (
        bytearray(_HEADER % (name + bytes(99 - len(name)), size))
        if len(name) < 100
        else bytearray(_HEADER.replace(b"%s\x00", b"%s") % (name, size))
    )
    made[148:156] = b"%06o\x00 " % sum(made)
    return bytes(made)


def padded(payload: bytes) -> bytes:
    """The payload, filled with zeros to whole blocks."""
    return payload + bytes(-len(payload) % BLOCK)


def extra_bytes(extra: str, row: Mapping[str, Any]) -> bytes:
    """What a sample's extra member holds, of its row's label, tags and caption."""
    if extra == CLASS:
        return b"%d" % row["label"]
    if extra == TAGS:
        return json.dumps(row["tags"], ensure_ascii=False).encode()
    return row["caption"].encode()


def walk(shard: str, data: UInt8s, samples: int, encoding: str, extras: tuple[str, ...]) -> Members:
    """Finds the samples in a shard's bytes (which the caller has checked against the manifest's digest).

    Raises:
        DamagedShard: anything but `samples` samples of regular image and extra members in our layout, then the end
            mark.
    """
    found = _walk_at_once(data, samples, encoding, extras)
    return found if found is not None else _walk_one_by_one(shard, data.tobytes(), samples, encoding, extras)


def _walk_at_once(data: UInt8s, samples: int, encoding: str, extras: tuple[str, ...]) -> Members | None:
    """The walk with all headers found and checked together; None where anything is not as it mostly is."""
    if not samples or len(data) < BLOCK:
        return None
    step, blocks = 1 + len(extras), data[: len(data) // BLOCK * BLOCK].reshape(-1, BLOCK)
    heads_at = np.flatnonzero(np.ndarray(len(blocks), np.uint64, data, _MAGIC_AT, (BLOCK,)) == _MAGIC)
    if len(heads_at) != samples * step:  # an image may hold the magic, too
        return None
    heads = blocks[heads_at]
    if not _regular(heads):
        return None
    digits = heads[:, 124:135] - np.uint8(ord("0"))
    size = (digits.astype(np.float64) @ _EIGHTS).astype(np.int64)  # below 2^33: exact
    place = heads_at * BLOCK
    follows = place + BLOCK + (size + BLOCK - 1 & -BLOCK)
    if place[0] or not np.array_equal(place[1:], follows[:-1]) or data[follows[-1] :].tobytes() != END:
        return None
    length = int((heads[0, :100] != 0).sum()) - len(SUFFIX[encoding])  # of the key; mostly the same in all of a shard
    if not _named(heads[::step], heads[::step], length, SUFFIX[encoding]):
        return None
    labels, texts = np.full(samples, -1, np.int64), dict[str, Int64s]()
    for i, extra in enumerate(extras, 1):
        if not _named(heads[i::step], heads[::step], length, b"." + extra.encode()):
            return None
        if extra == CLASS:
            classes = _classes(blocks[heads_at[i::step] + 1, :9], size[i::step])
            if classes is None:
                return None
            labels = classes
        else:
            texts[extra] = np.stack([place[i::step] + BLOCK, size[i::step]], axis=1)
    return Members(place[::step] + BLOCK, size[::step], labels, texts)


def _regular(heads: UInt8s) -> bool:
    """Whether all are headers of regular members with sizes of 11 octal digits."""
    return bool(
        (heads[:, 156] == ord("0")).all()
        and not heads[:, 345].any()
        and (heads[:, 124:135] - np.uint8(ord("0")) < 8).all()
    )


def _named(heads: UInt8s, images: UInt8s, length: int, suffix: bytes) -> bool:
    """Whether all names are the key of the image beside, digits, one '-' in the same place, digits, and the suffix."""
    keys, stop = heads[:, :length], length + len(suffix)
    dash = np.flatnonzero(keys[0] == ord("-"))
    if len(dash) != 1 or not 5 <= dash[0] <= length - 6 or stop > 99:
        return False
    digits = np.delete(keys, dash[0], axis=1)
    return bool(
        (keys == images[:, :length]).all()
        and (keys[:, dash[0]] == ord("-")).all()
        and ((digits >= ord("0")) & (digits <= ord("9"))).all()
        and (heads[:, length:stop] == np.frombuffer(suffix, np.uint8)).all()
        and not heads[:, stop:100].any()
    )


def _classes(bodies: UInt8s, sizes: Int64s) -> Int64s | None:
    """Decimal class numbers of 1 to 9 digits at the beginning of each row."""
    if len(sizes) and (sizes.min() < 1 or sizes.max() > 9):
        return None
    value = np.zeros(len(sizes), dtype=np.int64)
    for column in range(int(sizes.max(initial=0))):
        digit = bodies[:, column].astype(np.int64) - ord("0")
        here = column < sizes
        if (here & ((digit < 0) | (digit > 9))).any() or (column == 0 and ((digit == 0) & (sizes > 1)).any()):
            return None
        value = np.where(here, 10 * value + digit, value)
    return value


def _walk_one_by_one(shard: str, data: bytes, samples: int, encoding: str, extras: tuple[str, ...]) -> Members:
    """The walk that names the first thing that is wrong."""
    offsets, sizes, labels = np.empty(samples, np.int64), np.empty(samples, np.int64), np.full(samples, -1, np.int64)
    texts = {extra: np.empty((samples, 2), np.int64) for extra in extras if extra != CLASS}
    at, suffix = 0, SUFFIX[encoding]
    for i in range(samples):
        name, size = _member(shard, data, at)
        key = name[: -len(suffix)]
        if not name.endswith(suffix) or not _KEY.fullmatch(key):
            raise DamagedShard(
                shard, at, f"sample {i} of {samples} as KEY{suffix.decode()}", f"a member named {name!r}"
            )
        offsets[i], sizes[i] = at + BLOCK, size
        at += BLOCK + size + -size % BLOCK
        for extra in extras:
            name, size = _member(shard, data, at)
            if name != key + b"." + extra.encode():
                raise DamagedShard(shard, at, f"{key.decode()}.{extra}", f"a member named {name!r}")
            if extra == CLASS:
                label = data[at + BLOCK : at + BLOCK + size] if size <= 9 else b""
                if not _CLASS.fullmatch(label):
                    raise DamagedShard(shard, at + BLOCK, "a class number", f"{label!r} ({size} bytes)")
                labels[i] = int(label)
            else:
                texts[extra][i] = at + BLOCK, size
            at += BLOCK + size + -size % BLOCK
    if data[at : at + len(END) + 1] != END:
        raise DamagedShard(shard, at, f"the end mark after {samples} samples, then nothing", f"{len(data) - at} bytes")
    return Members(offsets, sizes, labels, texts)


def _member(shard: str, data: bytes, at: int) -> tuple[bytes, int]:
    """Name and size of the regular ustar member whose header is at byte `at`."""
    head = data[at : at + BLOCK]
    if len(head) < BLOCK or head[257:265] != b"ustar\x0000" or head[156:157] != b"0" or head[345] != 0:
        kind = f"a member of type {head[156:157]!r}, format {head[257:265]!r}"
        if len(head) < BLOCK:
            kind = "the end of the file"
        elif not any(head):
            kind = "the end mark"
        raise DamagedShard(shard, at, "the header of a regular ustar member", kind)
    if not _OCTAL.fullmatch(head[124:135]):
        raise DamagedShard(shard, at + 124, "11 octal digits of a size", repr(head[124:136]))
    size = int(head[124:135], 8)
    if at + BLOCK + size > len(data):
        raise DamagedShard(shard, at, f"a member inside the shard's {len(data)} bytes", f"one of {size} bytes")
    return head[:100].rstrip(b"\x00"), size
