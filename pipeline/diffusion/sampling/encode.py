"""Image -> latent by the deterministic samplers run backwards, up the probability flow.

    fn(x, gammas, conditioning, **options) -> Procedure[Tensor]

x: (n, ...) clean images, taken as y at gammas[0], the lowest level; gammas: float64 (steps,), strictly ascending. The
result is y at gammas[-1], from where the sampler of the same name leads back as steps are refined. No randomness.
"""

from collections.abc import Callable

from torch import Tensor

from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.procedure import Procedure
from pipeline.diffusion.sampling.adaptive import adaptive_walk
from pipeline.diffusion.sampling.moves import ddim_moves, levels, walk
from pipeline.diffusion.sampling.second_order import heun_walk, two_step_moves, two_step_walk


def euler(x: Tensor, gammas: Tensor, conditioning: Conditioning) -> Procedure[Tensor]:
    """First order, one query a move (DDIM inversion: Song et al. 2020, section 4.3)."""
    grid = levels(gammas, x, ascending=True)
    return walk(x.clone(), grid, ddim_moves(grid), None, conditioning, finish=False)


def heun(x: Tensor, gammas: Tensor, conditioning: Conditioning) -> Procedure[Tensor]:
    """Second order, two queries a move."""
    grid = levels(gammas, x, ascending=True)
    return heun_walk(x.clone(), grid, grid, 0.0, None, conditioning, finish=False)


def dpmpp_2m(x: Tensor, gammas: Tensor, conditioning: Conditioning) -> Procedure[Tensor]:
    """Second order, one query a move."""
    grid = levels(gammas, x, ascending=True)
    return two_step_walk(x.clone(), grid, two_step_moves(grid), None, conditioning, finish=False)


def adaptive(
    x: Tensor,
    gammas: Tensor,
    conditioning: Conditioning,
    *,
    tolerance: float = 1e-3,
    solver: str = "dopri5",
    max_evaluations: int = 2000,
) -> Procedure[Tensor]:
    """Error control for each image, between the grid's ends. Options as in `adaptive.adaptive`."""
    grid = levels(gammas, x, ascending=True)
    return adaptive_walk(x.clone(), grid, conditioning, tolerance, solver, max_evaluations, finish=False)


ENCODERS: dict[str, Callable[..., Procedure[Tensor]]] = {
    "euler": euler,
    "ddim": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "adaptive": adaptive,
}
