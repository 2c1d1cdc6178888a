"""Samplers: one short procedure each, and the table SAMPLERS.

All walk in y = z / alpha, where every scaling looks the same, so any of them samples any trained model. A procedure is
called as

    fn(y, gammas, noise, conditioning, **options) -> Procedure[Tensor]

y: (n, ...) the start at gammas[0], owned by the procedure, which overwrites it. gammas: float64 (steps,), strictly
descending, the levels to query. noise: one generator an image, read only where a move adds noise. The last move goes to
s = 0, where y is x_hat, and that is what the procedure returns. Coefficients are Python floats, computed once at the
call; bad options raise there, not in a step. `Sampler.start` puts the limit of x_hat, option `clip`, around any
of them; eps_hat = (y - x_hat) / s follows it, being never stored. First-order samplers are here, the others in the
modules they are imported from.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pipeline.choose import choose
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Process
from pipeline.diffusion.guidance import CLIP, clipped
from pipeline.diffusion.likelihood.decoders import decoded_pixels
from pipeline.diffusion.options import options_of
from pipeline.diffusion.pixels import PixelGrid
from pipeline.diffusion.procedure import Procedure, Query
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.sampling.adaptive import adaptive
from pipeline.diffusion.sampling.langevin import langevin, predictor_corrector
from pipeline.diffusion.sampling.moves import (
    Move,
    ancestral_moves,
    ddim_moves,
    euler_ancestral_moves,
    last_deviation,
    levels,
    rows,
    sde_moves,
    walk,
)
from pipeline.diffusion.sampling.second_order import dpmpp_2m, dpmpp_2m_sde, heun
from pipeline.diffusion.scaling import prior_variance


def ddim(
    y: Tensor,
    gammas: Tensor,
    noise: Noise,
    conditioning: Conditioning,
    *,
    eta: float | Sequence[float] = 0.0,
    sigma_1: float | str = 0.0,
    process: Process | None = None,
) -> Procedure[Tensor]:
    """DDIM with any eta, one value or one a move: 0 deterministic, 1 DDPM's posterior variance. See `ddim_moves`.

    sigma_1: deviation of the noise on x_hat in the last move, 0..1 in model space, where eta's formula gives 0 (Song et
    al. 2020, eq. 10); 'beta': sqrt(beta_1) of the model's own scaling.
    """
    if sigma_1 == "beta":
        if process is None:
            raise ValueError("sigma_1 'beta' depends on the scaling a model was trained in: give process=")
        deviation = last_deviation(float(gammas[-1]), process.scaling) if gammas.ndim == 1 and len(gammas) else 0.0
    elif isinstance(sigma_1, str) or not 0 <= sigma_1 <= 1:
        raise ValueError(f"sigma_1 must be within 0..1 or 'beta', got {sigma_1!r}")
    else:
        deviation = float(sigma_1)
    grid = levels(gammas, y)
    procedure = walk(y, grid, ddim_moves(grid, eta), noise, conditioning)
    return procedure if deviation == 0 else _noised(procedure, deviation, noise)


def _noised(procedure: Procedure[Tensor], deviation: float, noise: Noise) -> Procedure[Tensor]:
    x_hat = yield from procedure
    return torch.add(x_hat, noise.normal_like(x_hat), alpha=deviation)


def euler(y: Tensor, gammas: Tensor, noise: Noise, conditioning: Conditioning) -> Procedure[Tensor]:
    """Euler on the probability flow in s. In y this is DDIM with eta 0, exactly (Karras et al. 2022)."""
    return ddim(y, gammas, noise, conditioning)


def euler_ancestral(
    y: Tensor,
    gammas: Tensor,
    noise: Noise,
    conditioning: Conditioning,
    *,
    eta: float = 1.0,
) -> Procedure[Tensor]:
    """Euler's step too far and fresh noise back. See `euler_ancestral_moves`."""
    grid = levels(gammas, y)
    return walk(y, grid, euler_ancestral_moves(grid, eta), noise, conditioning)


