"""What an encoded image's own header says, read before any decoder sees the bytes, and the limits it must keep."""

import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the readers' processes never load torch
    pass


class NoImage(ValueError):
    """Bytes that are no image of a known format."""


@dataclass(frozen=True)
class Limits:
    """What an encoded image may be before a decoder sees it."""

    bytes: int = 64 << 20
    pixels: int = 64_000_000


@dataclass(frozen=True)
class Header:
    """What an image's own header says, before orientation."""

    format: str
    width: int
    height: int
    grey: bool
    alpha: bool


def probe(data: bytes, limits: Limits = Limits()) -> Header:
    """Reads format, size and kind from the header only.

    Raises:
        ValueError: not jpg, png or webp by its first bytes; beyond the limits; truncated; animated; 16-bit; CMYK.
    """
    if len(data) > limits.bytes:
        raise ValueError(f"{len(data)} bytes, more than the limit of {limits.bytes}")
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        header = _probe_png(data)
    elif data[:3] == b"\xff\xd8\xff":
        header = _probe_jpg(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        header = _probe_webp(data)
    else:
        raise NoImage(f"not a jpg, png or webp image: it begins with {data[:8].hex(' ') or 'nothing (empty file)'}")
    if header.width < 1 or header.height < 1 or header.width * header.height > limits.pixels:
        raise ValueError(f"{header.width} x {header.height} pixels; allowed are 1 to {limits.pixels} in all")
    return header


def _probe_png(data: bytes) -> Header:
    if len(data) < 33 or data[12:16] != b"IHDR" or zlib.crc32(data[12:29]) != int.from_bytes(data[29:33], "big"):
        raise ValueError("png: damaged or missing header chunk")
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    if depth == 16:
        raise ValueError("png: 16 bits a channel; convert to 8")
    alpha, at = colour in (4, 6), 33
    while True:
        if at + 12 > len(data):
            raise ValueError(f"png: truncated: no end chunk in {len(data)} bytes")
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        if kind == b"acTL":
            raise ValueError("png: animated; give single frames")
        alpha = alpha or kind == b"tRNS"
        at += 12 + length
        if kind == b"IEND":
            break
    if at > len(data):
        raise ValueError(f"png: truncated: {len(data)} bytes where its chunks need {at}")
    return Header("png", width, height, colour in (0, 4), alpha)


def _probe_jpg(data: bytes) -> Header:
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            raise ValueError(f"jpg: damaged marker at byte {at}")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if 0xD0 <= marker <= 0xD7 or marker == 0x01:
            at += 2
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in (0xD9, 0xDA) or length < 2:
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if at + 10 > len(data):
                break
            bits, height, width, components = struct.unpack(">BHHB", data[at + 4 : at + 10])
            if bits != 8:
                raise ValueError(f"jpg: {bits} bits a channel; convert to 8")
            if components not in (1, 3):
                raise ValueError(f"jpg: {components} components (CMYK?); convert to RGB")
            return Header("jpg", width, height, components == 1, False)
        at += 2 + length
    raise ValueError("jpg: truncated: no frame header")


def _probe_webp(data: bytes) -> Header:
    if len(data) < 30 or int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise ValueError(
            f"webp: truncated: {len(data)} bytes where its header says {int.from_bytes(data[4:8], 'little') + 8}"
        )
    kind, body = data[12:16], data[20:30]
    if kind == b"VP8X":
        if body[0] & 0x02:
            raise ValueError("webp: animated; give single frames")
        width, height = 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
        return Header("webp", width, height, False, bool(body[0] & 0x10))
    if kind == b"VP8L" and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return Header("webp", 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF), False, bool(bits >> 28 & 1))
    if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        return Header(
            "webp",
            int.from_bytes(body[6:8], "little") & 0x3FFF,
            int.from_bytes(body[8:10], "little") & 0x3FFF,
            False,
            False,
        )
    raise ValueError(f"webp: damaged header chunk {kind!r}")
