"""Oracles: distributions whose marginals, scores and best denoisers are known in closed form.

For y = x + s eps, s = exp(gamma / 2), an oracle answers queries as a perfect network would: it may stand wherever a
`Denoiser` is asked, and `oracle_denoiser` puts it behind a real one, with any prediction, scaling and schedule. All is
computed in float64. The 8-bit fields, whose images have known probabilities, are in `fields`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from pipeline.choose import choose
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import INPUTS, Denoiser, Prediction, Shared
from pipeline.diffusion.parameterization import Parameterization
from pipeline.diffusion.rows import shaped
from pipeline.diffusion.schedule import Schedule

LOG_TAU = math.log(2 * math.pi)


class Oracle(Protocol):
    """What knows E[x | y]."""

    def __call__(self, y: Tensor, gamma: Tensor, conditioning: Conditioning, shared: Shared = None) -> Prediction: ...


# --- Gaussian mixtures ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """sum_k weights[k] N(means[k], axes[k] diag(spectra[k]) axes[k]^T) in d dimensions.

    weights (k,), summing to 1; means (k, d); spectra (k, d), variances along the axes, at least 0; axes (k, d, d) with
    orthonormal columns, or None where all covariances are diagonal. As an oracle it takes y of any shape (n, ...) with
    d numbers an image; a row with label c >= 0 is of component c, one with label -1 or none of the whole mixture.
    """

    weights: Tensor
    means: Tensor
    spectra: Tensor
    axes: Tensor | None = None

    def __post_init__(self) -> None:
        if self.means.ndim != 2 or self.spectra.shape != self.means.shape or len(self.weights) != len(self.means):
            raise ValueError(
                f"mixture: need weights (k,), means (k, d) and spectra (k, d), got {tuple(self.weights.shape)}, "
                f"{tuple(self.means.shape)} and {tuple(self.spectra.shape)}"
            )
        if bool((self.weights <= 0).any()) or abs(float(self.weights.sum()) - 1) > 1e-9:
            raise ValueError("mixture: weights must be above 0 and sum to 1")
        if bool((self.spectra < 0).any()):
            raise ValueError("mixture: variances must be at least 0")

    @property
    def dimensions(self) -> int:
        return self.means.shape[1]

    def _whitened(self, y: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """(u, v), (n, k, d): y - mean along each component's axes, and the variance of that at the level."""
        centred = y.flatten(1).double().unsqueeze(1) - self.means
        u = centred if self.axes is None else torch.einsum("nki,kij->nkj", centred, self.axes)
        return u, self.spectra + torch.exp(gamma.double())[:, None, None]

    def log_joint(self, y: Tensor, gamma: Tensor) -> Tensor:
        """(n, k): log of weight times density of each component's marginal."""
        u, v = self._whitened(y, gamma)
        return torch.log(self.weights) - 0.5 * (u**2 / v + torch.log(v) + LOG_TAU).sum(-1)

    def log_density(self, y: Tensor, gamma: Tensor | None = None) -> Tensor:
        """(n,) nats: log density of y = x + s eps; of x itself without gamma. float64."""
        if gamma is None:
            gamma = torch.full((len(y),), -math.inf, dtype=torch.float64)
        return torch.logsumexp(self.log_joint(y, gamma), 1)

    def denoise(self, y: Tensor, gamma: Tensor, labels: Tensor | None = None) -> Tensor:
        """E[x | y], shaped like y, in its dtype."""
        u, v = self._whitened(y, gamma)
        joint = self.log_joint(y, gamma)
        if labels is not None:
            other = torch.arange(len(self.weights)) != labels[:, None]
            joint = joint.masked_fill(other & (labels >= 0)[:, None], -math.inf)
        moved = u * (self.spectra / v)
        if self.axes is not None:
            moved = torch.einsum("nkj,kij->nki", moved, self.axes)
        x_hat = torch.einsum("nk,nkd->nd", torch.softmax(joint, 1), self.means + moved)
        return x_hat.view_as(y).to(y.dtype)

    def score(self, y: Tensor, gamma: Tensor) -> Tensor:
        """grad log density of y, shaped like y, in its dtype."""
        return (self.denoise(y, gamma) - y) / shaped(torch.exp(gamma), y)

    def __call__(self, y: Tensor, gamma: Tensor, conditioning: Conditioning, shared: Shared = None) -> Prediction:
        return Prediction(self.denoise(y, gamma, conditioning.label))

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, d) float64."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        draws = torch.randn(count, self.dimensions, generator=generator, dtype=torch.float64)
        draws = draws * self.spectra[component].sqrt()
        if self.axes is not None:
            draws = torch.einsum("nj,nij->ni", draws, self.axes[component])
        return self.means[component] + draws

    def flow(self, y: Tensor, gamma_from: float, gamma_to: float) -> Tensor:
        """The probability flow's exact map between two levels, of one Gaussian, shaped like y.

        Raises:
            ValueError: more than one component; no closed form is known.
        """
        if len(self.weights) != 1:
            raise ValueError(f"flow: known in closed form for one Gaussian, this mixture has {len(self.weights)}")
        u, v = self._whitened(y, torch.full((len(y),), gamma_from, dtype=torch.float64))
        moved = u * ((self.spectra + math.exp(gamma_to)) / v).sqrt()
        if self.axes is not None:
            moved = torch.einsum("nkj,kij->nki", moved, self.axes)
        return (self.means + moved).squeeze(1).view_as(y).to(y.dtype)

    def entropy(self, gamma: float = -math.inf) -> float:
        """-E log density in nats: exact for one Gaussian, by quadrature for mixtures in 1 or 2 dimensions.

        Raises:
            ValueError: a mixture in more dimensions; average `log_density` over samples instead.
        """
        variances = self.spectra + math.exp(gamma)
        if len(self.weights) == 1:
            return 0.5 * float((torch.log(variances) + LOG_TAU + 1).sum())
        if self.dimensions > 2:
            raise ValueError(f"entropy: quadrature is for 1 and 2 dimensions, this mixture has {self.dimensions}")
        width = variances.max().sqrt()
        step = float(variances.min().sqrt()) / 4  # the trapezoid rule on Gaussians is exact to 1e-30 at a quarter
        low, high = float((self.means - 10 * width).min()), float((self.means + 10 * width).max())
        line = torch.arange(low, high, step, dtype=torch.float64)
        points = torch.cartesian_prod(*[line] * self.dimensions).view(-1, self.dimensions)
        total = 0.0
        for start in range(0, len(points), 1 << 16):
            part = points[start : start + (1 << 16)]
            log_p = self.log_density(part, torch.full((len(part),), gamma, dtype=torch.float64))
            total -= float((torch.exp(log_p) * log_p).sum())
        return total * step**self.dimensions


