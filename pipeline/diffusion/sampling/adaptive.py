"""The probability flow by an embedded Runge-Kutta pair, each image with its own levels and its own error control.

In tau = log s = gamma / 2 for the normalised state w = y / sqrt(s^2 + sigma_data^2), as in `ode`:

    dw/dtau = (sigma_data^2 / (s^2 + sigma_data^2) y - x_hat) / sqrt(s^2 + sigma_data^2)

On oracles (8 x 8 fields, a set of digits) this took half the evaluations of y against s at equal error.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.choose import choose
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.procedure import Answer, Procedure, Query
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.rows import row_sum, shaped
from pipeline.diffusion.runge_kutta import PAIRS, Pair
from pipeline.diffusion.sampling.moves import integers, levels, rows

DATA_STD = 0.5  # of model space; any other value costs evaluations, not accuracy
FIRST_STEP = 0.5  # in log s; the control finds its own within a step or two
REJECTED, ACCEPTED, ARRIVED, BROKEN = range(4)


def adaptive(
    y: Tensor,
    gammas: Tensor,
    noise: Noise,
    conditioning: Conditioning,
    *,
    tolerance: float = 1e-3,
    solver: str = "dopri5",
    max_evaluations: int = 2000,
) -> Procedure[Tensor]:
    """From the first level of the grid to its last, then x_hat there at no further query; what lies between is ignored.

    tolerance: of a step's error, root mean square over an image's pixels: in model space where noise is low, relative
    to its deviation where it is high. solver: key of `ode.PAIRS`. A row's numbers do not depend on the other rows.

    Raises:
        ValueError: tolerance below 1e-5 with y in float32; at run time a row that needs more than max_evaluations, or
            an answer that is not finite.
    """
    grid = levels(gammas, y)
    return adaptive_walk(y, grid, conditioning, tolerance, solver, max_evaluations)


def adaptive_walk(
    y: Tensor,
    grid: Sequence[float],
    conditioning: Conditioning,
    tolerance: float = 1e-3,
    solver: str = "dopri5",
    max_evaluations: int = 2000,
    *,
    finish: bool = True,
) -> Procedure[Tensor]:
    """From grid[0] to grid[-1], up or down; with `finish` x_hat there is the result, else y. Options: `adaptive`."""
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be above 0 and below 1, got {tolerance:g}")
    if tolerance < 1e-5 and y.dtype != torch.float64:
        raise ValueError(f"tolerance {tolerance:g} is beyond y in {y.dtype}: take at least 1e-5, or start in float64")
    pair = choose(PAIRS, solver, "solver")
    return _solve(y, (grid[0], grid[-1]), conditioning, pair, tolerance, max_evaluations, finish)


@dataclass(frozen=True)
class _State:
    """The rows still on their way: place in the batch, level, next step in tau, state, slope there, what is asked."""

    row: Tensor
    tau: Tensor
    step: Tensor
    w: Tensor
    slope: Tensor
    conditioning: Conditioning

    def at(self, index: Tensor) -> "_State":
        return _State(
            self.row[index],
            self.tau[index],
            self.step[index],
            self.w[index],
            self.slope[index],
            self.conditioning[index],
        )


def _norm(tau: Tensor) -> Tensor:
    return torch.sqrt(torch.exp(2 * tau) + DATA_STD**2)


def _slope(
    w: Tensor, tau: Tensor, gamma: Tensor, conditioning: Conditioning
) -> Generator[Query, Answer, tuple[Tensor, Tensor]]:
    """(dw/dtau, x_hat)."""
    norm = _norm(tau)
    x_hat = (yield Query(shaped(norm, w) * w, gamma, conditioning)).x_hat
    return (shaped(DATA_STD**2 / norm, w) * w - x_hat) / shaped(norm, w), x_hat


def _weighted(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    terms = [(weight, slope) for weight, slope in zip(weights, slopes, strict=True) if weight]
    total = terms[0][1] * terms[0][0]
    for weight, slope in terms[1:]:
        total.add_(slope, alpha=weight)
    return total


def _attempt(
    state: _State, pair: Pair, ends: tuple[float, float]
) -> Generator[Query, Answer, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """One step of every row: w, slope and x_hat at its end, and its error as `adaptive` measures it, float64 (n,)."""
    w, slopes, tau, step = state.w, [state.slope], state.tau, shaped(state.step, state.w)
    x_hat = w
    for node, weights in zip(pair.nodes, pair.stages, strict=True):
        w = state.w + step * _weighted(weights, slopes)
        tau = state.tau + node * state.step
        slope, x_hat = yield from _slope(w, tau, (2 * tau).clamp(min(ends), max(ends)), state.conditioning)
        slopes.append(slope)
    error = _weighted(pair.error, slopes).double()
    error *= shaped(state.step * _norm(tau), error)
    rms = torch.sqrt(row_sum(error.square()) / w[0].numel()) / torch.sqrt(torch.exp(2 * tau) + 1)
    return w, slopes[-1], x_hat, rms


def _solve(
    y: Tensor,
    ends: tuple[float, float],
    conditioning: Conditioning,
    pair: Pair,
    tolerance: float,
    max_evaluations: int,
    finish: bool,
) -> Procedure[Tensor]:
    """Steps of all rows on their way, side by side; one look at the host a step, for who has arrived."""
    gamma = rows(ends[:1], y)[0]
    if ends[0] == ends[1]:
        return (yield Query(y, gamma, conditioning, shared=ends[0])).x_hat if finish else y
    target, tau = ends[1] / 2, gamma / 2
    w = y / shaped(_norm(tau), y)
    slope, _ = yield from _slope(w, tau, gamma, conditioning)
    first = max(min(target - ends[0] / 2, FIRST_STEP), -FIRST_STEP)
    state = _State(torch.arange(len(y), device=y.device), tau, torch.full_like(tau, first), w, slope, conditioning)
    result, evaluations = torch.empty_like(y), 1
    while len(state.row):
        w, slope, x_hat, rms = yield from _attempt(state, pair, ends)
        evaluations += len(pair.nodes)
        badness, tau = rms / tolerance, state.tau + state.step
        accepted = badness <= 1
        status = torch.where(accepted, torch.where(tau == target, ARRIVED, ACCEPTED), REJECTED)
        codes = integers(torch.where(torch.isfinite(badness), status, BROKEN))
        _check(codes, state, evaluations, max_evaluations, tolerance)
        # by exp and log: the bits of torch.pow depend on the place in the tensor
        factor = (0.9 * torch.exp(torch.log(badness.clamp(min=1e-10)) / -pair.order)).clamp(0.2, 5)
        tau = torch.where(accepted, tau, state.tau)
        left, step = target - tau, state.step * factor
        step = torch.where(step.abs() < left.abs(), step, left)
        choice = accepted.view(-1, *[1] * (w.ndim - 1))
        done = [index for index, code in enumerate(codes) if code == ARRIVED]
        result[state.row[done]] = x_hat[done] if finish else w[done] * shaped(_norm(tau[done]), w[done])
        w, slope = torch.where(choice, w, state.w), torch.where(choice, slope, state.slope)
        state = replace(state, tau=tau, step=step, w=w, slope=slope)
        if done:
            rest = [index for index, code in enumerate(codes) if code != ARRIVED]
            state = state.at(torch.tensor(rest, dtype=torch.int64, device=y.device))
    return result


def _check(codes: list[int], state: _State, evaluations: int, max_evaluations: int, tolerance: float) -> None:
    """Raises ValueError where an answer was not finite, or a row has used up its evaluations."""
    if BROKEN in codes:
        index = codes.index(BROKEN)
        raise ValueError(
            f"the network's answer is not finite for image {int(state.row[index])}, after {evaluations} evaluations, "
            f"between gamma {2 * float(state.tau[index]):.4f} and {2 * float(state.tau[index] + state.step[index]):.4f}"
        )
    left = [index for index, code in enumerate(codes) if code != ARRIVED]
    if left and evaluations >= max_evaluations:
        raise ValueError(
            f"image {int(state.row[left[0]])} is at gamma {2 * float(state.tau[left[0]]):.4f} after {evaluations} "
            f"evaluations: raise max_evaluations, or take a tolerance above {tolerance:g}"
        )
