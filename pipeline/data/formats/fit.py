"""Pixels of any size -> the size of the set, by a named policy."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import cv2
import numpy as np

from pipeline.choose import choose
from pipeline.data.formats.codecs import UInt8s

if TYPE_CHECKING:  # the readers' processes never load torch
    pass


def fit(pixels: UInt8s, size: int, policy: str) -> UInt8s:
    """(height, width, C) -> (size, size, C) by a policy of POLICIES; untouched if it has that size already.

    Raises:
        ValueError: an unknown policy; for "exact" another size.
    """
    made = choose(POLICIES, policy, "resize policy")(pixels, size)
    return np.ascontiguousarray(made.reshape(size, size, pixels.shape[2]))


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
