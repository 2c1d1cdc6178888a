"""Folders of real images for tests."""

from pathlib import Path

import cv2
import numpy as np


def write_images(folder: Path, count: int, size: int, channels: int = 3, classes: int = 3, seed: int = 0) -> None:
    """`count` PNGs of smooth noise in `classes` sub-folders (0: none)."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        small = rng.integers(0, 256, (max(2, size // 4), max(2, size // 4), channels), dtype=np.uint8)
        pixels = cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC)
        place = folder / f"class{i % classes}" if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(place / f"{i:05d}.png"), pixels)
