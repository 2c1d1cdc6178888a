"""Noise schedules: the time laws gamma(t).

gamma = log(sigma^2 / alpha^2) = -log SNR is the only noise coordinate (`scaling`: what alpha and sigma are then;
`grids`: the levels samplers ask at). t runs from 0 (data) to 1 (noise) over the part
of the law that is kept; laws that reach infinity are cut. A law is told by three facts: `gamma(t)`, its inverse
`time(gamma)`, and the end points `gamma_min`, `gamma_max`. Laws defined at T discrete steps also have `table`, gamma at
step index 0..T-1, with t = index / (T - 1) and linear interpolation between the nodes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn


class _Special(Protocol):
    """The normal distribution function and its inverse, which torch leaves untyped."""

    def ndtr(self, value: Tensor) -> Tensor: ...
    def ndtri(self, value: Tensor) -> Tensor: ...


_special = cast(_Special, torch.special)

GAMMA_LIMIT = 20.0  # |gamma| of a continuous law beyond this is refused; a table keeps its own ends


@runtime_checkable
class Schedule(Protocol):
    """A time law. `gamma` and `time` keep the dtype and device of their argument.

    table: gamma at step index 0..T-1 of a law of discrete steps, float64 (T,); None of others.
    """

    @property
    def gamma_min(self) -> float: ...
    @property
    def gamma_max(self) -> float: ...
    @property
    def table(self) -> Tensor | None: ...
    def gamma(self, t: Tensor) -> Tensor: ...
    def time(self, gamma: Tensor) -> Tensor: ...


def evenly(table: Tensor, steps: int) -> Tensor:
    """Gamma at indices round(i (T - 1) / (steps - 1)) of a table, both ends included, descending."""
    return table[torch.linspace(0, len(table) - 1, steps, dtype=torch.float64).round().long()].flip(0)


@torch.enable_grad()
def derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """d function / dt at each entry of t, by autodiff; function acts entry by entry. Detached."""
    t = t.detach().requires_grad_()
    return torch.autograd.grad(function(t).sum(), t)[0]


# --- laws with a published table --------------------------------------------------------------------------------------


class Tabulated:
    """A law known at T steps. Subclasses give `betas`, float64 (T,).

    Its ends are the table's own, 22.61 for the cosine law at T = 4000; a `gamma_limit` refuses those beyond it.
    """

    steps: int
    gamma_limit: float

    def betas(self) -> Tensor:
        raise NotImplementedError

    @property
    def table(self) -> Tensor:
        return self._table

    @cached_property
    def _table(self) -> Tensor:
        """gamma at step index 0..T-1, float64 (T,): log((1 - abar) / abar).

        1 - abar is summed as -expm1(log abar), exact also where abar is close to 1.
        """
        log_abar = torch.log1p(-self.betas()).cumsum(0)
        table = torch.log(-torch.expm1(log_abar)) - log_abar
        if table.abs().max() > self.gamma_limit:
            index = int((table.abs() > self.gamma_limit).nonzero()[0])
            raise ValueError(
                f"schedule: gamma is {table[index]:.2f} at step index {index}, beyond gamma_limit "
                f"{self.gamma_limit:g}; use fewer steps or a larger gamma_limit"
            )
        return table

    @property
    def gamma_min(self) -> float:
        return float(self.table[0])

    @property
    def gamma_max(self) -> float:
        return float(self.table[-1])

    def gamma(self, t: Tensor) -> Tensor:
        position = (t.double() * (self.steps - 1)).clamp(0, self.steps - 1)
        low = position.floor().clamp(max=self.steps - 2).long()
        table = self.table.to(t.device)
        return torch.lerp(table[low], table[low + 1], position - low).to(t.dtype)

    def time(self, gamma: Tensor) -> Tensor:
        """Exactly index / (T - 1) at the nodes."""
        table = self.table.to(gamma.device)
        value = gamma.double()
        high = torch.searchsorted(table, value.contiguous()).clamp(1, self.steps - 1)
        low_gamma, high_gamma = table[high - 1], table[high]
        position = (high - 1) + ((value - low_gamma) / (high_gamma - low_gamma)).clamp(0, 1)
        return (position / (self.steps - 1)).to(gamma.dtype)


def _check_range(gamma_min: float, gamma_max: float) -> None:
    if not -GAMMA_LIMIT <= gamma_min < gamma_max <= GAMMA_LIMIT:
        raise ValueError(
            f"schedule: need {-GAMMA_LIMIT:g} <= gamma_min < gamma_max <= {GAMMA_LIMIT:g}, "
            f"got {gamma_min:g} and {gamma_max:g}"
        )


def _check_steps(steps: int) -> None:
    if steps < 2:
        raise ValueError(f"schedule.steps must be at least 2, got {steps}")


@dataclass(frozen=True)
class LinearBeta(Tabulated):
    """DDPM's linear betas (Ho et al. 2020), end points scaled by 1000 / T as in IDDPM."""

    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    gamma_limit: float = math.inf

    def __post_init__(self) -> None:
        _check_steps(self.steps)
        if not 0 < self.beta_start <= self.beta_end:
            raise ValueError(
                f"schedule linear_beta: need 0 < beta_start <= beta_end, got {self.beta_start:g} and {self.beta_end:g}"
            )

    def betas(self) -> Tensor:
        scale = 1000 / self.steps
        betas = torch.linspace(self.beta_start * scale, self.beta_end * scale, self.steps, dtype=torch.float64)
        if betas.max() >= 1:
            raise ValueError(
                f"schedule linear_beta: beta reaches {betas.max():.3g} >= 1 with steps {self.steps}; "
                f"use more than {math.floor(1000 * self.beta_end)} steps"
            )
        return betas


