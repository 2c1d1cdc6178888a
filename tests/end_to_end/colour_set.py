"""A small real set in colour: crops of scikit-learn's two sample photographs, and drawn shapes."""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.formats.codecs import encode_png

KINDS = ("china", "flower", "shapes")


def _crops(photograph: Any, count: int, side: int, random: np.random.Generator) -> list[Any]:
    """Squares of four sides, so that a set of them is resized."""
    height, width = photograph.shape[:2]
    made: list[Any] = []
    for index in range(count):
        size = side * (1 + index % 4)
        top, left = random.integers(0, height - size), random.integers(0, width - size)
        made.append(photograph[top : top + size, left : left + size])
    return made


def _shapes(count: int, side: int, random: np.random.Generator) -> list[Any]:
    """A disc or a square of one colour on another."""
    rows, columns = np.mgrid[:side, :side]
    made: list[Any] = []
    for index in range(count):
        (y, x), radius = random.uniform(0.3 * side, 0.7 * side, 2), random.uniform(0.15, 0.3) * side
        distances = np.abs(rows - y), np.abs(columns - x)
        inside = (np.hypot(*distances) if index % 2 else np.maximum(*distances)) < radius
        ink, ground = random.integers(0, 256, (2, 3), dtype=np.uint8)
        made.append(np.where(inside[:, :, None], ink, ground))
    return made


def write_colours(folder: Path, side: int, each: int = 32, kinds: tuple[str, ...] = KINDS) -> int:
    """FOLDER/KIND/NN.png, `each` of a kind; how many there are."""
    from sklearn.datasets import load_sample_image

    random = np.random.default_rng(0)
    for kind in kinds:
        made = _shapes(each, side, random)
        if kind != "shapes":
            made = _crops(load_sample_image(f"{kind}.jpg"), each, side, random)
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for index, pixels in enumerate(made):
            (folder / kind / f"{index:02}.png").write_bytes(encode_png(np.ascontiguousarray(pixels)))
    return each * len(kinds)
