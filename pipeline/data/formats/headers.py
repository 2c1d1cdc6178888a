"""What an encoded image's own header says, read before any decoder sees the bytes, and the limits it must keep."""

import io
import struct
import warnings
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
    """What an image's own header says, before orientation.

    Attributes:
        special: why it is no plain image of 8 bits, a text for people; empty for most.
        turned: it keeps an orientation where only Pillow looks.
        deep: 16 bits a channel.
    """

    format: str
    width: int
    height: int
    grey: bool
    alpha: bool
    special: str = ""
    turned: bool = False
    deep: bool = False


def probe(data: bytes, limits: Limits = Limits()) -> Header:
    """Reads format, size and kind from the header only.

    Raises:
        ValueError: no known format by its first bytes; beyond the limits; truncated.
    """
    if len(data) > limits.bytes:
        raise ValueError(f"{len(data)} bytes, more than the limit of {limits.bytes}")
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        header = _probe_png(data)
    elif data[:3] == b"\xff\xd8\xff":
        header = _probe_jpg(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        header = _probe_webp(data)
    elif (kind := _other_format(data)) is not None:
        header = _probe_other(data, kind)
    else:
        told = data[:8].hex(" ") or "nothing (empty file)"
        raise NoImage(f"not a jpg, png or webp image, nor {', '.join(OTHERS)}: it begins with {told}")
    if header.width < 1 or header.height < 1 or header.width * header.height > limits.pixels:
        raise ValueError(f"{header.width} x {header.height} pixels; allowed are 1 to {limits.pixels} in all")
    return header


def _probe_png(data: bytes) -> Header:
    if len(data) < 33 or data[12:16] != b"IHDR" or zlib.crc32(data[12:29]) != int.from_bytes(data[29:33], "big"):
        raise ValueError("png: damaged or missing header chunk")
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    alpha, special, turned, at = colour in (4, 6), "16 bits a channel" if depth == 16 else "", False, 33
    while True:
        if at + 12 > len(data):
            raise ValueError(f"png: truncated: no end chunk in {len(data)} bytes")
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        turned |= kind in (b"tEXt", b"zTXt", b"iTXt") and data[at + 8 : at + 8 + len(RAW_EXIF)] == RAW_EXIF
        special = "animated" if kind == b"acTL" else special
        alpha = alpha or kind == b"tRNS"
        at += 12 + length
        if kind == b"IEND":
            break
    if at > len(data):
        raise ValueError(f"png: truncated: {len(data)} bytes where its chunks need {at}")
    return Header("png", width, height, colour in (0, 4), alpha, special, turned, depth == 16)


def _probe_jpg(data: bytes) -> Header:
    at = 2
    while at + 4 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF or marker in (0x00, 0xFF):  # stray and fill bytes, which decoders pass over
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
            if components not in (1, 3, 4):
                raise ValueError(f"jpg: {components} components; allowed are grey, RGB and CMYK")
            return Header("jpg", width, height, components == 1, False, special="CMYK" if components == 4 else "")
        at += 2 + length
    raise ValueError("jpg: truncated: no frame header")


def _probe_webp(data: bytes) -> Header:
    if len(data) < 26 or int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise ValueError(
            f"webp: truncated: {len(data)} bytes where its header says {int.from_bytes(data[4:8], 'little') + 8}"
        )
    kind, body = data[12:16], data[20:30]
    if kind == b"VP8X":
        special, turned = "animated" if body[0] & 0x02 else "", _webp_exif(data)[:6] == b"Exif\0\0"
        width, height = 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
        return Header("webp", width, height, False, bool(body[0] & 0x10), special, turned)
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


def _webp_exif(data: bytes) -> bytes:
    """The content of the EXIF chunk, empty where there is none."""
    at = 12
    while at + 8 <= len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"EXIF":
            return data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
    return b""


def _other_format(data: bytes) -> str | None:
    """The name in OTHERS, by the first bytes."""
    if data[4:8] == b"ftyp" and b"avi" in data[8:32]:
        return "AVIF"
    return next((name for name, begins in OTHERS.items() if begins and data.startswith(begins)), None)


def _probe_other(data: bytes, kind: str) -> Header:
    """Pillow's reading of a header; it decodes nothing before it is asked for pixels."""
    from PIL import Image

    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=(kind,)) as image:
            warnings.simplefilter("ignore")  # of a size that we limit ourselves
            bits = dict(getattr(image, "tag_v2", {})).get(258, 8)  # BitsPerSample of a TIFF
            deep = max(bits) if isinstance(bits, tuple) else bits
            if image.mode in ("I", "F") or deep > 16:
                raise ValueError(f"{kind}: 32 bits a channel; convert to 8 or 16")
            return Header(kind, *image.size, False, False, special=kind, deep=deep == 16)
    except Exception as error:  # Pillow's readers raise whatever they stumble over in damaged bytes
        raise ValueError(f"{kind}: {error}") from None


RAW_EXIF = b"Raw profile type exif\0"
OTHERS: dict[str, tuple[bytes, ...]] = {
    "BMP": (b"BM",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "TIFF": (b"II*\0", b"MM\0*"),
    "AVIF": (),
}