def sde(
    y: Tensor,
    gammas: Tensor,
    noise: Noise,
    conditioning: Conditioning,
    *,
    lam: float | Sequence[float] | str = 1.0,
    process: Process | None = None,
) -> Procedure[Tensor]:
    """Every process between the probability flow (lam 0) and the reverse SDE (lam 1), and beyond. See `sde_moves`.

    lam: one value, one a move, or a formula of t, gamma and s = sigma / alpha, such as 't' or 'sqrt(1 - t)'.
    """
    grid = levels(gammas, y)
    return walk(y, grid, sde_moves(grid, lam, process), noise, conditioning)


def ancestral(
    y: Tensor,
    gammas: Tensor,
    noise: Noise,
    conditioning: Conditioning,
    *,
    variance: str = "posterior",
    finish: str = "x_hat",
    process: Process | None = None,
) -> Procedure[Tensor]:
    """DDPM's ancestral sampling (Ho et al. 2020, algorithm 2).

    variance: 'posterior', 'beta' or 'learned', which interpolates their logarithms (Nichol & Dhariwal 2021, eq. 15);
    the latter two need `process`. finish: 'x_hat' at the last level, no noise in the last move; or pixels of VDM's
    decoder p(x | z_0), z_0 being where the last level is, which is then not asked: 'draw' one, or its 'mode' (Kingma et
    al. 2021, section 3.2).
    """
    if variance not in ("posterior", "beta", "learned"):
        raise ValueError(f"variance must be 'posterior', 'beta' or 'learned', got '{variance}'")
    choose(dict.fromkeys(("x_hat", "draw", "mode")), finish, "finish")
    grid, asked = levels(gammas, y), finish == "x_hat"
    if not asked and len(grid) < 2:
        raise ValueError(f"finish '{finish}' decodes the last level without a query: use at least 2 levels")
    if variance == "learned":
        upper = ancestral_moves(grid, "beta", process)
        procedure = _learned(y, grid, upper, ancestral_moves(grid), noise, conditioning, finish=asked)
    else:
        procedure = walk(y, grid, ancestral_moves(grid, variance, process), noise, conditioning, finish=asked)
    return procedure if asked else _decoded(procedure, grid[-1], noise if finish == "draw" else None)


def _decoded(procedure: Procedure[Tensor], gamma: float, noise: Noise | None) -> Procedure[Tensor]:
    y = yield from procedure
    return decoded_pixels(y, math.exp(gamma / 2), PixelGrid(), noise)


def _learned(
    y: Tensor,
    grid: list[float],
    upper: list[Move],
    lower: list[Move],
    noise: Noise,
    conditioning: Conditioning,
    *,
    finish: bool = True,
) -> Procedure[Tensor]:
    """log deviation = (1 + v) / 2 log sqrt(beta) + (1 - v) / 2 log sqrt(beta-tilde); v, the network's, is unbounded."""
    level, draws = rows(grid, y), torch.empty_like(y)
    for index, ((weight, high, _), (_, low, _)) in enumerate(zip(upper, lower, strict=True)):
        answer = yield Query(y, level[index], conditioning, shared=grid[index])
        if answer.variance is None:
            raise ValueError("variance 'learned' needs a network with learned variance; use 'beta' or 'posterior'")
        log_high, log_low = math.log(high), math.log(low)
        deviation = answer.variance.to(y.dtype).mul((log_high - log_low) / 2).add_((log_high + log_low) / 2).exp_()
        y.lerp_(answer.x_hat, weight).addcmul_(noise.normal_(draws), deviation)
    if not finish:
        return y
    return (yield Query(y, level[-1], conditioning, shared=grid[-1])).x_hat


