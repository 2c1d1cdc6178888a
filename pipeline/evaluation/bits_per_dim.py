"""Likelihood of held-out images: bits/dim of each, their mean, and how sure it is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.likelihood.estimate import Likelihood
from pipeline.evaluation.work import Progress, Worker, finish, score_work
from pipeline.model import SCORED_TOGETHER, Scoring


@dataclass(frozen=True)
class Scores:
    """bits_per_dim: one an image; estimator_errors: standard error of each from the estimator's own draws.

    mean +- standard_error: over images like these, the spread of images and the estimator's noise together;
    estimator_error: of the mean over exactly these images, the estimator's noise alone.
    parts: means that sum to `mean`; evaluations: mean network evaluations an image.
    """

    estimator: str
    bits_per_dim: tuple[float, ...]
    estimator_errors: tuple[float, ...]
    parts: dict[str, float]
    evaluations: float

    @property
    def mean(self) -> float:
        return math.fsum(self.bits_per_dim) / len(self.bits_per_dim)

    @property
    def standard_error(self) -> float:
        """An image's value varies by image and by draw at once, so the spread of the values holds both."""
        n, mean = len(self.bits_per_dim), self.mean
        return math.sqrt(math.fsum((value - mean) ** 2 for value in self.bits_per_dim) / (n - 1) / n)

    @property
    def estimator_error(self) -> float:
        return math.sqrt(math.fsum(value**2 for value in self.estimator_errors)) / len(self.estimator_errors)


def joined(estimator: str, found: Sequence[Likelihood]) -> Scores:
    """The scores of pieces, in order.

    Raises:
        ValueError: fewer than 2 images, or a value that is not finite.
    """
    bits = torch.cat([part.bits_per_dim for part in found]).double()
    if len(bits) < 2:
        raise ValueError(f"bits/dim of {len(bits)} image: at least 2 are needed for a standard error")
    if not bool(torch.isfinite(bits).all()):
        index = int((~torch.isfinite(bits)).nonzero()[0, 0])
        raise ValueError(f"bits/dim of held-out image {index} by '{estimator}' is {float(bits[index])}")
    errors = torch.cat([part.bits_per_dim_standard_error for part in found]).double()
    scale = 1 / (found[0].dimensions * math.log(2))
    parts = {name: float(torch.cat([part.parts[name] for part in found]).mean()) * scale for name in found[0].parts}
    evaluations = float(torch.cat([part.evaluations for part in found]).double().mean())
    return Scores(estimator, tuple(bits.tolist()), tuple(errors.tolist()), parts, evaluations)


def score(
    worker: Worker,
    pixels: Tensor,
    conditioning: Conditioning,
    how: Scoring,
    *,
    part: int = 125,
    seed: int = 0,
    chunk: int = SCORED_TOGETHER,
    progress: Progress | None = None,
) -> Scores:
    """Score images uint8 (n, C, H, W), n >= 2, `part` of them at once; image i depends on (seed, i) alone.

    chunk: rows of every network call; for one value of it a score has the same bits for any part.

    Raises:
        ValueError: fewer than 2 images, an option that the estimator has not.
    """
    results = finish(worker, score_work(pixels, conditioning, how, part, seed, chunk), progress)
    return joined(how.estimator, [result for result in results if isinstance(result, Likelihood)])
