"""Our tar shards: plain POSIX ustar in WebDataset's convention, written reproducibly and read by a walk over verified
bytes.

A sample is `KEY.png` or `KEY.npy`, followed by `KEY.cls` (the class as decimal text) where the set has classes;
nothing else. Python's tarfile spends about 100 microseconds a member and takes a damaged header for the end of the
archive; this walk takes about 2 and knows what must come next, so that links, devices, PAX and sparse records,
foreign suffixes, missing and surplus members are each an error that names its place.
"""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 512
END = bytes(2 * BLOCK)
SUFFIX = {"png": b".png", "raw": b".npy"}  # encoding -> the image member's suffix

_KEY = re.compile(rb"[0-9]{5,}-[0-9]{5,}")
_CLASS = re.compile(rb"0|[1-9][0-9]{0,8}")
_HEADER = (
    b"%s\x000000644\x000000000\x000000000\x00%011o\x0000000000000\x00        0"
    + bytes(100)
    + b"ustar\x0000"
    + bytes(247)
)


class DamagedShard(ValueError):
    """A shard that is not what its manifest says; `offset` is the byte where the difference begins, None where only
    the digest tells.
    """

    def __init__(self, shard: str, offset: int | None, expected: str, got: str) -> None:
        super().__init__(shard, offset, expected, got)  # so that it crosses processes whole
        self.shard, self.offset, self.expected, self.got = shard, offset, expected, got

    def __str__(self) -> str:
        place = "" if self.offset is None else f" at byte {self.offset}"
        return f"damaged shard {self.shard}{place}: expected {self.expected}, got {self.got}"


@dataclass(frozen=True)
class Members:
    """A shard's samples in tar order: where each image's bytes are, and its class (-1 where the set has none)."""

    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]


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


def walk(shard: str, data: bytes | memoryview, samples: int, encoding: str, labelled: bool) -> Members:
    """Finds the samples in a shard's bytes (which the caller has checked against the manifest's digest).

    Raises:
        DamagedShard: anything but `samples` samples of regular image (and class) members in our layout, then the end
            mark.
    """
    offsets, sizes, labels = np.empty(samples, np.int64), np.empty(samples, np.int64), np.full(samples, -1, np.int64)
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
        if labelled:
            name, size = _member(shard, data, at)
            label = bytes(data[at + BLOCK : at + BLOCK + size]) if size <= 9 else b""
            if name != key + b".cls" or not _CLASS.fullmatch(label):
                raise DamagedShard(
                    shard, at, f"{key.decode()}.cls with a class number", f"{name!r} with {label!r} ({size} bytes)"
                )
            labels[i] = int(label)
            at += 2 * BLOCK
    if bytes(data[at : at + len(END) + 1]) != END:
        raise DamagedShard(shard, at, f"the end mark after {samples} samples, then nothing", f"{len(data) - at} bytes")
    return Members(offsets, sizes, labels)


def _member(shard: str, data: bytes | memoryview, at: int) -> tuple[bytes, int]:
    """Name and size of the regular ustar member whose header is at byte `at`."""
    head = bytes(data[at : at + BLOCK])
    if len(head) < BLOCK or head[257:265] != b"ustar\x0000" or head[156:157] != b"0" or head[345] != 0:
        kind = f"a member of type {head[156:157]!r}, format {head[257:265]!r}"
        if len(head) < BLOCK:
            kind = "the end of the file"
        elif not any(head):
            kind = "the end mark"
        raise DamagedShard(shard, at, "the header of a regular ustar member", kind)
    try:
        size = int(head[124:135], 8)
    except ValueError:
        raise DamagedShard(shard, at + 124, "11 octal digits of a size", repr(head[124:136])) from None
    if size < 0 or at + BLOCK + size > len(data):
        raise DamagedShard(shard, at, f"a member inside the shard's {len(data)} bytes", f"one of {size} bytes")
    return head[:100].rstrip(b"\x00"), size
