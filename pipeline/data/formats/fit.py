"""Pixels of any size -> the size of the set, by a named policy."""

import math
from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.choose import choose
from pipeline.data.formats.codecs import UInt8s
from pipeline.size import Size, sides

Sides = tuple[int, int]  # height, width


ROOM = 4  # images of the set's size: the most that resizing a whole image may take beside the image itself


def fit(pixels: UInt8s, size: Size, policy: str) -> UInt8s:
    """(height, width, C) -> the same of `size` by a policy of POLICIES; untouched if it has that size already.

    Raises:
        ValueError: an unknown policy; for "exact" another size.
    """
    made = choose(POLICIES, policy, "resize policy")(pixels, sides(size))
    return np.ascontiguousarray(made.reshape(*sides(size), pixels.shape[2]))


def _resized(pixels: UInt8s, width: int, height: int) -> UInt8s:
    """Area averages when shrinking, cubic when enlarging; where one side shrinks and the other grows, each by its own,
    the shrinking one first.
    """
    tall, wide, channels = pixels.shape
    if (width - wide) * (height - tall) < 0:
        halfway = (width, tall) if width < wide else (wide, height)
        return _resized(_resized(pixels, *halfway), width, height)
    shrinks = width * height < wide * tall
    made = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    return made.reshape(height, width, channels)  # pyright: ignore[reportReturnType]


def _centre_crop(pixels: UInt8s, size: Sides) -> UInt8s:
    height, width = pixels.shape[:2]
    scale = max(size[0] / height, size[1] / width)
    if scale != 1:
        high, wide = max(size[0], round(height * scale)), max(size[1], round(width * scale))
        if high * wide > height * width + ROOM * math.prod(size):
            return _enlarged_middle(pixels, high, wide, size)
        pixels, height, width = _resized(pixels, wide, high), high, wide
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return pixels[top : top + size[0], left : left + size[1]]


def _enlarged_middle(pixels: UInt8s, high: int, wide: int, size: Sides) -> UInt8s:
    """The middle of the image enlarged to (high, wide), of which nothing else is made."""
    first, rows = _cubic(pixels.shape[0], high, size[0])
    left, columns = _cubic(pixels.shape[1], wide, size[1])
    part = pixels[first : first + rows.shape[1], left : left + columns.shape[1]].astype(np.float64)
    made = np.einsum("yi,ijc,xj->yxc", rows, part, columns, optimize=True)
    return np.clip(np.rint(made), 0, 255).astype(np.uint8)


def _cubic(length: int, enlarged: int, size: int) -> tuple[int, NDArray[np.float64]]:
    """The middle `size` of a line of pixels that is enlarged by cubic convolution (Keys, IEEE TASSP 1981, with
    a = -3/4 as OpenCV has it): where in the line its sources begin, and their weights, (size, sources).
    """
    place = (np.arange(size) + (enlarged - size) // 2 + 0.5) * length / enlarged - 0.5
    whole = np.floor(place).astype(np.int64)
    sources = np.clip(whole[:, None] + np.arange(-1, 3), 0, length - 1)
    d = np.abs(place[:, None] - whole[:, None] - np.arange(-1, 3))
    a = -0.75
    near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
    weights = np.zeros((size, int(sources.max() - sources.min()) + 1))
    np.add.at(weights, (np.arange(size)[:, None], sources - sources.min()), np.where(d <= 1, near, far))
    return int(sources.min()), weights


def _squash(pixels: UInt8s, size: Sides) -> UInt8s:
    return pixels if pixels.shape[:2] == size else _resized(pixels, size[1], size[0])


def _exact(pixels: UInt8s, size: Sides) -> UInt8s:
    if pixels.shape[:2] != size:
        raise ValueError(
            f"{pixels.shape[1]} x {pixels.shape[0]} pixels where resize: exact wants {size[1]} x {size[0]}"
        )
    return pixels


POLICIES: dict[str, Callable[[UInt8s, Sides], UInt8s]] = {
    "centre-crop": _centre_crop,  # as small as covers both sides, then the middle
    "squash": _squash,  # each side to its own, whatever that does to the aspect
    "exact": _exact,  # refuse any other size
}