@dataclass(frozen=True)
class ScaledLinear(Tabulated):
    """Latent diffusion's betas (Rombach et al. 2022, their code): evenly spaced in their square roots."""

    steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    gamma_limit: float = math.inf

    def __post_init__(self) -> None:
        _check_steps(self.steps)
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"schedule scaled_linear: need 0 < beta_start <= beta_end < 1, got {self.beta_start:g} and "
                f"{self.beta_end:g}"
            )

    def betas(self) -> Tensor:
        return torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.steps, dtype=torch.float64) ** 2


@dataclass(frozen=True)
class Cosine(Tabulated):
    """IDDPM's cosine law (Nichol & Dhariwal 2021, eq. 17): f(t) = cos^2((t/T + s) / (1 + s) pi/2), betas clipped."""

    steps: int = 1000
    s: float = 0.008
    max_beta: float = 0.999
    gamma_limit: float = math.inf

    def __post_init__(self) -> None:
        _check_steps(self.steps)
        if not (self.s > 0 and 0 < self.max_beta < 1):
            raise ValueError(
                f"schedule cosine: need s above 0 and max_beta in (0, 1), got {self.s:g} and {self.max_beta:g}"
            )

    def betas(self) -> Tensor:
        t = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
        f = torch.cos((t + self.s) / (1 + self.s) * math.pi / 2) ** 2
        return (1 - f[1:] / f[:-1]).clamp(max=self.max_beta)


# --- continuous laws --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VP:
    """The variance-preserving SDE (Song et al. 2021, eq. 32): log alpha = -t^2 (b1 - b0) / 4 - t b0 / 2."""

    @property
    def table(self) -> None:
        return None

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-5

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max < math.inf:
            raise ValueError(f"schedule: need 0 < beta_min <= beta_max, got {self.beta_min:g} and {self.beta_max:g}")
        if not 0 < self.t_min < 1:
            raise ValueError(f"schedule: t_min must be above 0, where no noise is left, and below 1: {self.t_min:g}")

    def _sde_time(self, t: Tensor) -> Tensor:
        return self.t_min + (1 - self.t_min) * t

    def _integral(self, t: Tensor) -> Tensor:
        """-2 log alpha = integral of beta."""
        tau = self._sde_time(t)
        return tau * self.beta_min + 0.5 * tau**2 * (self.beta_max - self.beta_min)

    def _inverse_integral(self, integral: Tensor) -> Tensor:
        slope = self.beta_max - self.beta_min
        tau = 2 * integral / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * integral))
        return (tau - self.t_min) / (1 - self.t_min)

    def gamma(self, t: Tensor) -> Tensor:
        return torch.log(torch.expm1(self._integral(t)))

    def time(self, gamma: Tensor) -> Tensor:
        return self._inverse_integral(torch.log1p(torch.exp(gamma)))  # the bits of softplus depend on the place

    @property
    def gamma_min(self) -> float:
        return float(self.gamma(torch.zeros((), dtype=torch.float64)))

    @property
    def gamma_max(self) -> float:
        return float(self.gamma(torch.ones((), dtype=torch.float64)))


