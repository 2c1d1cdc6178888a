"""Samplers that run Langevin dynamics at each level: annealed Langevin, and predictor-corrector.

Called as all samplers are (see `samplers`). In y the score is (x_hat - y) / s^2.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.choose import choose
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.guidance import Clip, clipped
from pipeline.diffusion.procedure import Procedure, Query
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.rows import row_sum, shaped
from pipeline.diffusion.sampling.moves import (
    Move,
    ancestral_moves,
    ddim_moves,
    levels,
    reverse_diffusion_moves,
    rows,
    sde_moves,
    walk,
)


def langevin_moves(grid: Sequence[float], step_size: float) -> list[Move]:
    """One Langevin step at each level: y += e score + sqrt(2 e) z with e = step_size s^2."""
    return [Move(step_size, math.exp(g / 2) * math.sqrt(2 * step_size)) for g in grid]


def langevin(
    y: Tensor,
    gammas: Tensor,
    noise: Noise,
    conditioning: Conditioning,
    *,
    steps_per_level: int = 5,
    step_size: float = 0.062,
    clip: Clip | float | None = None,
) -> Procedure[Tensor]:
    """Annealed Langevin dynamics (Song & Ermon 2019, algorithm 1), then x_hat at the last level; defaults of NCSNv2.

    step_size: in (0, 2), the published epsilon / s_min^2 of the form y += e score + sqrt(2 e) z: 0.2 in NCSN with 100
    steps a level, 0.062 in NCSNv2 with 5. A fixed step leaves the variance too large by about e / 2.
    """
    if steps_per_level < 1:
        raise ValueError(f"steps_per_level must be at least 1, got {steps_per_level}")
    if not 0 < step_size < 2:
        raise ValueError(f"step_size must be above 0 and below 2, where Langevin steps are stable, got {step_size:g}")
    grid = levels(gammas, y)
    repeated = [g for g in grid for _ in range(steps_per_level)]
    moves = langevin_moves(repeated, step_size)
    return clipped(walk(y, [*repeated, grid[-1]], moves, noise, conditioning), clip)


def predictor_corrector(
    y: Tensor,
    gammas: Tensor,
    noise: Noise,
    conditioning: Conditioning,
    *,
    predictor: str = "reverse_diffusion",
    corrector_steps: int = 1,
    snr: float = 0.16,
    clip: Clip | float | None = None,
) -> Procedure[Tensor]:
    """Predictor-corrector (Song et al. 2021, algorithms 2-5): Langevin steps at a level, then a move to the next.

    predictor: key of PREDICTORS. Corrector: y += e score + sqrt(2 e) z, e = 2 (snr |z| / |score|)^2.
    Note: the published step takes the mean of the norms over the batch; here each image has its own, so that it does
    not depend on its batch.
    """
    if corrector_steps < 0:
        raise ValueError(f"corrector_steps must be at least 0, got {corrector_steps}")
    if not 0 < snr < 1:
        raise ValueError(f"snr must be above 0 and below 1, where the corrector is stable, got {snr:g}")
    grid = levels(gammas, y)
    moves = choose(PREDICTORS, predictor, "predictor")(grid)
    return clipped(_predict_correct(y, grid, moves, noise, conditioning, corrector_steps, snr), clip)


def _norm(image: Tensor) -> Tensor:
    """(n,): each image's length."""
    return row_sum(image.square()).sqrt()


def _predict_correct(
    y: Tensor,
    grid: Sequence[float],
    moves: Sequence[Move],
    noise: Noise,
    conditioning: Conditioning,
    corrector_steps: int,
    snr: float,
) -> Procedure[Tensor]:
    draws, level = torch.empty_like(y), rows(grid, y)
    for index, move in enumerate([*moves, None]):
        s = math.exp(grid[index] / 2)
        for _ in range(corrector_steps):
            pull = (yield Query(y, level[index], conditioning, shared=grid[index])).x_hat - y
            noise.normal_(draws)
            root = shaped(_norm(draws) / _norm(pull), y).mul_(math.sqrt(2) * snr * s)  # sqrt(e) / s
            y.addcmul_(root.square(), pull).addcmul_(root, draws, value=math.sqrt(2) * s)
        x_hat = (yield Query(y, level[index], conditioning, shared=grid[index])).x_hat
        if move is None:
            return x_hat
        y.lerp_(x_hat, move.weight)
        if move.deviation:
            y.add_(noise.normal_(draws), alpha=move.deviation)
    raise AssertionError("the last move returns")


PREDICTORS: dict[str, Callable[[Sequence[float]], list[Move]]] = {
    "reverse_diffusion": reverse_diffusion_moves,
    "ancestral": ancestral_moves,
    "euler": ddim_moves,
    "sde": sde_moves,
}
