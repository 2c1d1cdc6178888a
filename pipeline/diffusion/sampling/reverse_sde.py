"""The predictors of Song et al. 2021 (appendices E to G) for the VP and sub-VP SDEs, as moves in y.

Each updates z of the SDE dz = -1/2 beta z dt + g dW in steps of its own discretisation,

    z_s = A z + B score(z) + sqrt(B') w,    w ~ N(0, I)

and is carried over to y = z / alpha with score(z) = -(z - alpha x_hat) / sigma^2. As published, N levels make N moves
that together cover the time from the first level to 0 (dt = 1 / N where the levels are equally spaced), and the last
one ends in its mean, without noise.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.choose import choose
from pipeline.diffusion.denoiser import Process
from pipeline.diffusion.sampling.moves import Move, floats
from pipeline.diffusion.scaling import SCALINGS
from pipeline.diffusion.schedule import VP, Schedule, SubVP, derivative

# beta and alpha_t -> (A, B, B')
Predictor = Callable[[float, float], tuple[float, float, float]]


def _root(beta: float) -> float:
    """sqrt(1 - beta)."""
    if beta >= 1:
        raise ValueError(
            f"this predictor needs steps of beta below 1, and one has {beta:.4g}: use more steps or 'euler'"
        )
    return math.sqrt(1 - beta)


def _vp_reverse_diffusion(beta: float, alpha: float) -> tuple[float, float, float]:
    return 2 - _root(beta), beta, beta


def _vp_euler(beta: float, alpha: float) -> tuple[float, float, float]:
    return 1 + beta / 2, beta, beta


def _vp_ancestral(beta: float, alpha: float) -> tuple[float, float, float]:
    return 1 / _root(beta), beta / _root(beta), beta


def _subvp(beta: float, alpha: float) -> tuple[float, float, float]:
    """g^2 = beta (1 - exp(-2 integral of beta)) = beta (1 - alpha^4); reverse diffusion is Euler-Maruyama here."""
    variance = beta * (1 - alpha**4)
    return 1 + beta / 2, variance, variance


REVERSE_SDES: dict[str, dict[str, Predictor]] = {
    "vp": {"reverse_diffusion": _vp_reverse_diffusion, "euler": _vp_euler, "ancestral": _vp_ancestral},
    "subvp": {"reverse_diffusion": _subvp, "euler": _subvp},
}


def _rate(law: Schedule, sde: str, tau: Tensor) -> Tensor:
    """beta at the SDE's own time tau, in closed form where the law is that SDE's, down to tau = 0 where no noise is."""
    if isinstance(law, VP) and sde == ("subvp" if isinstance(law, SubVP) else "vp"):
        return law.beta_min + tau * (law.beta_max - law.beta_min)
    t_min = _t_min(law)
    t = ((tau - t_min) / (1 - t_min)).clamp(0, 1)
    return derivative(lambda value: -2 * torch.log(SCALINGS[sde](law.gamma(value))), t) / (1 - t_min)


def _t_min(law: Schedule) -> float:
    """The SDE's time where the law's t is 0."""
    return law.t_min if isinstance(law, VP) else 0.0


def step_betas(grid: Sequence[float], sde: str, law: Schedule, *, tabled: bool = False) -> list[float]:
    """beta of the move that starts at each level.

    That of the table where the law has one, 1 - (alpha_t / alpha_s)^2; without, beta(tau) dtau, dtau in proportion to
    the distance of the levels in the SDE's own time tau, the last move being as long as the one before. tabled: beta as
    the published table of N steps has it, which for N levels runs from the first level's time to tau = 0.
    """
    gamma = torch.tensor(list(grid), dtype=torch.float64)
    if law.table is not None:
        log_signal = torch.cat([-2 * torch.log(SCALINGS[sde](gamma)), gamma.new_zeros(1)])
        return floats(torch.expm1(log_signal.diff()).neg())
    tau = _t_min(law) + (1 - _t_min(law)) * law.time(gamma).detach()
    if len(tau) == 1:
        return floats(_rate(law, sde, tau) * tau)
    steps = torch.cat([-tau.diff(), -tau.diff()[-1:]])
    steps = steps * tau[0] / steps.sum()
    if tabled:
        tau = (tau - tau[-1]) * tau[0] / (tau[0] - tau[-1])
    return floats(_rate(law, sde, tau) * steps)


def reverse_sde_moves(
    grid: Sequence[float], sde: str, predictor: str, process: Process
) -> tuple[list[Move], list[float]]:
    """The moves of a predictor, and at each level the corrector's alpha, 1 - beta.

    Note: the published corrector takes alpha from the VP SDE's table and has none for the sub-VP SDE, whose alpha(t) is
    the same: it is the same here.

    Raises:
        ValueError: unknown SDE or predictor ('ancestral' is of VP alone), or a step of beta 1 or more.
    """
    update = choose(choose(REVERSE_SDES, sde, "sde"), predictor, f"predictor of the {sde} SDE")
    law = process.time_law(f"sde '{sde}'")
    table = step_betas(grid, sde, law, tabled=True)
    betas = step_betas(grid, sde, law) if predictor == "euler" or sde == "subvp" else table
    alphas = [*floats(SCALINGS[sde](torch.tensor(list(grid), dtype=torch.float64))), 1.0]
    moves: list[Move] = []
    for index, gamma in enumerate(grid):
        a, b, variance = update(betas[index], alphas[index])
        weight = b / (a * alphas[index] ** 2 * math.exp(gamma))
        scale, deviation = a * alphas[index] / alphas[index + 1], math.sqrt(variance) / alphas[index + 1]
        moves.append(Move(weight, deviation, scale))
    moves[-1] = moves[-1]._replace(deviation=0.0)
    return moves, [1 - beta for beta in table]
