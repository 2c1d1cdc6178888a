"""What every objective is made of: keyed draws of noise and level, one regression, weights over gamma, the Loss.

The regression is written on the residual of the network's own output, R = F - (a x + b eps). With the determinant
D = b alpha - a sigma of a prediction's row, solving alpha x_hat + sigma eps_hat = z and a x_hat + b eps_hat = F gives

    eps_hat - eps = (alpha / D) R        x_hat - x = -(sigma / D) R        v_hat - v = (alpha^2 + sigma^2) / D  R

so that no form of the loss ever subtracts two nearly equal images, however small sigma / alpha is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.formula import Formula
from pipeline.diffusion.parameterization import Parameterization
from pipeline.diffusion.randomness import StepKey
from pipeline.diffusion.rows import shaped
from pipeline.diffusion.schedule import EDM, LearnedGamma, LinearGamma, Schedule, derivative


@dataclass(frozen=True)
class Loss:
    """The loss of one logical shard.

    per_image: (b,) float64 with gradient; its mean is what is minimised.
    parts: named (b,) float64, detached. Likelihood objectives: bits/dim; the others: means over an image's dimensions.
    gamma: (b,) float64, detached: the level each image was asked at.
    observed: (b, 2) float64, detached, for objectives with memory: what `update` wants of every shard, in shard order.
    """

    per_image: Tensor
    parts: dict[str, Tensor]
    gamma: Tensor
    observed: Tensor | None = None


class Objective(Protocol):
    """A training objective: frozen options and one method."""

    def loss(self, denoiser: Denoiser, x: Tensor, conditioning: Conditioning, key: StepKey) -> Loss:
        """x (b, C, H, W) clean images in [-1, 1]; all randomness is from `key`; b is the same for every shard."""
        ...


# --- keyed draws ----------------------------------------------------------------------------------


def draw_noise(x: Tensor, key: StepKey, purpose: str = "noise") -> Tensor:
    """eps ~ N(0, I) like x (b, ...), of this logical shard alone."""
    generator = key.generator(purpose, device=x.device)
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def draw_uniform(count: int, key: StepKey, *, stratified: bool, device: torch.device | str = "cpu") -> Tensor:
    """(count,) float64 in [0, 1).

    stratified: one offset for the whole global batch, its images evenly spaced: (u0 + i / n) mod 1 with i the image's
    place among the n = shards x count (Kingma et al. 2021, appendix I.1). Each is U[0, 1) by itself.
    """
    if not stratified:
        return torch.rand(count, generator=key.generator("level"), dtype=torch.float64).to(device)
    offset = torch.rand((), generator=key.shared_generator("level"), dtype=torch.float64)
    place = torch.arange(key.shard * count, (key.shard + 1) * count, dtype=torch.float64)
    return ((offset + place / (key.shards * count)) % 1).to(device)


def drop_condition(conditioning: Conditioning, probability: float, key: StepKey) -> Conditioning:
    """Each row asks for nothing with this probability: one network learns both models of classifier-free guidance.

    Raises:
        ValueError: probability outside [0, 1].
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"label_dropout must be within 0..1, got {probability:g}")
    if not conditioning.asks or probability == 0:
        return conditioning
    draws = torch.rand(conditioning.rows, generator=key.generator("label-dropout"))
    return conditioning.dropped(draws < probability)


# --- densities: the law a uniform number is sent through to a level -------------------------------


