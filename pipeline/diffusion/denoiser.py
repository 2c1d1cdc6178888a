"""The hub: a network, a schedule and a parameterization together say "x_hat at (y, gamma)"."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.choose import choose
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.parameterization import Parameterization
from pipeline.diffusion.rows import shaped
from pipeline.diffusion.scaling import prior_variance
from pipeline.diffusion.schedule import LearnedGamma, Schedule

# --- what the network is told of the level: one fixed monotone function of gamma --------------------------------------


def _normalised_gamma(schedule: Schedule, gamma: Tensor) -> Tensor:
    """VDM: (gamma - gamma_min) / (gamma_max - gamma_min)."""
    learned = isinstance(schedule, LearnedGamma)  # its ends carry gradient
    low, high = schedule.ends if learned else (schedule.gamma_min, schedule.gamma_max)
    return (gamma - low) / (high - low)


def _log_sigma(schedule: Schedule, gamma: Tensor) -> Tensor:
    """EDM: c_noise = ln(s) / 4."""
    return gamma / 8


def _step_index(schedule: Schedule, gamma: Tensor) -> Tensor:
    """DDPM, IDDPM: the step index, an exact integer at the nodes of the table; 999 t for laws without a table."""
    steps = 1000 if schedule.table is None else len(schedule.table)
    return schedule.time(gamma) * (steps - 1)


LEVELS: dict[str, Callable[[Schedule, Tensor], Tensor]] = {
    "normalised_gamma": _normalised_gamma,
    "log_sigma": _log_sigma,
    "step_index": _step_index,
}


# --- input scaling c_in: the network sees c_in y ----------------------------------------------------------------------


def _input_z(parameterization: Parameterization, gamma: Tensor) -> Tensor:
    """alpha: the network sees z."""
    return parameterization.alpha_sigma(gamma)[0]


def _input_unit_variance(parameterization: Parameterization, gamma: Tensor) -> Tensor:
    """EDM: 1 / sqrt(s^2 + sigma_data^2)."""
    return torch.rsqrt(torch.exp(gamma) + parameterization.data_std**2)


INPUTS: dict[str, Callable[[Parameterization, Tensor], Tensor]] = {"z": _input_z, "unit_variance": _input_unit_variance}


@dataclass(frozen=True)
class Prediction:
    """x_hat: (n, ...) denoised image; variance: (n, ...) raw learned-variance head (IDDPM's v), or None."""

    x_hat: Tensor
    variance: Tensor | None = None


@dataclass(frozen=True)
class Process:
    """The facts of a trained model that a procedure may need: nothing of its network.

    scaling: key of SCALINGS; the range of gamma it was made for; prior_variance: v of y_1 ~ N(0, v I). law: gamma(t),
    for what is stated in t. nodes: float64, ascending, the only levels a procedure may ask at; None: any.
    """

    scaling: str
    gamma_min: float
    gamma_max: float
    prior_variance: float
    law: Schedule | None = field(default=None, compare=False, repr=False)
    nodes: Tensor | None = field(default=None, compare=False, repr=False)

    def time_law(self, purpose: str) -> Schedule:
        """Raises ValueError where it is not known."""
        if self.law is None:
            raise ValueError(f"{purpose} needs the model's time law gamma(t): give Process(..., law=schedule)")
        return self.law

    def check_levels(self, gammas: Tensor) -> None:
        """Raises ValueError where a queried level lies outside the range the network was made for."""
        low, high = self.gamma_min, self.gamma_max
        slack = 1e-9 * (1 + max(abs(low), abs(high)))
        outside = (gammas < low - slack) | (gammas > high + slack) | torch.isnan(gammas)
        if bool(outside.any()):
            value = float(gammas[outside][0])
            raise ValueError(
                f"gamma {value:.4f} (sigma/alpha {math.exp(min(value, 700) / 2):.4g}) is outside "
                f"[{low:.4f}, {high:.4f}], the range this network was made for"
            )


Shared = float | Sequence[float | None] | None  # see Denoiser.forward
LEVELS_KEPT = 4096


class LevelCoefficients(NamedTuple):
    """What a level says: x_hat = c_skip y + c_out F(c_in y, level); level None: ask the schedule, which learns."""

    c_in: float
    c_skip: float
    c_out: float
    level: float | None


class Denoiser(nn.Module):
    """x_hat at (y, gamma) from any network of signature network(z, level, conditioning) -> F.

    With `learned_variance` the network gives twice the channels: F, then IDDPM's v. `dtype` is what the network is fed:
    float64 for oracles.

    Raises:
        ValueError: the prediction cannot be decoded somewhere in the schedule's range.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        parameterization: Parameterization,
        *,
        level: str = "normalised_gamma",
        network_input: str = "z",
        learned_variance: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        parameterization.check(schedule)
        self.network = network
        self.schedule = schedule  # a learned law is a Module, and so registered with its parameters
        self.parameterization = parameterization
        self.level = choose(LEVELS, level, "level")
        self.network_input = choose(INPUTS, network_input, "network input")
        self.learned_variance = learned_variance
        self.dtype = dtype
        self._kept: dict[float, LevelCoefficients] = {}

    @property
    def process(self) -> Process:
        low, high = self.schedule.gamma_min, self.schedule.gamma_max
        scaling = self.parameterization.scaling
        return Process(scaling, low, high, prior_variance(scaling, high), self.schedule)

    def forward(self, y: Tensor, gamma: Tensor, conditioning: Conditioning, shared: Shared = None) -> Prediction:
        """y (n, ...) in coordinates where alpha = 1, gamma (n,). Coefficients are computed in float64.

        shared: what the caller knows gamma to be as a number, of all rows or of each (None where it does not): these
        coefficients are computed once a level and looked up. A row of many has the floats that it has without; one
        number for all rows is equal to them up to rounding, and faster.
        """
        if isinstance(shared, float | int):
            return self._at_shared_level(y, gamma, conditioning, shared)
        rows = self._coefficients(gamma.double()) if shared is None else self._looked_up(gamma, shared).unbind(1)
        c_in, c_skip, c_out, level = rows
        output, variance = self._split(self._output(y, c_in, level, conditioning))
        x_hat = torch.addcmul(shaped(c_skip, y) * y, shaped(c_out, y), output.to(y.dtype))
        return Prediction(x_hat, variance)

    def _split(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prediction and, where it is learned, the variance head."""
        if not self.learned_variance:
            return output, None
        prediction, variance = output.chunk(2, dim=1)
        return prediction, variance

    def _coefficients(self, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_in, c_skip, c_out and what the network is told of the level, each (n,)."""
        c_in, (c_skip, c_out) = self.network_input(self.parameterization, gamma), self.parameterization.decode(gamma)
        return c_in, c_skip, c_out, self.level(self.schedule, gamma)

    def _at_level(self, gamma: float) -> LevelCoefficients:
        """Kept, but for what depends on a schedule that learns."""
        if gamma in self._kept:
            return self._kept[gamma]
        value = torch.tensor([gamma], dtype=torch.float64)
        c_in, (c_skip, c_out) = self.network_input(self.parameterization, value), self.parameterization.decode(value)
        level = None if isinstance(self.schedule, nn.Module) else float(self.level(self.schedule, value))
        if len(self._kept) >= LEVELS_KEPT:
            self._kept.clear()
        return self._kept.setdefault(gamma, LevelCoefficients(float(c_in), float(c_skip), float(c_out), level))

    def _looked_up(self, gamma: Tensor, known: Sequence[float | None]) -> Tensor:
        """`_coefficients`, float64 (n, 4). A known level is always looked up: in a vector of levels the last bit of a
        function may depend on the place.
        """
        found = [None if value is None else self._at_level(value) for value in known]
        table = [row for row in found if row is not None and row.level is not None]
        whole = torch.tensor(table, dtype=torch.float64, device=gamma.device)
        if len(table) == len(found):
            return whole
        rows = torch.stack(self._coefficients(gamma.double()), dim=1)
        places = [place for place, row in enumerate(found) if row is not None and row.level is not None]
        rows[places] = whole.view(-1, 4)
        return rows

    def _at_shared_level(self, y: Tensor, gamma: Tensor, conditioning: Conditioning, shared: float) -> Prediction:
        c_in, c_skip, c_out, level = self._at_level(shared)
        if level is None:
            told = self.level(self.schedule, gamma.double()).to(self.dtype)
        else:
            told = torch.full((y.shape[0],), level, dtype=self.dtype, device=y.device)
        scaled = y if c_in == 1 else y * c_in
        if scaled.dtype != self.dtype:  # asking costs less than a conversion to what it is already
            scaled = scaled.to(self.dtype)
        output, variance = self.network(scaled, told, conditioning), None
        if self.learned_variance:
            output, variance = self._split(output)
        if output.dtype != y.dtype:
            output = output.to(y.dtype)
        x_hat = torch.add(y, output, alpha=c_out) if c_skip == 1 else (y * c_skip).add_(output, alpha=c_out)
        return Prediction(x_hat, variance)

    def raw(self, y: Tensor, gamma: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output F (n, C or 2 C, ...) itself, for objectives that are stated on it."""
        gamma = gamma.double()
        c_in, level = self.network_input(self.parameterization, gamma), self.level(self.schedule, gamma)
        return self._output(y, c_in, level, conditioning)

    def _output(self, y: Tensor, c_in: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        return self.network((shaped(c_in, y) * y).to(self.dtype), level.to(self.dtype), conditioning)

    def check_levels(self, gammas: Tensor) -> None:
        """Raises ValueError where a queried level lies outside the range the network was made for."""
        self.process.check_levels(gammas)
