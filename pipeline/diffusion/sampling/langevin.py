"""Samplers that run Langevin dynamics at each level: annealed Langevin, and predictor-corrector.

Called as all samplers are (see `samplers`). In y the score is (x_hat - y) / s^2.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.choose import choose
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Process
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
from pipeline.diffusion.sampling.reverse_sde import REVERSE_SDES, reverse_sde_moves


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
    level: float | None = None,
    finish: str = "x_hat",
    process: Process | None = None,
) -> Procedure[Tensor]:
    """Annealed Langevin dynamics (Song & Ermon 2019, algorithm 1), then x_hat at the last level; defaults of NCSNv2.

    level: one gamma, at which all the steps are then taken, steps x steps_per_level of them, in place of the grid's
    levels: Langevin dynamics on q(y) of that level alone (Song & Ermon 2019, eq. 4). finish: 'x_hat', or 'y', the plain
    sample of the last level's q(y), noise and all.

    step_size: in (0, 2), the published epsilon / s_min^2 of the form y += e score + sqrt(2 e) z: 0.2 in NCSN with 100
    steps a level, 0.062 in NCSNv2 with 5. A fixed step leaves the variance too large by about e / 2.
    """
    if steps_per_level < 1:
        raise ValueError(f"steps_per_level must be at least 1, got {steps_per_level}")
    if not 0 < step_size < 2:
        raise ValueError(f"step_size must be above 0 and below 2, where Langevin steps are stable, got {step_size:g}")
    choose(dict.fromkeys(("x_hat", "y")), finish, "finish")
    grid = levels(gammas, y)
    if level is not None:
        one = torch.tensor([level], dtype=torch.float64)
        if process is not None:
            process.check_levels(one)
        grid = levels(one, y) * len(grid)
    repeated = [g for g in grid for _ in range(steps_per_level)]
    moves = langevin_moves(repeated, step_size)
    return walk(y, [*repeated, grid[-1]], moves, noise, conditioning, finish=finish == "x_hat")


def predictor_corrector(
    y: Tensor,
    gammas: Tensor,
    noise: Noise,
    conditioning: Conditioning,
    *,
    predictor: str = "reverse_diffusion",
    sde: str = "ve",
    corrector_steps: int = 1,
    snr: float = 0.16,
    process: Process | None = None,
) -> Procedure[Tensor]:
    """Predictor-corrector (Song et al. 2021, algorithms 2-5): Langevin steps at a level, then a move to the next.

    sde: which one the steps discretise: 've', in y and so for every model, or 'vp' or 'subvp', with its time law.
    predictor: for 've' key of PREDICTORS, else of REVERSE_SDES, which are the published ones: reverse_diffusion, euler
    and, for 'vp' alone, ancestral. Corrector: y += e score + sqrt(2 e) z, e = 2 alpha (snr |z| / |score|)^2, alpha 1
    for 've' and 1 - beta of the step otherwise.
    Note: the published step takes the mean of the norms over the batch; here each image has its own, so that it does
    not depend on its batch.
    """
    if corrector_steps < 0:
        raise ValueError(f"corrector_steps must be at least 0, got {corrector_steps}")
    if not 0 < snr < 1:
        raise ValueError(f"snr must be above 0 and below 1, where the corrector is stable, got {snr:g}")
    grid = levels(gammas, y)
    choose(dict.fromkeys(("ve", *REVERSE_SDES)), sde, "sde")
    if sde == "ve":
        moves, alphas = [*choose(PREDICTORS, predictor, "predictor")(grid), None], [1.0] * len(grid)
    elif process is None:
        raise ValueError(f"sde '{sde}' is discretised in the model's time: give process=")
    else:
        moves, alphas = reverse_sde_moves(grid, sde, predictor, process)
    if corrector_steps and min(alphas) <= 0:
        raise ValueError(f"sde '{sde}': the corrector needs steps of beta below 1, got {1 - min(alphas):.4g}: use more")
    rates = [snr * math.sqrt(max(alpha, 0.0)) for alpha in alphas]
    return _predict_correct(y, grid, moves, noise, conditioning, corrector_steps, rates)


def _norm(image: Tensor) -> Tensor:
    """(n,): each image's length."""
    return row_sum(image.square()).sqrt()


def _predict_correct(
    y: Tensor,
    grid: Sequence[float],
    moves: Sequence[Move | None],
    noise: Noise,
    conditioning: Conditioning,
    corrector_steps: int,
    rates: Sequence[float],
) -> Procedure[Tensor]:
    """moves: one a level, the last None for x_hat there. rates: snr times the root of the corrector's alpha."""
    draws, level = torch.empty_like(y), rows(grid, y)
    for index, move in enumerate(moves):
        s = math.exp(grid[index] / 2)
        for _ in range(corrector_steps):
            pull = (yield Query(y, level[index], conditioning, shared=grid[index])).x_hat - y
            noise.normal_(draws)
            root = shaped(_norm(draws) / _norm(pull), y).mul_(math.sqrt(2) * rates[index] * s)  # sqrt(e) / s
            y.addcmul_(root.square(), pull).addcmul_(root, draws, value=math.sqrt(2) * s)
        x_hat = (yield Query(y, level[index], conditioning, shared=grid[index])).x_hat
        if move is None:
            return x_hat
        y.lerp_(x_hat, move.weight)
        if move.scale != 1:
            y.mul_(move.scale)
        if move.deviation:
            y.add_(noise.normal_(draws), alpha=move.deviation)
    return y


PREDICTORS: dict[str, Callable[[Sequence[float]], list[Move]]] = {
    "reverse_diffusion": reverse_diffusion_moves,
    "ancestral": ancestral_moves,
    "euler": ddim_moves,
    "sde": sde_moves,
}