class Quantile(Protocol):
    """gamma(u): the quantile function of a density of levels."""

    def gamma(self, t: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Nodes:
    """The T levels of a table, equally likely."""

    table: Tensor

    def index(self, t: Tensor) -> Tensor:
        return (t * len(self.table)).long().clamp(max=len(self.table) - 1)

    def gamma(self, t: Tensor) -> Tensor:
        return self.table.to(t.device)[self.index(t)]


def table_of(schedule: Schedule, purpose: str) -> Tensor:
    """The schedule's gamma at step index 0..T-1, float64 (T,).

    Raises:
        ValueError: the schedule has no steps.
    """
    table = schedule.table
    if table is None:
        raise ValueError(
            f"{purpose} needs a schedule of discrete steps (linear_beta, cosine), got {type(schedule).__name__}"
        )
    return table


class UniformGamma(LinearGamma):
    """Uniform in gamma over the range of any law, a table's own ends included."""

    def __post_init__(self) -> None:
        pass


class _LogNormal(EDM):
    """EDM's quantile function over the range of a law, a table's own ends included."""

    def __post_init__(self) -> None:
        pass


def _log_normal(schedule: Schedule, p_mean: float, p_std: float) -> Quantile:
    low, high = (torch.tensor(g / 2).double().exp().item() for g in (schedule.gamma_min, schedule.gamma_max))
    return _LogNormal(low, high, p_mean, p_std)


# (schedule, p_mean, p_std) -> quantile function
DENSITIES: dict[str, Callable[[Schedule, float, float], Quantile]] = {
    "schedule": lambda schedule, p_mean, p_std: schedule,  # uniform t
    "table": lambda schedule, p_mean, p_std: Nodes(table_of(schedule, "density 'table'")),
    "uniform_gamma": lambda schedule, p_mean, p_std: UniformGamma(schedule.gamma_min, schedule.gamma_max),
    "log_normal": _log_normal,  # ln(sigma / alpha) ~ N(p_mean, p_std^2) within the range; a flow's logit-normal tau
}


# --- the regression -------------------------------------------------------------------------------


def noisy(x: Tensor, gamma: Tensor, eps: Tensor) -> Tensor:
    """y = x + s eps."""
    return torch.addcmul(x, shaped(torch.exp(gamma / 2), x), eps)


@dataclass(frozen=True)
class Regression:
    """residual: eps_hat - eps, (b, C, H, W); error: (b,) float64, mean over dimensions of its square.

    output: F (b, C, H, W), in the dtype of x; variance: raw learned-variance head, or None.
    """

    residual: Tensor
    error: Tensor
    output: Tensor
    variance: Tensor | None


def regress(denoiser: Denoiser, x: Tensor, gamma: Tensor, eps: Tensor, conditioning: Conditioning) -> Regression:
    """Ask the network at y = x + s eps; gamma (b,) float64. eps_hat - eps is alpha / D times its output's residual."""
    output, variance = denoiser.raw(noisy(x, gamma, eps), gamma, conditioning), None
    if denoiser.learned_variance:
        output, variance = output.chunk(2, dim=1)
    output = output.to(x.dtype)
    a, b = denoiser.parameterization.row(gamma)
    scale = shaped(eps_factor(denoiser.parameterization, gamma), x)
    residual = scale * (output - (shaped(a, x) * x + shaped(b, x) * eps))
    return Regression(residual, residual.square().flatten(1).mean(1).double(), output, variance)


def eps_factor(parameterization: Parameterization, gamma: Tensor) -> Tensor:
    """alpha / D: from the residual of the network's output to that of eps_hat."""
    alpha, sigma = parameterization.alpha_sigma(gamma)
    a, b = parameterization.row(gamma)
    return alpha / (b * alpha - a * sigma)


def check_trains(denoiser: Denoiser, name: str, *, variance: bool = False) -> None:
    """Raises ValueError where the objective would leave a learnt schedule or variance head without a gradient."""
    schedule = denoiser.schedule
    if isinstance(schedule, LearnedGamma) and any(p.requires_grad for p in schedule.parameters()):
        raise ValueError(f"objective '{name}' cannot train a learned schedule: use objective vlb, or a fixed schedule")
    if denoiser.learned_variance and not variance:
        raise ValueError(
            f"objective '{name}' does not train the learned variance: use objective hybrid or discrete_vlb, "
            f"or learned_variance: false"
        )


# --- weights: what multiplies |eps_hat - eps|^2 ---------------------------------------------------


@dataclass(frozen=True)
class Level:
    """A drawn level and the density it came from: gamma = quantile.gamma(u), (b,) float64. formula, table: weights."""

    u: Tensor
    quantile: Quantile
    parameterization: Parameterization
    snr_cap: float
    formula: str = ""
    table: tuple[tuple[float, float], ...] = ()

    @property
    def gamma(self) -> Tensor:
        return self.quantile.gamma(self.u)


def _v_weight(level: Level) -> Tensor:
    """|v_hat - v|^2 with v = alpha eps - sigma x: alpha^2 (1 + s^2)^2, which is 1 + 1 / SNR under 'vp'."""
    alpha, _ = level.parameterization.alpha_sigma(level.gamma)
    return (alpha * (1 + torch.exp(level.gamma))) ** 2


def _elbo_weight(level: Level) -> Tensor:
    """1 / (2 density of gamma): nats of the continuous bound whatever the density (Kingma et al. 2021, eq. 18)."""
    if isinstance(level.quantile, Nodes):
        raise ValueError(
            "weight 'elbo' needs a continuous density; for a table's true weights use objective discrete_vlb"
        )
    return 0.5 * derivative(level.quantile.gamma, level.u)


WEIGHT_NAMES = ("gamma", "snr", "s", "alpha", "sigma")  # what a weight written as a formula may be of


def weight_formula(text: str) -> Formula:
    """w(gamma) from text; snr = exp(-gamma), s = sigma / alpha. Raises ValueError where it is no formula."""
    return Formula(text, WEIGHT_NAMES, "objective.formula")


def _formula_values(gamma: Tensor, parameterization: Parameterization) -> dict[str, Tensor]:
    alpha, sigma = parameterization.alpha_sigma(gamma)
    return dict(zip(WEIGHT_NAMES, (gamma, torch.exp(-gamma), torch.exp(gamma / 2), alpha, sigma), strict=True))


@lru_cache(maxsize=16)
def check_weight_formula(text: str, parameterization: Parameterization, low: float, high: float) -> None:
    """Raises ValueError where the weight is negative or not finite on [low, high], looked at in 1,001 places."""
    gamma = torch.linspace(low, high, 1001, dtype=torch.float64)
    weight_formula(text).nonnegative(_formula_values(gamma, parameterization))


def weight_table(rows: Sequence[Sequence[float]]) -> tuple[tuple[float, float], ...]:
    """Rows (gamma, w), gamma ascending.

    Raises:
        ValueError: fewer than two rows, one that is not two numbers, gamma not ascending, w negative or not finite.
    """
    table = tuple((float(row[0]), float(row[1])) for row in rows if len(row) == 2)
    if len(table) != len(rows) or len(table) < 2:
        raise ValueError("objective.table needs at least two rows [gamma, weight] of two numbers each")
    for index, (gamma, weight) in enumerate(table):
        if not (math.isfinite(gamma) and 0 <= weight < math.inf):
            raise ValueError(f"objective.table: row {index} is [{gamma:g}, {weight:g}]; weights are finite, at least 0")
        if index and gamma <= table[index - 1][0]:
            raise ValueError(f"objective.table: gamma must ascend, got {gamma:g} after {table[index - 1][0]:g}")
    return table


def _formula_weight(level: Level) -> Tensor:
    return weight_formula(level.formula)(_formula_values(level.gamma, level.parameterization))


def _table_weight(level: Level) -> Tensor:
    """Linear in gamma between the rows, constant beyond the ends."""
    gamma = level.gamma
    nodes, weights = gamma.new_tensor(level.table).T.contiguous()
    high = torch.searchsorted(nodes, gamma.contiguous()).clamp(1, len(nodes) - 1)
    share = ((gamma - nodes[high - 1]) / (nodes[high] - nodes[high - 1])).clamp(0, 1)
    return torch.lerp(weights[high - 1], weights[high], share)


WEIGHTS: dict[str, Callable[[Level], Tensor]] = {
    "eps": lambda level: torch.ones_like(level.u),  # L_simple (Ho et al. 2020, eq. 14)
    "x": lambda level: torch.exp(level.gamma),
    "v": _v_weight,
    "flow": lambda level: (1 + torch.exp(level.gamma / 2)) ** 2,  # |(eps - x)_hat - (eps - x)|^2
    "output": lambda level: eps_factor(level.parameterization, level.gamma) ** -2,  # the network's own residual
    "edm": lambda level: (
        1 + torch.exp(level.gamma) / level.parameterization.data_std**2
    ),  # Karras et al. 2022, section 5
    "min_snr": lambda level: (level.snr_cap * torch.exp(level.gamma)).clamp(
        max=1
    ),  # min(SNR, cap) on x (Hang et al. 2023)
    "p2": lambda level: torch.sigmoid(level.gamma),  # 1 / (1 + SNR) (Choi et al. 2022, k = gamma = 1)
    "elbo": _elbo_weight,
    "formula": _formula_weight,
    "table": _table_weight,
}


# --- monitoring -----------------------------------------------------------------------------------


def binned(values: Tensor, gamma: Tensor, gamma_min: float, gamma_max: float, bins: int) -> Tensor:
    """(bins, 2) float64: sum of the values and how many there are in each of the equal bins of [gamma_min, gamma_max],
    low noise first; levels outside go to the bins at the ends. values, gamma: float64, of one shape.

    Sums add over shards and steps; sum / count is the mean of a bin.
    """
    place = ((gamma.flatten() - gamma_min) / (gamma_max - gamma_min) * bins).long().clamp(0, bins - 1)
    rows = torch.stack([values.flatten(), torch.ones_like(values).flatten()], dim=1)
    return rows.new_zeros(bins, 2).index_add_(0, place, rows)
