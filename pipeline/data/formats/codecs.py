"""Encoded bytes <-> uint8 pixels.

Limits are checked on the header, before a decoder sees the bytes. Foreign images are decoded and resized by OpenCV
(libjpeg-turbo, libpng, libwebp): about 2.5 times Pillow's rate, same pixels. Those of our own shards are decoded by the
fastest at hand: PNG by `png`, JPEG by simplejpeg straight into place (1.5 times OpenCV's rate, same pixels).
"""

import io
import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline.choose import choose
from pipeline.data.formats import png
from pipeline.data.formats.headers import OTHERS, Limits, probe
from pipeline.data.formats.png import encode as encode_png

if TYPE_CHECKING:  # the readers' processes never load torch
    pass

UInt8s = NDArray[np.uint8]

AT_ONCE = 64  # images that are decoded together, while they are in the processor's cache
JPG = b"\xff\xd8"


class DecodeError(ValueError):
    """The index-th of several images could not be decoded."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"image {index}: {reason}")
        self.index, self.reason = index, reason


def decode(data: bytes, channels: int, limits: Limits = Limits(), plain: bool = False) -> UInt8s:
    """Encoded bytes -> (height, width, channels) uint8, upright (EXIF orientation applied), grey (1) or RGB (3);
    transparency is laid on white.

    Args:
        plain: only jpg, png and webp of 8 bits a channel. Else others too: the first frame of an animation, CMYK by
            its profile, 16 bits as v / 257, BMP, GIF, TIFF, AVIF.

    Raises:
        ValueError: as `probe`, or the decoder refused.
    """
    header = probe(data, limits)
    if plain and header.special:
        raise ValueError(f"{header.format}: {header.special}; give a jpg, png or webp of 8 bits a channel, one frame")
    if header.deep:
        return _in_channels(_decode_deep(data), channels)
    if header.alpha or header.special or header.turned:
        return _decode_special(data, channels)
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
        DecodeError: one could not be decoded, or has another shape.
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
            raise DecodeError(i, str(error)) from None
        if made.shape[:2] != into.shape[:2]:
            raise DecodeError(i, f"{made.shape[1]} x {made.shape[0]} pixels, not {into.shape[1]} x {into.shape[0]}")
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


def _decode_special(data: bytes, channels: int) -> UInt8s:
    """The rare images with transparency, in CMYK, animated (the first frame) or of a rare format, by Pillow: OpenCV
    forgets either the orientation or a grey image's transparent level.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            warnings.simplefilter("ignore")  # of odd metadata, and of a size that we limit ourselves
            upright = ImageOps.exif_transpose(image)
            rgba = (_cmyk_to_rgb(upright, image) if image.mode == "CMYK" else upright).convert("RGBA")
    except Exception as error:  # Pillow's readers raise whatever they stumble over in damaged bytes
        raise ValueError(f"the decoder refused: {error}") from None
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return _in_channels(np.asarray(Image.alpha_composite(white, rgba).convert("RGB")), channels)


def _cmyk_to_rgb(image: Any, opened: Any) -> Any:
    """By the profile of a CMYK image, else by R = (1 - C)(1 - K). Pillow takes every CMYK JPEG for an inverted one, as
    Adobe writes them; without Adobe's mark they are not.
    """
    from PIL import ImageChops, ImageCms

    if opened.format == "JPEG" and "adobe" not in opened.info:
        image = ImageChops.invert(image)
    if opened.info.get("icc_profile"):
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(opened.info["icc_profile"]))
            made = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
            return image.convert("RGB") if made is None else made
        except (ImageCms.PyCMSError, OSError):  # a damaged profile, or one of another colour space
            pass
    return image.convert("RGB")


def _decode_deep(data: bytes) -> UInt8s:
    """16 bits a channel: the level v / 257, rounded; transparency on white. Pillow only says which way is up."""
    from PIL import Image

    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise ValueError(f"the decoder refused: {error}") from None
    if pixels is None or pixels.dtype != np.uint16:
        raise ValueError("the decoder refused: 16 bits a channel in a form that it does not know")
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            warnings.simplefilter("ignore")
            size, orientation = image.size, image.getexif().get(0x112, 1)
    except Exception as error:  # as above
        raise ValueError(f"the decoder refused: {error}") from None
    if pixels.shape[1::-1] != size:
        raise ValueError(f"the decoder found {pixels.shape[1::-1]} pixels, the header said {size}")
    levels = pixels.reshape(*pixels.shape[:2], -1)
    if levels.shape[2] in (2, 4):
        alpha = levels[:, :, -1:].astype(np.uint64)
        opaque = levels[:, :, :-1].astype(np.uint64)
        levels = ((opaque * alpha + 65535 * (65535 - alpha) + 32767) // 65535).astype(np.uint16)
    made = ((levels.astype(np.uint32) + 128) // 257).astype(np.uint8)[:, :, ::-1]  # OpenCV's order is blue first
    upright = np.ascontiguousarray(UPRIGHT.get(orientation, UPRIGHT[1])(made))
    return upright[:, :, 0] if upright.shape[2] == 1 else upright


FORMATS = ("PNG", "JPEG", "WEBP", *OTHERS)
UPRIGHT: dict[int, Callable[[UInt8s], UInt8s]] = {  # EXIF's orientations
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels[::-1].transpose(1, 0, 2),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: pixels[:, ::-1].transpose(1, 0, 2),
}
_FULL_COLOUR = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)  # colour at every pixel
LOSSLESS_WEBP = 101  # OpenCV: above 100

ENCODERS: dict[str, Callable[[UInt8s, int], bytes]] = {
    "png": lambda pixels, _: encode_png(pixels),
    "jpg": lambda pixels, quality: _imencode(pixels, ".jpg", [cv2.IMWRITE_JPEG_QUALITY, quality, *_FULL_COLOUR]),
    "webp": lambda pixels, _: _imencode(pixels, ".webp", [cv2.IMWRITE_WEBP_QUALITY, LOSSLESS_WEBP]),
    "raw": lambda pixels, _: encode_raw(pixels),
}