def gaussian(mean: Sequence[float], variance: Sequence[float]) -> GaussianMixture:
    """One Gaussian with independent dimensions."""
    return diagonal_mixture([1.0], [mean], [variance])


def diagonal_mixture(
    weights: Sequence[float], means: Sequence[Sequence[float]], variances: Sequence[Sequence[float]]
) -> GaussianMixture:
    """A mixture of Gaussians with diagonal covariances."""
    return GaussianMixture(
        torch.tensor(weights, dtype=torch.float64),
        torch.tensor(means, dtype=torch.float64),
        torch.tensor(variances, dtype=torch.float64),
    )


def full_mixture(weights: Tensor, means: Tensor, covariances: Tensor) -> GaussianMixture:
    """A mixture of Gaussians with covariances (k, d, d).

    Raises:
        ValueError: a covariance is not symmetric, or has a negative eigenvalue.
    """
    if not torch.allclose(covariances, covariances.mT):
        raise ValueError("mixture: covariances must be symmetric")
    eigh = cast("Callable[[Tensor], tuple[Tensor, Tensor]]", torch.linalg.eigh)  # pyright: ignore[reportUnknownMemberType]
    return GaussianMixture(weights.double(), means.double(), *eigh(covariances.double()))


# --- the empirical mixture --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class EmpiricalMixture:
    """Equal point masses at points (N, d): what a network that has memorised its N training images denoises to.

    Also E[x | y] under the exact score of a data set; its samples are copies of the set.
    """

    points: Tensor

    def log_joint(self, y: Tensor, gamma: Tensor) -> Tensor:
        """(n, N): log of 1/N N(y; point, s^2 I)."""
        flat, points = y.flatten(1).double(), self.points.double()
        distance = (flat**2).sum(1, keepdim=True) - 2 * flat @ points.T + (points**2).sum(1)
        log_variance = gamma.double()[:, None]
        normaliser = 0.5 * points.shape[1] * (LOG_TAU + log_variance) + math.log(len(points))
        return -0.5 * distance.clamp(min=0) * torch.exp(-log_variance) - normaliser

    def log_density(self, y: Tensor, gamma: Tensor) -> Tensor:
        """(n,) nats, float64."""
        return torch.logsumexp(self.log_joint(y, gamma), 1)

    def denoise(self, y: Tensor, gamma: Tensor) -> Tensor:
        """E[x | y], shaped like y, in its dtype."""
        x_hat = torch.softmax(self.log_joint(y, gamma), 1) @ self.points.double()
        return x_hat.view_as(y).to(y.dtype)

    def __call__(self, y: Tensor, gamma: Tensor, conditioning: Conditioning, shared: Shared = None) -> Prediction:
        return Prediction(self.denoise(y, gamma))


# --- an oracle behind a real Denoiser ---------------------------------------------------------------------------------


class OracleNetwork(nn.Module):
    """F of a perfectly trained network: undoes input scaling and level, asks the oracle, forms a x_hat + b eps_hat."""

    def __init__(
        self, oracle: Oracle, schedule: Schedule, parameterization: Parameterization, level: str, network_input: str
    ) -> None:
        super().__init__()
        self.oracle, self.schedule, self.parameterization = oracle, schedule, parameterization
        self.level, self.network_input = level, choose(INPUTS, network_input, "network input")

    def _gamma(self, level: Tensor) -> Tensor:
        if self.level == "normalised_gamma":
            return self.schedule.gamma_min + (self.schedule.gamma_max - self.schedule.gamma_min) * level
        if self.level == "log_sigma":
            return 8 * level
        table = self.schedule.table
        return self.schedule.gamma(level / ((1000 if table is None else len(table)) - 1))

    def forward(self, scaled: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        gamma = self._gamma(level)
        y = scaled / shaped(self.network_input(self.parameterization, gamma), scaled)
        x_hat = self.oracle(y, gamma, conditioning).x_hat
        a, b = self.parameterization.row(gamma)
        return shaped(a, y) * x_hat + shaped(b, y) * (y - x_hat) / shaped(torch.exp(gamma / 2), y)


def oracle_denoiser(
    oracle: Oracle,
    schedule: Schedule,
    parameterization: Parameterization,
    *,
    level: str = "normalised_gamma",
    network_input: str = "z",
) -> Denoiser:
    """A `Denoiser` in float64 whose network is perfect. Same arguments, same errors."""
    network = OracleNetwork(oracle, schedule, parameterization, level, network_input)
    return Denoiser(network, schedule, parameterization, level=level, network_input=network_input, dtype=torch.float64)
