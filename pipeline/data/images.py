"""Images: encoded bytes -> uint8 pixels -> model space and back. The only module that knows the pixel range.

A grey level u = 0..255 stands in model space at the middle of its bin, x = 2 (u + 0.5) / 256 - 1, so x runs over
+-255/256 and the 256 bins of width 1/128 tile [-1, 1] exactly. A model's density in x therefore gives bits per
dimension -log2 p(x) + log2(128), that is nats / ln 2 + 7, and 8-bit noise under a uniform model scores exactly 8.

Limits are checked on the header, before a decoder sees the bytes. Foreign images are decoded and resized by OpenCV
(libjpeg-turbo, libpng, libwebp): about 2.5 times Pillow's rate, same pixels. Those of our own shards are decoded by the
fastest at hand: PNG by `png`, JPEG by simplejpeg straight into place (1.5 times OpenCV's rate, same pixels).
"""

import io
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline.choose import choose
from pipeline.data import png
from pipeline.data.png import encode as encode_png

if TYPE_CHECKING:  # the readers' processes never load torch
    from torch import Tensor

UInt8s = NDArray[np.uint8]

AT_ONCE = 64  # images that are decoded together, while they are in the processor's cache
JPG = b"\xff\xd8"

GREY_LEVELS = 256
PIXEL_BIN = 2.0 / GREY_LEVELS
FIRST_LEVEL = PIXEL_BIN / 2 - 1.0  # where level 0 lies in model space
LOG_VOLUME_NATS_PER_DIM = -math.log(
    PIXEL_BIN
)  # log 128: add to nats per dimension in x to get nats per dimension in pixels


def to_model(u: "Tensor") -> "Tensor":
    """Pixels uint8 of any shape -> model space float32, x = 2 (u + 0.5) / 256 - 1, exact."""
    return u.float().add_(0.5).mul_(PIXEL_BIN).sub_(1.0)


def to_pixels(x: "Tensor") -> "Tensor":
    """Model space, any float type and shape -> the nearest grey level as uint8; values beyond the range are clamped.
    Undoes `to_model` exactly.
    """
    return x.float().add(1.0).mul_(1.0 / PIXEL_BIN).sub_(0.5).round_().clamp_(0, GREY_LEVELS - 1).byte()


class Refused(ValueError):
    """The index-th of several images could not be decoded."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"image {index}: {reason}")
        self.index, self.reason = index, reason


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
        raise ValueError(f"not a jpg, png or webp image: it begins with {data[:8].hex(' ') or 'nothing (empty file)'}")
    if header.width < 1 or header.height < 1 or header.width * header.height > limits.pixels:
        raise ValueError(f"{header.width} x {header.height} pixels; allowed are 1 to {limits.pixels} in all")
    return header


def decode(data: bytes, channels: int, limits: Limits = Limits()) -> UInt8s:
    """Encoded bytes -> (height, width, channels) uint8, upright (EXIF orientation applied), grey (1) or RGB (3);
    transparency is laid on white.

    Raises:
        ValueError: as `probe`, or the decoder refused.
    """
    header = probe(data, limits)
    if header.alpha:
        return _decode_alpha(data, channels)
    buffer = np.frombuffer(data, dtype=np.uint8)
    pixels = _imdecode(buffer, cv2.IMREAD_GRAYSCALE if header.grey else cv2.IMREAD_COLOR_RGB)
    if pixels.shape[:2] not in ((header.height, header.width), (header.width, header.height)):
        raise ValueError(
            f"the decoder found {pixels.shape[1]} x {pixels.shape[0]} pixels, "
            f"the header said {header.width} x {header.height}"
        )
    return _in_channels(pixels, channels)


def decode_own(payloads: Sequence[memoryview], out: UInt8s) -> None:
    """Images that `encode` made, of bytes whose digest was checked, into out (n, H, W, C).

    Raises:
        Refused: one could not be decoded, or has another shape.
    """
    plain = True  # as `png` writes them
    for first in range(0, len(payloads), AT_ONCE):
        some, into = payloads[first : first + AT_ONCE], out[first : first + AT_ONCE]
        plain = plain and png.decode_many(some, into)
        if not plain:
            _decode_each(some, into, first)


def room(shape: tuple[int, ...]) -> UInt8s:
    """Uninitialised memory for pixels, 16 bytes off a multiple of 32: into aligned rows libjpeg-turbo writes past the
    cache, which takes half as long again."""
    size = math.prod(shape)
    memory = np.empty(size + 32, dtype=np.uint8)
    start = (16 - memory.ctypes.data) % 32
    return memory[start : start + size].reshape(shape)


def _decode_each(payloads: Sequence[memoryview], out: UInt8s, first: int) -> None:
    flag = cv2.IMREAD_GRAYSCALE if out.shape[3] == 1 else cv2.IMREAD_COLOR_RGB
    colours = "GRAY" if out.shape[3] == 1 else "RGB"
    for i, (payload, into) in enumerate(zip(payloads, out, strict=True), first):
        jpeg = payload[:2] == JPG
        try:
            if jpeg:
                made = simplejpeg.decode_jpeg(payload, colours, buffer=into)
            else:
                made = _imdecode(np.frombuffer(payload, np.uint8), flag)
        except ValueError as error:
            raise Refused(i, str(error)) from None
        if made.shape[:2] != into.shape[:2]:
            raise Refused(i, f"{made.shape[1]} x {made.shape[0]} pixels, not {into.shape[1]} x {into.shape[0]}")
        if not jpeg:
            into[...] = made.reshape(into.shape)


def encode(pixels: UInt8s, encoding: str, quality: int = 95) -> bytes:
    """(height, width, 1 or 3) uint8 -> bytes of an encoding of ENCODERS; the same bytes for the same pixels.

    Args:
        quality: of jpg, 1 to 100; the others lose nothing.
    """
    return choose(ENCODERS, encoding, "encoding")(pixels, quality)


def encode_raw(pixels: UInt8s) -> bytes:
    """(H, W, C) -> a .npy file of (C, H, W) uint8, which readers copy as it lies."""
    sink = io.BytesIO()
    np.lib.format.write_array(sink, np.ascontiguousarray(pixels.transpose(2, 0, 1)), version=(1, 0), allow_pickle=False)
    return sink.getvalue()


def channel_sums(pixels: UInt8s) -> NDArray[np.int64]:
    """(H, W, C) -> (2, C): the exact sums of each channel's levels and of their squares."""
    levels = pixels.reshape(-1, pixels.shape[2]).astype(np.float64)  # whole numbers far below 2^53: any order is exact
    return np.stack([np.ones(len(levels)) @ levels, np.diagonal(levels.T @ levels)]).astype(np.int64)