@dataclass(frozen=True)
class SubVP(VP):
    """The sub-VP SDE (Song et al. 2021, eq. 34): alpha as in VP, sigma = 1 - alpha^2 (no root).

    t_min is larger than VP's: at 1e-5 the noise would be too small for float32.
    """

    t_min: float = 1e-3

    def gamma(self, t: Tensor) -> Tensor:
        integral = self._integral(t)
        return 2 * torch.log(-torch.expm1(-integral)) + integral

    def time(self, gamma: Tensor) -> Tensor:
        s = torch.exp(gamma / 2)
        return self._inverse_integral(2 * torch.log((s + torch.sqrt(s**2 + 4)) / 2))


@dataclass(frozen=True)
class LinearGamma:
    """gamma linear in t (VDM's fixed law, Kingma et al. 2021)."""

    @property
    def table(self) -> None:
        return None

    gamma_min: float = -13.3
    gamma_max: float = 5.0

    def __post_init__(self) -> None:
        _check_range(self.gamma_min, self.gamma_max)

    def gamma(self, t: Tensor) -> Tensor:
        return self.gamma_min + (self.gamma_max - self.gamma_min) * t

    def time(self, gamma: Tensor) -> Tensor:
        return (gamma - self.gamma_min) / (self.gamma_max - self.gamma_min)


@dataclass(frozen=True)
class Geometric:
    """The variance-exploding law: sigma geometric from sigma_min to sigma_max (Song & Ermon 2019; Song et al. 2021)."""

    @property
    def table(self) -> None:
        return None

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"schedule: need 0 < sigma_min < sigma_max, got {self.sigma_min:g} and {self.sigma_max:g}")
        _check_range(self.gamma_min, self.gamma_max)

    @property
    def gamma_min(self) -> float:
        return 2 * math.log(self.sigma_min)

    @property
    def gamma_max(self) -> float:
        return 2 * math.log(self.sigma_max)

    def gamma(self, t: Tensor) -> Tensor:
        return self.gamma_min + (self.gamma_max - self.gamma_min) * t

    def time(self, gamma: Tensor) -> Tensor:
        return (gamma - self.gamma_min) / (self.gamma_max - self.gamma_min)


