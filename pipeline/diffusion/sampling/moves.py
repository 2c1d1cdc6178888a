"""What the samplers on a fixed grid share: the check of the grid, the first-order moves in closed form, the walk.

All in y = z / alpha, where every scaling looks the same: dy/ds = (y - x_hat) / s, s = exp(gamma / 2). A first-order
move is y_s = y_t + weight (x_hat - y_t) + deviation z; the formulas below give both numbers for each pair of
neighbouring levels of a grid.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor

from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Process
from pipeline.diffusion.formula import Formula
from pipeline.diffusion.procedure import Procedure, Query
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.scaling import SCALINGS, step_variance

FLOAT32_LOWEST = 2 * math.log(1e-4)  # below s = 1e-4 float32 y cannot carry the noise


class Move(NamedTuple):
    """scale (y + weight (x_hat - y)) + deviation z, z ~ N(0, I)."""

    weight: float
    deviation: float
    scale: float = 1.0


def floats(values: Tensor) -> list[float]:
    """A row of numbers as Python floats; one copy to the host."""
    return cast("list[float]", values.double().tolist())  # pyright: ignore[reportUnknownMemberType]


def integers(values: Tensor) -> list[int]:
    """A row of integers as Python's; one copy to the host."""
    return cast("list[int]", values.tolist())  # pyright: ignore[reportUnknownMemberType]


def levels(gammas: Tensor, y: Tensor, *, ascending: bool = False) -> list[float]:
    """The grid as Python floats, checked.

    Raises:
        ValueError: not one row of finite levels strictly descending (or ascending); s below 1e-4 with y in float32.
    """
    if gammas.ndim != 1 or len(gammas) < 1:
        raise ValueError(f"gammas must be one row of at least one level, got shape {tuple(gammas.shape)}")
    grid = floats(gammas)
    for step, g in enumerate(grid):
        if not math.isfinite(g):
            raise ValueError(f"gammas: level {step} is {g}; levels must be finite")
        if step and not (g > grid[step - 1] if ascending else g < grid[step - 1]):
            order = "ascending" if ascending else "descending"
            raise ValueError(f"gammas must be strictly {order}, got {grid[step - 1]:.6g}, then {g:.6g} at step {step}")
    if min(grid) < FLOAT32_LOWEST and y.dtype != torch.float64:
        raise ValueError(
            f"gamma {min(grid):.3f} (s = {math.exp(min(grid) / 2):.2g}) is too low for y in {y.dtype}: "
            f"start in float64, or end above s = 1e-4"
        )
    return grid


def rows(grid: Sequence[float], y: Tensor) -> list[Tensor]:
    """Each level as a query's gamma, float64 (n,), on y's device."""
    table = torch.tensor(list(grid), dtype=torch.float64).unsqueeze(1).repeat(1, len(y))
    return list(table.to(y.device).unbind(0))


def walk(
    y: Tensor,
    grid: Sequence[float],
    moves: Sequence[Move],
    noise: Noise | None,
    conditioning: Conditioning,
    *,
    finish: bool = True,
) -> Procedure[Tensor]:
    """Ask at each level and move, in place; with `finish` the last level's x_hat is the result, else y there.

    Noise is drawn only for moves that add some.
    """
    level = rows(grid, y)
    draws = torch.empty_like(y) if any(move.deviation for move in moves) else y
    for index, (weight, deviation, scale) in enumerate(moves):
        answer = yield Query(y, level[index], conditioning, shared=grid[index])
        y.lerp_(answer.x_hat, weight)
        if scale != 1:
            y.mul_(scale)
        if deviation and noise is not None:
            y.add_(noise.normal_(draws), alpha=deviation)
    if not finish:
        return y
    return (yield Query(y, level[-1], conditioning, shared=grid[-1])).x_hat


# --- the moves --------------------------------------------------------------------------------------------------------


def posterior_variances(grid: Sequence[float]) -> list[float]:
    """beta-tilde of each move, s_s^2 (1 - r), r = exp(gamma_s - gamma_t)."""
    return [math.exp(g_s) * -math.expm1(g_s - g_t) for g_t, g_s in pairwise(grid)]


def check_nonnegative(**options: float) -> None:
    """Raises ValueError where an option is negative or not finite, naming it."""
    for name, value in options.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {value:g}")


def ddim_moves(grid: Sequence[float], eta: float | Sequence[float] = 0.0) -> list[Move]:
    """DDIM (Song et al. 2020, eq. 12 and 16).

    y_s = x_hat + sqrt(s_s^2 - sigma^2) / s_t (y - x_hat) + sigma z with sigma^2 = eta^2 s_s^2 (1 - r); eta one value or
    one a move.

    Raises:
        ValueError: eta negative, or so large that sigma exceeds s_s (sigma_t^2 > 1 - abar_s in z), naming the step.
    """
    if eta == 0:
        return [Move(-math.expm1((g_s - g_t) / 2), 0.0) for g_t, g_s in pairwise(grid)]  # up as well as down
    count = len(grid) - 1
    etas = [float(eta)] * count if isinstance(eta, int | float) else [float(value) for value in eta]
    if len(etas) != count:
        raise ValueError(f"eta: need one value, or one for each of the {count} moves, got {len(etas)}")
    moves: list[Move] = []
    for step, ((g_t, g_s), variance) in enumerate(zip(pairwise(grid), posterior_variances(grid), strict=True)):
        if not 0 <= etas[step] < math.inf:
            raise ValueError(f"eta at step {step} must be at least 0 and finite, got {etas[step]:g}")
        kept = math.exp(g_s) - etas[step] ** 2 * variance
        if kept < 0:
            raise ValueError(
                f"eta {etas[step]:g} is too large at step {step} (gamma {g_t:.4f} to {g_s:.4f}): it would add more "
                f"noise than that level has; at most {math.sqrt(math.exp(g_s) / variance):.6g} there"
            )
        moves.append(Move(1 - math.sqrt(kept * math.exp(-g_t)), etas[step] * math.sqrt(variance)))
    return moves


