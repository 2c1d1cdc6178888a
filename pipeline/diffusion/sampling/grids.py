"""Grids: the levels that a sampler asks at, gamma descending, float64."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.choose import choose
from pipeline.diffusion.schedule import Schedule, evenly


def _uniform_t(schedule: Schedule, steps: int) -> Tensor:
    return schedule.gamma(torch.linspace(1, 0, steps, dtype=torch.float64))


def _uniform_gamma(schedule: Schedule, steps: int) -> Tensor:
    return torch.linspace(schedule.gamma_max, schedule.gamma_min, steps, dtype=torch.float64)


def _rho(schedule: Schedule, steps: int, rho: float = 7.0) -> Tensor:
    """EDM's grid, s_i = (s_max^(1/rho) + i / (N - 1) (s_min^(1/rho) - s_max^(1/rho)))^rho (Karras et al. 2022)."""
    first, last = (math.exp(g / 2 / rho) for g in (schedule.gamma_max, schedule.gamma_min))
    return 2 * rho * torch.log(torch.linspace(first, last, steps, dtype=torch.float64))


def _table(schedule: Schedule, name: str) -> Tensor:
    table = schedule.table
    if table is None:
        raise ValueError(
            f"grid '{name}' picks from a table of discrete steps, which {type(schedule).__name__} has not; "
            f"use uniform_t, uniform_gamma or rho"
        )
    return table


def _leading(schedule: Schedule, steps: int) -> Tensor:
    """Indices 0, T // N, 2 (T // N), ..."""
    table = _table(schedule, "leading")
    return table[torch.arange(steps) * (len(table) // steps)].flip(0)


def _trailing(schedule: Schedule, steps: int) -> Tensor:
    """Indices round(T - i T / N) - 1 for i = 0..N-1."""
    table = _table(schedule, "trailing")
    index = (len(table) * (steps - torch.arange(steps, dtype=torch.float64)) / steps).round().long() - 1
    return table[index]


def _linspace(schedule: Schedule, steps: int) -> Tensor:
    """Indices round(i (T - 1) / (N - 1)): both ends included."""
    return evenly(_table(schedule, "linspace"), steps)


def _quadratic(schedule: Schedule, steps: int) -> Tensor:
    """Indices floor(linspace(0, sqrt(0.8 T), N)^2) (Song et al. 2020, DDIM), each once: the first few can repeat.

    So the grid may have fewer than N levels; the published code asks again there, and does not move.
    """
    table = _table(schedule, "quadratic")
    index = torch.linspace(0, math.sqrt(0.8 * len(table)), steps, dtype=torch.float64).square().long()
    return table[index[index.diff(prepend=index.new_tensor([-1])) > 0]].flip(0)


GRIDS: dict[str, Callable[..., Tensor]] = {
    "uniform_t": _uniform_t,
    "uniform_gamma": _uniform_gamma,
    "rho": _rho,
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
    "quadratic": _quadratic,
}


def explicit_grid(schedule: Schedule, indices: Sequence[int]) -> Tensor:
    """The levels of any strictly increasing subsequence of a table's step indices, descending."""
    table = _table(schedule, "explicit")
    if list(indices) != sorted(set(indices)) or not indices or indices[0] < 0 or indices[-1] >= len(table):
        raise ValueError(f"grid: indices must be strictly increasing within 0..{len(table) - 1}, got {list(indices)}")
    return table[torch.tensor(list(indices))].flip(0)


def nearest(gammas: Tensor, nodes: Tensor) -> Tensor:
    """Each level's nearest node in s = exp(gamma / 2), float64 (Karras et al. 2022, appendix C.3.4).

    nodes: float64, ascending, at least two.
    """
    value = gammas.double().contiguous()
    above = torch.searchsorted(nodes, value).clamp(1, len(nodes) - 1)
    low, high = nodes[above - 1], nodes[above]
    s, s_low, s_high = (torch.exp((each - high) / 2) for each in (value, low, high))  # of the upper one: no overflow
    return torch.where(s - s_low < s_high - s, low, high)


def integer_grid(gammas: Tensor, schedule: Schedule) -> Tensor:
    """A grid's levels moved to the nearest steps of the schedule's table, where a network was trained at these alone.

    Each once, so that there may be fewer levels than in the grid; the published code asks again there, and does not
    move. Raises ValueError where the schedule has no table.
    """
    levels = nearest(gammas, _table(schedule, "of integer steps"))
    return levels[levels.diff(prepend=levels.new_tensor([math.inf])) < 0]


@torch.no_grad()
def grid(name: str, schedule: Schedule, steps: int, **options: float) -> Tensor:
    """The levels to query: gamma, float64 (steps,), strictly descending within the law's range ('quadratic': at most).

    The last move, from the lowest level to s = 0, is no query.

    Raises:
        ValueError: unknown grid, steps < 1, or more steps than a table allows.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if steps == 1:
        return torch.tensor([schedule.gamma_max], dtype=torch.float64)
    levels = choose(GRIDS, name, "grid")(schedule, steps, **options)
    if not bool((levels.diff() < 0).all()):
        raise ValueError(f"grid '{name}' with {steps} steps repeats a level; use fewer steps")
    return levels