@dataclass(frozen=True)
class EDM(Geometric):
    """EDM's levels (Karras et al. 2022): ln sigma ~ N(p_mean, p_std^2) cut to [sigma_min, sigma_max].

    gamma(t) is its quantile, so a uniform t draws sigma from EDM's training density.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    p_mean: float = -1.2
    p_std: float = 1.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.p_std > 0:
            raise ValueError(f"schedule edm: p_std must be above 0, got {self.p_std:g}")

    def _cdf(self, gamma: Tensor) -> Tensor:
        return _special.ndtr((gamma / 2 - self.p_mean) / self.p_std)

    def _ends(self, like: Tensor) -> tuple[Tensor, Tensor]:
        ends = torch.tensor([self.gamma_min, self.gamma_max], dtype=torch.float64, device=like.device)
        low, high = self._cdf(ends)
        return low, high

    def gamma(self, t: Tensor) -> Tensor:
        low, high = self._ends(t)
        quantile = _special.ndtri(low + (high - low) * t.double())
        gamma = 2 * (self.p_mean + self.p_std * quantile)
        return gamma.clamp(self.gamma_min, self.gamma_max).to(t.dtype)

    def time(self, gamma: Tensor) -> Tensor:
        low, high = self._ends(gamma)
        return ((self._cdf(gamma.double()) - low) / (high - low)).to(gamma.dtype)


@dataclass(frozen=True)
class Flow:
    """Rectified flow (Liu et al. 2022): gamma = 2 log(tau / (1 - tau)), tau uniform, cut at gamma_min and gamma_max."""

    @property
    def table(self) -> None:
        return None

    gamma_min: float = -13.3
    gamma_max: float = 14.0

    def __post_init__(self) -> None:
        _check_range(self.gamma_min, self.gamma_max)

    def _tau_ends(self) -> tuple[float, float]:
        return 1 / (1 + math.exp(-self.gamma_min / 2)), 1 / (1 + math.exp(-self.gamma_max / 2))

    def gamma(self, t: Tensor) -> Tensor:
        low, high = self._tau_ends()
        tau = low + (high - low) * t.double()
        return (2 * torch.logit(tau)).to(t.dtype)

    def time(self, gamma: Tensor) -> Tensor:
        low, high = self._tau_ends()
        tau = 1 / (1 + torch.exp(gamma.double() / -2))  # the bits of torch.sigmoid depend on the place
        return ((tau - low) / (high - low)).to(gamma.dtype)


# --- learned laws (Kingma et al. 2021, appendix H) --------------------------------------------------------------------


class LearnedGamma(nn.Module):
    """A monotone law with learnt interior, end points fixed (default) or learnt.

    shape 'net': l1(t) + l3(sigmoid(l2(l1(t)))) with positive weights, `hidden` units; 'scalar': a straight line, so
    that only the end points can learn. The raw curve is rescaled so that gamma(0) and gamma(1) are exactly the end
    points: what a network is conditioned on (normalised gamma) is then always consistent with the law.
    """

    @property
    def table(self) -> None:
        return None

    def __init__(
        self,
        gamma_min: float = -13.3,
        gamma_max: float = 5.0,
        shape: str = "net",
        hidden: int = 1024,
        learn_ends: bool = False,
    ) -> None:
        super().__init__()
        if shape not in ("net", "scalar"):
            raise ValueError(f"schedule learned: shape must be 'net' or 'scalar', got '{shape}'")
        LinearGamma(gamma_min, gamma_max)  # checks the range
        self.shape = shape
        self.ends = nn.Parameter(torch.tensor([gamma_min, gamma_max], dtype=torch.float64), requires_grad=learn_ends)
        if shape == "net":
            self.l1 = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
            self.l2_weight = nn.Parameter(torch.empty(hidden, dtype=torch.float64))
            self.l2_bias = nn.Parameter(torch.zeros(hidden, dtype=torch.float64))
            self.l3_weight = nn.Parameter(torch.empty(hidden, dtype=torch.float64))
            generator = torch.Generator().manual_seed(0)
            self.l2_weight.data.normal_(0, 1, generator=generator)
            self.l2_bias.data.normal_(0, 1, generator=generator)
            self.l3_weight.data.normal_(0, 0.01, generator=generator)

    def _hidden(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The sigmoids (..., hidden) and the slope in t of what they are taken of."""
        weight = self.l2_weight.abs()
        line = self.l1.abs() * t.double()[..., None]
        return torch.sigmoid(weight * (2 * line - 1) + self.l2_bias), 2 * self.l1.abs() * weight

    def _raw(self, t: Tensor) -> Tensor:
        """Increasing in t, float64, any shape."""
        if self.shape == "scalar":
            return t.double()
        hidden, _ = self._hidden(t)
        return self.l1.abs() * t.double() + (self.l3_weight.abs() * hidden).mean(-1)

    def _ends_of_raw(self, t: Tensor) -> tuple[Tensor, Tensor]:
        raw_0, raw_1 = self._raw(torch.tensor([0.0, 1.0], dtype=torch.float64, device=t.device))
        return raw_0, raw_1 - raw_0

    def fraction(self, t: Tensor) -> Tensor:
        """(gamma(t) - gamma(0)) / (gamma(1) - gamma(0)), float64: the interior alone, 0 at t = 0 and 1 at t = 1."""
        raw_0, height = self._ends_of_raw(t)
        return (self._raw(t) - raw_0) / height

    def interior(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`fraction` and its first and second derivatives in t, float64, each differentiable in the parameters."""
        if self.shape == "scalar":
            return t.double(), torch.ones_like(t, dtype=torch.float64), torch.zeros_like(t, dtype=torch.float64)
        raw_0, height = self._ends_of_raw(t)
        hidden, slope = self._hidden(t)
        out = self.l3_weight.abs()
        first = hidden * (1 - hidden) * slope
        second = first * (1 - 2 * hidden) * slope
        value = self.l1.abs() * t.double() + (out * hidden).mean(-1)
        return (
            (value - raw_0) / height,
            (self.l1.abs() + (out * first).mean(-1)) / height,
            (out * second).mean(-1) / height,
        )

    def gamma(self, t: Tensor) -> Tensor:
        """Differentiable in t and in the parameters; float64 inside."""
        return (self.ends[0] + (self.ends[1] - self.ends[0]) * self.fraction(t)).to(t.dtype)

    @torch.no_grad()
    def time(self, gamma: Tensor) -> Tensor:
        """By bisection, to 2^-50."""
        target = gamma.double()
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(50):
            middle = (low + high) / 2
            above = self.gamma(middle) > target
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return ((low + high) / 2).to(gamma.dtype)

    @property
    def gamma_min(self) -> float:
        return float(self.ends[0].detach())

    @property
    def gamma_max(self) -> float:
        return float(self.ends[1].detach())


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "linear_beta": LinearBeta,
    "scaled_linear": ScaledLinear,
    "cosine": Cosine,
    "vp": VP,
    "subvp": SubVP,
    "geometric": Geometric,
    "edm": EDM,
    "flow": Flow,
    "linear_gamma": LinearGamma,
    "learned": LearnedGamma,
}