def fit(pixels: UInt8s, size: int, policy: str) -> UInt8s:
    """(height, width, C) -> (size, size, C) by a policy of POLICIES; untouched if it has that size already.

    Raises:
        ValueError: an unknown policy; for "exact" another size.
    """
    made = choose(POLICIES, policy, "resize policy")(pixels, size)
    return np.ascontiguousarray(made.reshape(size, size, pixels.shape[2]))


def _imdecode(buffer: UInt8s, flag: int) -> UInt8s:
    try:
        pixels = cv2.imdecode(buffer, flag)
    except cv2.error as error:
        raise ValueError(f"the decoder refused: {error.err if hasattr(error, 'err') else error}") from None
    if pixels is None:
        raise ValueError("the decoder refused: truncated or damaged image data")
    return pixels.astype(np.uint8, copy=False)


def _imencode(pixels: UInt8s, suffix: str, options: list[int]) -> bytes:
    done, data = cv2.imencode(suffix, pixels if pixels.shape[2] == 1 else pixels[:, :, ::-1], options)
    if not done:
        raise ValueError(f"could not encode pixels of shape {pixels.shape} as {suffix}")
    return data.tobytes()


def _in_channels(pixels: UInt8s, channels: int) -> UInt8s:
    """Grey (H, W) or RGB (H, W, 3) -> (H, W, channels); luma by Rec. 601."""
    if channels == 1:
        grey = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
        return grey[:, :, None]  # pyright: ignore[reportReturnType]
    return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB) if pixels.ndim == 2 else pixels  # pyright: ignore[reportReturnType]


def _decode_alpha(data: bytes, channels: int) -> UInt8s:
    """The rare images with transparency, by Pillow: OpenCV forgets either the orientation or a grey image's
    transparent level.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "WEBP")) as image:
            upright = ImageOps.exif_transpose(image).convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"the decoder refused: {error}") from None
    white = Image.new("RGBA", upright.size, (255, 255, 255, 255))
    return _in_channels(np.asarray(Image.alpha_composite(white, upright).convert("RGB")), channels)


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


def _resized(pixels: UInt8s, width: int, height: int) -> UInt8s:
    """Area averages when shrinking, cubic when enlarging."""
    shrinks = width * height < pixels.shape[1] * pixels.shape[0]
    made = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    return made.reshape(height, width, pixels.shape[2])  # pyright: ignore[reportReturnType]


def _centre_crop(pixels: UInt8s, size: int) -> UInt8s:
    height, width = pixels.shape[:2]
    if min(height, width) != size:
        scale = size / min(height, width)
        pixels = _resized(pixels, max(size, round(width * scale)), max(size, round(height * scale)))
        height, width = pixels.shape[:2]
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


def _squash(pixels: UInt8s, size: int) -> UInt8s:
    return pixels if pixels.shape[:2] == (size, size) else _resized(pixels, size, size)


def _exact(pixels: UInt8s, size: int) -> UInt8s:
    if pixels.shape[:2] != (size, size):
        raise ValueError(f"{pixels.shape[1]} x {pixels.shape[0]} pixels where resize: exact wants {size} x {size}")
    return pixels


POLICIES: dict[str, Callable[[UInt8s, int], UInt8s]] = {
    "centre-crop": _centre_crop,  # the short side to `size`, then the middle square
    "squash": _squash,  # both sides to `size`
    "exact": _exact,  # refuse any other size
}

_FULL_COLOUR = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)  # colour at every pixel
LOSSLESS_WEBP = 101  # OpenCV: above 100

ENCODERS: dict[str, Callable[[UInt8s, int], bytes]] = {
    "png": lambda pixels, _: encode_png(pixels),
    "jpg": lambda pixels, quality: _imencode(pixels, ".jpg", [cv2.IMWRITE_JPEG_QUALITY, quality, *_FULL_COLOUR]),
    "webp": lambda pixels, _: _imencode(pixels, ".webp", [cv2.IMWRITE_WEBP_QUALITY, LOSSLESS_WEBP]),
    "raw": lambda pixels, _: encode_raw(pixels),
}
