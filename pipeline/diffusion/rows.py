"""Sums over an image's dimensions, and levels shaped to multiply images."""

import torch
from torch import Tensor


def row_sum(values: Tensor) -> Tensor:
    """(n, ...) -> (n,): the sum of each row, by pairwise folding.

    Elementwise additions alone, so that a row's bits do not depend on how many rows there are, on any device.
    """
    flat = values.flatten(1)
    while flat.shape[1] > 1:
        half = flat.shape[1] // 2
        odd = flat[:, 2 * half :]
        flat = flat[:, :half] + flat[:, half : 2 * half]
        if odd.shape[1]:
            flat = torch.cat([flat[:, :-1], flat[:, -1:] + odd], dim=1)
    return flat[:, 0] if flat.shape[1] else flat.sum(1)


def shaped(level: Tensor, like: Tensor) -> Tensor:
    """A value a row, (n,), shaped (n, 1, ..., 1) to meet `like` (n, ...), in its dtype."""
    return level.to(like.dtype).view(-1, *[1] * (like.ndim - 1))