def euler_ancestral_moves(grid: Sequence[float], eta: float = 1.0) -> list[Move]:
    """Euler to s_down, then noise s_up = min(s_s, eta s_s sqrt(1 - r)), s_down^2 + s_up^2 = s_s^2 (k-diffusion)."""
    check_nonnegative(eta=eta)
    moves: list[Move] = []
    for (g_t, g_s), variance in zip(pairwise(grid), posterior_variances(grid), strict=True):
        up = min(eta**2 * variance, math.exp(g_s))
        moves.append(Move(1 - math.sqrt((math.exp(g_s) - up) * math.exp(-g_t)), math.sqrt(up)))
    return moves


def reverse_diffusion_moves(grid: Sequence[float]) -> list[Move]:
    """The reverse SDE in the steps of its forward noise: the posterior's mean with variance s_t^2 - s_s^2.

    (Song et al. 2021, appendix E, for the variance-exploding SDE.)
    """
    fractions = [-math.expm1(g_s - g_t) for g_t, g_s in pairwise(grid)]
    return [Move(part, math.sqrt(math.exp(g_t) * part)) for g_t, part in zip(grid, fractions, strict=False)]


LARGEST_LAM = 10.0


def lams(grid: Sequence[float], lam: float | Sequence[float] | str, process: Process | None = None) -> list[float]:
    """lam at the start of each move: one value, one a move, or a formula of t, gamma and s = sigma / alpha.

    Raises:
        ValueError: a value outside 0..10, another number of them, no formula, or one without the model's time law.
    """
    count = len(grid) - 1
    if isinstance(lam, str):
        if process is None:
            raise ValueError("lam as a formula of t needs the model's time law gamma(t): give process=")
        gamma = torch.tensor(list(grid), dtype=torch.float64)[:-1]
        t = process.time_law("lam as a formula").time(gamma).detach()
        formula = Formula(lam, ("t", "gamma", "s"), "lam")
        each = floats(formula.nonnegative({"t": t, "gamma": gamma, "s": torch.exp(gamma / 2)})) if count else []
    else:
        each = [float(lam)] * count if isinstance(lam, int | float) else [float(value) for value in lam]
    if len(each) != count:
        raise ValueError(f"lam: need one value, or one for each of the {count} moves, got {len(each)}")
    for step, value in enumerate(each):
        if not 0 <= value <= LARGEST_LAM:
            raise ValueError(f"lam must be at least 0 and at most {LARGEST_LAM:g}, got {value:g} at step {step}")
    return each


def sde_moves(
    grid: Sequence[float], lam: float | Sequence[float] | str = 1.0, process: Process | None = None
) -> list[Move]:
    """Euler-Maruyama in s, falling, of dy = (1 + lam^2) (y - x_hat) / s ds + lam sqrt(2 s) dW: 0 the ODE, 1 the SDE.

    (Song et al. 2021, section 4; the family between them as in Karras et al. 2022, eq. 6.) lam = sigma(t) / g(t) of a
    family stated in t, see `lams`.
    """
    falls = [-math.expm1((g_s - g_t) / 2) for g_t, g_s in pairwise(grid)]  # (s_t - s_s) / s_t
    return [
        Move((1 + lam_t**2) * fall, lam_t * math.sqrt(2 * math.exp(g_t) * fall))
        for g_t, fall, lam_t in zip(grid, falls, lams(grid, lam, process), strict=False)
    ]


def last_deviation(gamma: float, scaling: str) -> float:
    """sqrt(beta_1) of a table that ends at gamma: sigma in the scaling a model was trained in, in model space."""
    return math.exp(gamma / 2) * float(SCALINGS[scaling](torch.tensor(gamma, dtype=torch.float64)))


def ancestral_moves(grid: Sequence[float], variance: str = "posterior", process: Process | None = None) -> list[Move]:
    """The posterior's mean r y + (1 - r) x_hat; variance beta-tilde, or beta in the scaling the model was trained in.

    Raises:
        ValueError: variance 'beta' without `process`.
    """
    if variance == "posterior":
        variances = posterior_variances(grid)
    elif process is None:
        raise ValueError("variance 'beta' or 'learned' depends on the scaling a model was trained in: give process=")
    else:
        table = torch.tensor(list(grid), dtype=torch.float64)
        variances = floats(step_variance(process.scaling, table[:-1], table[1:]))
    weights = [-math.expm1(g_s - g_t) for g_t, g_s in pairwise(grid)]
    return [Move(weight, math.sqrt(value)) for weight, value in zip(weights, variances, strict=True)]
