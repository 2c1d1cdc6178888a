"""What a likelihood estimator returns, and what all of them share."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.rows import row_sum


@dataclass(frozen=True)
class Likelihood:
    """One value an image, float64 (n,) in nats, of the 8-bit image (a probability, not a density).

    nats: negative log-likelihood, or an upper bound of it, as estimated; parts: named terms that sum to it.
    standard_errors: by source of chance ('noise', 'probes', 'dequantisation').
    evaluations: int64 (n,), network evaluations; dimensions: D.
    solver_error: (n,) estimated error of an ODE solve, nats, or None.
    freedom: (n,) degrees of freedom that `standard_error` was estimated with, inf where many.
    """

    nats: Tensor
    parts: dict[str, Tensor]
    standard_errors: dict[str, Tensor]
    evaluations: Tensor
    dimensions: int
    solver_error: Tensor | None = None
    freedom: Tensor | None = None

    @property
    def bits_per_dim(self) -> Tensor:
        return self.nats / (self.dimensions * math.log(2))

    @property
    def standard_error(self) -> Tensor:
        """All sources together, nats; they are independent."""
        total = torch.zeros_like(self.nats)
        for value in self.standard_errors.values():
            total = total + value**2
        return total.sqrt()

    @property
    def interval(self) -> tuple[Tensor, Tensor]:
        """Ends of each image's 95% interval, nats: Student's t, by its expansion about the normal."""
        z = 1.959963984540054
        half = self.standard_error * z
        if self.freedom is not None:
            terms = (
                (z**3 + z) / 4,
                (5 * z**5 + 16 * z**3 + 3 * z) / 96,
                (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
            )
            widening = sum((term / self.freedom**power for power, term in enumerate(terms, 1)), torch.zeros_like(half))
            half = half + self.standard_error * widening
        return self.nats - half, self.nats + half

    @property
    def bits_per_dim_standard_error(self) -> Tensor:
        return self.standard_error / (self.dimensions * math.log(2))


def sum_parts(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum(0)


@dataclass(frozen=True)
class Variance:
    """An estimated variance (n,), nats squared, and the degrees of freedom (n,) of its estimate, inf if known."""

    value: Tensor
    freedom: Tensor

    @staticmethod
    def known(value: Tensor) -> "Variance":
        return Variance(value, torch.full_like(value, math.inf))

    def __add__(self, other: "Variance") -> "Variance":
        """Of the sum of independent ones (Welch 1947, Satterthwaite 1946)."""
        total = self.value + other.value
        spread = self.value**2 / self.freedom + other.value**2 / other.freedom
        return Variance(total, torch.where(spread > 0, total**2 / spread, math.inf))


def mean_and_variance(values: Tensor) -> tuple[Tensor, Variance]:
    """Of independent values (n, k), k > 1: the mean of each row, and the variance of that mean."""
    k = values.shape[1]
    mean = row_sum(values) / k
    variance = row_sum((values - mean[:, None]) ** 2) / (k * (k - 1))
    return mean, Variance(variance, torch.full_like(variance, k - 1))


def repeat_rows(n: int, times: int, like: Tensor) -> Tensor:
    """int64: 0, 0, ..., 1, 1, ..., each row's place `times` times."""
    return torch.arange(n, device=like.device).repeat_interleave(times)


def check_input(x: Tensor, noise: Noise, **counts: int) -> None:
    """Raises ValueError for no images, another number of seeds, or a named count below 1."""
    if x.ndim < 2 or not len(x):
        raise ValueError(f"likelihood: images must have shape (n, ...) with n at least 1, got {tuple(x.shape)}")
    if len(noise) != len(x):
        raise ValueError(f"likelihood: {len(x)} images need as many noise seeds, got {len(noise)}")
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"likelihood: {name} must be at least 1, got {value}")
