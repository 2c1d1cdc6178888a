"""Grids of images as PNG, and as data URIs for a page that stands alone."""

import base64
import math

import numpy as np
import torch
from torch import Tensor

from pipeline.data.formats.codecs import encode_png

GAP = 1  # pixels between cells
GROUND = 60  # grey level of the gaps


def grid(images: Tensor, columns: int, gap: int = GAP) -> Tensor:
    """uint8 (n, C, H, W) -> one uint8 (C, ...) picture, row by row, cells `gap` apart."""
    n, channels, height, width = images.shape
    rows = math.ceil(n / columns)
    picture = torch.full((channels, rows * (height + gap) - gap, columns * (width + gap) - gap), GROUND).byte()
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        picture[:, top : top + height, left : left + width] = image
    return picture


def png(picture: Tensor, scale: int = 1) -> bytes:
    """uint8 (C, H, W) -> PNG bytes, each pixel `scale` x `scale`."""
    pixels = picture.permute(1, 2, 0).numpy()
    return encode_png(np.ascontiguousarray(pixels.repeat(scale, axis=0).repeat(scale, axis=1)))


def data_uri(picture: Tensor, scale: int = 1) -> str:
    return "data:image/png;base64," + base64.b64encode(png(picture, scale)).decode()


def by_class(images: Tensor, labels: Tensor | None, classes: int, each: int) -> tuple[Tensor, int]:
    """The first `each` images of every class, a class a row (in order where there are none); the number of columns."""
    if labels is None or not classes:
        count = min(len(images), each * each)
        return images[:count], each
    shown = min(classes, 20)
    counts = [int((labels == c).sum()) for c in range(shown)]
    each = max(1, min([each, *[count for count in counts if count]]))
    rows = [images[(labels == c).nonzero()[:each, 0]] for c in range(shown) if counts[c]]
    return torch.cat(rows), each