def prior(
    process: Process,
    shape: Sequence[int],
    noise: Noise,
    gamma: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The start y ~ N(0, v I), shape (n, ...) of `noise`'s n images, v the model's own at gamma_max.

    gamma: the grid's first level where that lies below gamma_max (a grid of DDPM's 'leading' steps); v is then what the
    model's scaling says there, z ~ N(0, I) for all but 've'.
    """
    v = process.prior_variance if gamma is None else prior_variance(process.scaling, gamma)
    return noise.normal_(torch.empty(*shape, dtype=dtype, device=noise.device)).mul_(math.sqrt(v))


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampler:
    """A procedure and the facts that callers and tests go by.

    order: of convergence as the grid is refined: of the points for deterministic ones, weak (mean and covariance) for
    stochastic ones; 0 where a fixed Langevin step leaves a bias. stochastic: with its default options it draws noise.
    evaluations: (steps, **options) -> network evaluations a row (adaptive: an upper estimate). grid: its default grid.
    """

    procedure: Callable[..., Procedure[Tensor]]
    order: int
    stochastic: bool
    evaluations: Callable[..., int]
    grid: str = "uniform_t"

    @cached_property
    def options(self) -> Mapping[str, inspect.Parameter]:
        """What a user may set."""
        return options_of(self.procedure) | {"clip": CLIP}

    @cached_property
    def needs_process(self) -> bool:
        """It takes the model's facts as option `process`; `start` gives them."""
        return "process" in inspect.signature(self.procedure).parameters

    def start(
        self, process: Process, y: Tensor, gammas: Tensor, noise: Noise, conditioning: Conditioning, **options: Any
    ) -> Procedure[Tensor]:
        """The procedure for a model of these facts, everything a user can get wrong checked before the first query.

        Raises:
            ValueError: unknown option, a grid outside the model's range, or what the procedure itself refuses.
        """
        for name in options:
            if name not in self.options:
                raise ValueError(f"sampler has no option '{name}'; it has: {', '.join(self.options)}")
        process.check_levels(gammas)
        clip = options.pop("clip", None)
        if self.needs_process:
            options["process"] = process
        return clipped(self.procedure(y, gammas, noise, conditioning, **options), clip)


def _one_a_step(steps: int, **_: Any) -> int:
    return steps


def _heun_evaluations(steps: int, **_: Any) -> int:
    return 2 * steps - 1


def _ancestral_evaluations(steps: int, finish: str = "x_hat", **_: Any) -> int:
    return steps - (finish != "x_hat")


def _langevin_evaluations(steps: int, steps_per_level: int = 5, finish: str = "x_hat", **_: Any) -> int:
    return steps * steps_per_level + (finish == "x_hat")


def _corrected_evaluations(steps: int, corrector_steps: int = 1, **_: Any) -> int:
    return steps * (1 + corrector_steps)


def _adaptive_evaluations(steps: int, tolerance: float = 1e-3, **_: Any) -> int:
    """By what the oracles took: 25 to 60 at 1e-2, 18 to 25 more for each decimal."""
    return round(30 - 25 * math.log10(tolerance))


SAMPLERS: dict[str, Sampler] = {
    "ancestral": Sampler(ancestral, 1, True, _ancestral_evaluations),
    "ddim": Sampler(ddim, 1, False, _one_a_step),
    "euler": Sampler(euler, 1, False, _one_a_step, "rho"),
    "euler_ancestral": Sampler(euler_ancestral, 1, True, _one_a_step, "rho"),
    "heun": Sampler(heun, 2, False, _heun_evaluations, "rho"),
    "dpmpp_2m": Sampler(dpmpp_2m, 2, False, _one_a_step, "rho"),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, 2, True, _one_a_step, "rho"),
    "sde": Sampler(sde, 1, True, _one_a_step),
    "predictor_corrector": Sampler(predictor_corrector, 0, True, _corrected_evaluations),
    "langevin": Sampler(langevin, 0, True, _langevin_evaluations, "uniform_gamma"),
    "adaptive": Sampler(adaptive, 5, False, _adaptive_evaluations, "uniform_gamma"),
}
