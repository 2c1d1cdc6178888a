"""Near-copies: samples closer to a training image than real images that were never trained on."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import hypergeom
from torch import Tensor

from pipeline.evaluation.statistics import Estimate, wilson

ROWS_AT_ONCE = 1024
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Nearest:
    """distance (n,): root mean square difference to the nearest reference, grey levels; index (n,): which one."""

    distance: NDArray[np.float64]
    index: NDArray[np.int64]


def nearest(images: Tensor, references: Tensor) -> Nearest:
    """The nearest reference of each image; both uint8 (., C, H, W), compared pixel by pixel.

    Candidates come from |a|^2 - 2 a.b + |b|^2 in float32; the winner's distance is summed exactly, so a copy is at 0.

    Raises:
        ValueError: no reference, or other shapes.
    """
    if not len(references) or images.shape[1:] != references.shape[1:]:
        raise ValueError(
            f"nearest: images of shape {tuple(images.shape)} against references of shape {tuple(references.shape)}"
        )
    flat, known = images.flatten(1).float(), references.flatten(1).float()
    best = torch.full((len(flat),), torch.inf)
    index = torch.zeros(len(flat), dtype=torch.int64)
    for start in range(0, len(known), ROWS_AT_ONCE):
        block = known[start : start + ROWS_AT_ONCE]
        squares = torch.addmm((block**2).sum(1)[None, :], flat, block.T, alpha=-2.0)
        value, place = squares.min(1)
        closer = value < best
        best = torch.where(closer, value, best)
        index = torch.where(closer, place + start, index)
    gaps = [
        (images[rows].double() - references[index[rows]].double()).flatten(1).square().mean(1).sqrt()
        for rows in torch.arange(len(images)).split(ROWS_AT_ONCE)
    ]
    return Nearest(torch.cat(gaps).numpy(), index.numpy())


@dataclass(frozen=True)
class Memorisation:
    """threshold: distance (grey levels, rms) below which an image counts as a near-copy of a training image.

    share: of the samples; held_out_share: of real images that were not trained on, by which the threshold was set.
    p_value: of the difference by chance, were samples no nearer than held-out images (Fisher's exact test, one-sided).
    distances to the nearest training image, (n,) each; index: which training image, of each sample.
    """

    threshold: float
    share: Estimate
    held_out_share: Estimate
    p_value: float
    distances: NDArray[np.float64]
    held_out_distances: NDArray[np.float64]
    index: NDArray[np.int64]

    @property
    def copies(self) -> bool:
        """Whether more samples are near-copies than chance gives images that were not trained on, at the 5% level."""
        return self.p_value < SIGNIFICANT

    @property
    def median_ratio(self) -> float:
        """Median distance of samples over that of held-out images: below 1, samples are closer to the training set."""
        return float(np.median(self.distances) / max(np.median(self.held_out_distances), 1e-12))


def memorisation(samples: Tensor, train: Tensor, held_out: Tensor, near_copy_share: float) -> Memorisation:
    """Near-copies among samples, by the distance that `near_copy_share` of held-out images keep below; uint8 images."""
    ours, theirs = nearest(samples, train), nearest(held_out, train)
    threshold = float(np.quantile(theirs.distance, near_copy_share, method="higher"))
    close, known = int((ours.distance <= threshold).sum()), int((theirs.distance <= threshold).sum())
    return Memorisation(
        threshold,
        wilson(close, len(samples)),
        wilson(known, len(held_out)),
        float(hypergeom.sf(close - 1, len(samples) + len(held_out), close + known, len(samples))),
        ours.distance,
        theirs.distance,
        ours.index,
    )
