"""Embedded Runge-Kutta pairs: coefficients, orders and the weighted sums of their stages."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """An embedded Runge-Kutta pair whose last stage is the next step's first (FSAL).

    stages: rows of the tableau, stage i at fraction nodes[i]; the last row is the solution.
    error: the solution's weights minus the embedded one's.
    """

    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    error: tuple[float, ...]
    order: int  # of the solution


DORMAND_PRINCE = Pair(
    nodes=(1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    stages=(
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    error=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    order=5,
)
BOGACKI_SHAMPINE = Pair(
    nodes=(1 / 2, 3 / 4, 1.0),
    stages=((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    error=(-5 / 72, 1 / 12, 1 / 9, -1 / 8),
    order=3,
)

PAIRS: dict[str, Pair] = {"dopri5": DORMAND_PRINCE, "bosh3": BOGACKI_SHAMPINE}


def weighted(weights: Sequence[float], values: list[Tensor]) -> Tensor:
    """Sum of weight x value over the stages, the zeros left out."""
    total: Tensor | None = None
    for weight, value in zip(weights, values, strict=True):
        if weight:
            total = value * weight if total is None else total.add(value, alpha=weight)
    if total is None:
        raise ValueError("a row of a tableau needs a weight")
    return total
