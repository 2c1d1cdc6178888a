"""Second-order samplers on a given grid: Heun's rule with churn, and the two-step multistep rule with its SDE form.

Called as all samplers are (see `samplers`).
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Process
from pipeline.diffusion.procedure import Procedure, Query
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.sampling.grids import nearest
from pipeline.diffusion.sampling.moves import check_nonnegative, floats, levels, rows


def heun(
    y: Tensor,
    gammas: Tensor,
    noise: Noise,
    conditioning: Conditioning,
    *,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_noise: float = 1.0,
    churn_last: bool = False,
    process: Process | None = None,
) -> Procedure[Tensor]:
    """EDM's second-order sampler (Karras et al. 2022, algorithm 2): 2 steps - 1 queries.

    churn: S_churn; where churn_min <= s <= churn_max noise comes first, up to s (1 + min(churn / steps, sqrt(2) - 1))
    but never beyond the model's gamma_max (without `process`: the first level), to the nearest of `process.nodes` where
    there are some. churn_noise: S_noise, the deviation of what is added. churn_last: at the last level too, from which
    the last Euler step goes to s = 0, as published; without, the image is x_hat at the last level itself.
    """
    check_nonnegative(churn=churn, churn_min=churn_min, churn_noise=churn_noise)
    grid = levels(gammas, y)
    highest = grid[0] if process is None else max(process.gamma_max, grid[0])
    raised = list(grid)
    for index, g in enumerate(grid if churn_last else grid[:-1]):
        if churn > 0 and churn_min <= math.exp(g / 2) <= churn_max:
            raised[index] = min(g + 2 * math.log1p(min(churn / len(grid), math.sqrt(2) - 1)), highest)
    if process is not None and process.nodes is not None and raised != grid:
        raised = [
            max(g, low) for g, low in zip(floats(nearest(torch.tensor(raised), process.nodes)), grid, strict=True)
        ]
    return heun_walk(y, grid, raised, churn_noise, noise, conditioning)


def heun_walk(
    y: Tensor,
    grid: Sequence[float],
    raised: Sequence[float],
    churn_noise: float,
    noise: Noise | None,
    conditioning: Conditioning,
    *,
    finish: bool = True,
) -> Procedure[Tensor]:
    """Heun's rule through the levels, each first raised to `raised`; with `finish` x_hat at the last, else y there."""
    low, high = rows(grid, y), rows(raised, y)
    draws = torch.empty_like(y) if list(raised) != list(grid) else y
    for index in range(len(grid) - 1):
        g_t, g_s = raised[index], grid[index + 1]
        if g_t > grid[index] and noise is not None:
            y.add_(noise.normal_(draws), alpha=_added(grid[index], g_t) * churn_noise)
        first = (yield Query(y, high[index], conditioning, shared=g_t)).x_hat
        weight = -math.expm1((g_s - g_t) / 2)
        ahead = torch.lerp(y, first, weight)
        y.lerp_(first, weight / 2)
        second = (yield Query(ahead, low[index + 1], conditioning, shared=g_s)).x_hat
        half = math.expm1((g_t - g_s) / 2) / 2  # (s_t - s_s) / (2 s_s), on the slope at the far end
        y.sub_(ahead, alpha=half).add_(second, alpha=half)
    if not finish:
        return y
    if raised[-1] > grid[-1] and noise is not None:
        y.add_(noise.normal_(draws), alpha=_added(grid[-1], raised[-1]) * churn_noise)
    return (yield Query(y, high[-1], conditioning, shared=raised[-1])).x_hat


def _added(low: float, high: float) -> float:
    """sqrt(s_high^2 - s_low^2)."""
    return math.exp(high / 2) * math.sqrt(-math.expm1(low - high))


class TwoStep(NamedTuple):
    """a y + b x_hat + c (x_hat of the level before) + deviation z."""

    a: float
    b: float
    c: float
    deviation: float


def two_step_moves(grid: Sequence[float], eta: float = 0.0) -> list[TwoStep]:
    """DPM-Solver++ 2M and, with eta > 0, its SDE form by the midpoint rule (Lu et al. 2022).

    With h = log(s_t / s_s): a = exp(-(1 + eta) h), c = -(1 - a) h / (2 h_before) but 0 in the first move,
    b = 1 - a - c, deviation = s_s sqrt(1 - exp(-2 eta h)). eta is lam^2 of `sde_moves`.
    """
    check_nonnegative(eta=eta)
    steps = [(g_t - g_s) / 2 for g_t, g_s in pairwise(grid)]
    moves: list[TwoStep] = []
    for index, h in enumerate(steps):
        gain = -math.expm1(-(1 + eta) * h)
        c = -gain * h / (2 * steps[index - 1]) if index else 0.0
        deviation = math.exp(grid[index + 1] / 2) * math.sqrt(-math.expm1(-2 * eta * h))
        moves.append(TwoStep(1 - gain, gain - c, c, deviation))
    return moves


def two_step_walk(
    y: Tensor,
    grid: Sequence[float],
    moves: Sequence[TwoStep],
    noise: Noise | None,
    conditioning: Conditioning,
    *,
    finish: bool = True,
) -> Procedure[Tensor]:
    """Ask at each level and move, in place; with `finish` the last level's x_hat is the result, else y there."""
    level = rows(grid, y)
    draws = torch.empty_like(y) if any(move.deviation for move in moves) else y
    before: Tensor | None = None
    for index, (a, b, c, deviation) in enumerate(moves):
        x_hat = (yield Query(y, level[index], conditioning, shared=grid[index])).x_hat
        y.mul_(a).add_(x_hat, alpha=b)
        if before is not None:
            y.add_(before, alpha=c)
        if deviation and noise is not None:
            y.add_(noise.normal_(draws), alpha=deviation)
        before = x_hat
    if not finish:
        return y
    return (yield Query(y, level[-1], conditioning, shared=grid[-1])).x_hat


def dpmpp_2m(y: Tensor, gammas: Tensor, noise: Noise, conditioning: Conditioning) -> Procedure[Tensor]:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): second order from one query a step. See `two_step_moves`."""
    grid = levels(gammas, y)
    return two_step_walk(y, grid, two_step_moves(grid), noise, conditioning)


def dpmpp_2m_sde(
    y: Tensor,
    gammas: Tensor,
    noise: Noise,
    conditioning: Conditioning,
    *,
    eta: float = 1.0,
) -> Procedure[Tensor]:
    """The SDE form of DPM-Solver++ 2M (Lu et al. 2022, section 4.3); eta 0 is `dpmpp_2m`. See `two_step_moves`."""
    grid = levels(gammas, y)
    return two_step_walk(y, grid, two_step_moves(grid, eta), noise, conditioning)
