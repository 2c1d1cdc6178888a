"""What a likelihood estimator returns, and what all of them share."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.rows import row_sum

Z_95 = 1.959963984540054  # half-width of a 95% interval, in standard errors
NEARLY_NORMAL = 1000.0  # degrees of freedom from which the expansion about the normal is exact to 1e-11


@lru_cache(maxsize=1)
def _gauss_legendre(points: int = 48) -> tuple[Tensor, Tensor]:
    """Nodes and weights (points,) on [0, 1] (Golub & Welsch 1969)."""
    n = torch.arange(1, points, dtype=torch.float64)
    side = torch.diag(n / torch.sqrt(4 * n**2 - 1), 1)
    nodes, vectors = cast(tuple[Tensor, Tensor], torch.linalg.eigh(side + side.T))  # pyright: ignore
    return (nodes + 1) / 2, vectors[0] ** 2


def t_95(freedom: Tensor) -> Tensor:
    """Half-width of Student's 95% interval in standard errors, elementwise, freedom >= 1, not only whole, and inf.

    With t = sqrt(freedom) tan(angle) the probability is an integral of cos(angle)^(freedom - 1) from 0, concave, which
    Newton's method solves from the left; from NEARLY_NORMAL on Fisher's expansion about the normal.
    """
    z = Z_95
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    expansion = sum((term / freedom**power for power, term in enumerate(terms, 1)), torch.full_like(freedom, z))
    few = freedom.clamp(1, NEARLY_NORMAL)
    nodes, weights = (value.to(freedom.device) for value in _gauss_legendre())
    scale = 2 / math.sqrt(math.pi) * torch.exp(torch.lgamma((few + 1) / 2) - torch.lgamma(few / 2))
    angle = torch.zeros_like(few)
    for _ in range(40):
        power = torch.cos(angle[..., None] * nodes) ** (few[..., None] - 1)
        missing = 0.95 / scale - angle * (power * weights).sum(-1)
        angle = angle + missing / torch.cos(angle) ** (few - 1)
    return torch.where(freedom > NEARLY_NORMAL, expansion, few.sqrt() * torch.tan(angle))


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
        """Ends of each image's 95% interval, nats: Student's t of `freedom`."""
        half = self.standard_error * (Z_95 if self.freedom is None else t_95(self.freedom))
        return self.nats - half, self.nats + half

    def to(self, device: torch.device | str) -> "Likelihood":
        """The same on a device."""
        return replace(
            self,
            nats=self.nats.to(device),
            parts={name: value.to(device) for name, value in self.parts.items()},
            standard_errors={name: value.to(device) for name, value in self.standard_errors.items()},
            evaluations=self.evaluations.to(device),
            solver_error=None if self.solver_error is None else self.solver_error.to(device),
            freedom=None if self.freedom is None else self.freedom.to(device),
        )

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


def log_mean_variance(logs: Tensor) -> Variance:
    """Of log mean exp(logs) over independent values (n, k), k > 1, by the jackknife (Tukey 1958).

    To first order it would be that of the weights' mean, which cannot exceed 1 where one weight outweighs the others.
    Degrees of freedom: half of the number of weights in effect less one, since its error goes with the value's.
    """
    k = logs.shape[1]
    own = torch.eye(k, dtype=torch.bool, device=logs.device)
    without = torch.logsumexp(logs[:, None].expand(-1, k, -1).masked_fill(own, -math.inf), 2)
    variance = mean_and_variance(without)[1].value * (k - 1) ** 2
    in_effect = 1 / row_sum(torch.softmax(logs, 1) ** 2)
    return Variance(variance, ((in_effect - 1) / 2).clamp(min=1))


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
