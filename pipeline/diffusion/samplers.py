"""Samplers on a given grid of levels, one short procedure each, and the table SAMPLERS.

All walk in y = z / alpha, where every scaling looks the same (dy/ds = (y - x_hat) / s, s = exp(gamma / 2)), so any of them samples
any trained model. A procedure is called as

    fn(y, gammas, noise, conditioning, **options) -> Procedure[Tensor]

y: (n, ...) the start at gammas[0], owned by the procedure, which overwrites it. gammas: float64 (steps,), strictly descending, the
levels to query. noise: one generator an image, read only where a move adds noise. The last move goes to s = 0, where y is x_hat, and
is what the procedure returns. Coefficients are Python floats, computed once at the call; bad options raise there, not in a step.
`clip` limits x_hat (see `guidance.clipped`); eps_hat = (y - x_hat) / s follows it, being never stored.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.choose import choose
from pipeline.diffusion.adaptive import adaptive
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Process, shaped
from pipeline.diffusion.guidance import Clip, clipped
from pipeline.diffusion.procedure import Procedure, Query
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.schedule import step_variance
from pipeline.diffusion.walk import Move, levels, rows, walk

# --- first order: y_s = y + weight (x_hat - y) + deviation z ------------------------------------------------------------------


def _posterior_variances(gammas: list[float]) -> list[float]:
    """beta-tilde of each move, s_s^2 (1 - r), r = exp(gamma_s - gamma_t)."""
    return [math.exp(g_s) * -math.expm1(g_s - g_t) for g_t, g_s in zip(gammas, gammas[1:], strict=False)]


def _etas(eta: float | Sequence[float], moves: int) -> list[float]:
    values = [float(eta)] * moves if isinstance(eta, int | float) else [float(value) for value in eta]
    if len(values) != moves:
        raise ValueError(f"eta: need one value or one a move, {moves} of them, got {len(values)}")
    for step, value in enumerate(values):
        if not 0 <= value < math.inf:
            raise ValueError(f"eta must be at least 0 and finite, got {value:g} at step {step}")
    return values


def ddim_moves(gammas: list[float], eta: float | Sequence[float] = 0.0) -> list[Move]:
    """DDIM (Song et al. 2020, eq. 12 and 16): sigma^2 = eta^2 s_s^2 (1 - r), y_s = x_hat + sqrt(s_s^2 - sigma^2) / s_t (y - x_hat) + sigma z.

    Raises:
        ValueError: eta negative, or so large that sigma exceeds s_s (1 - abar_s < sigma_t^2 in z), naming the step.
    """
    etas = _etas(eta, len(gammas) - 1)
    moves = []
    for step, (g_t, g_s, variance) in enumerate(zip(gammas, gammas[1:], _posterior_variances(gammas), strict=False)):
        kept = math.exp(g_s) - etas[step] ** 2 * variance
        if kept < 0:
            largest = math.sqrt(math.exp(g_s) / variance)
            raise ValueError(
                f"eta {etas[step]:g} asks at step {step} (gamma {g_t:.4f} to {g_s:.4f}) for more noise than that level has; at most {largest:.6g}"
            )
        weight = -math.expm1((g_s - g_t) / 2) if etas[step] == 0 else 1 - math.sqrt(kept * math.exp(-g_t))
        moves.append(Move(weight, etas[step] * math.sqrt(variance)))
    return moves


def euler_ancestral_moves(gammas: list[float], eta: float = 1.0) -> list[Move]:
    """Euler to s_down, then noise s_up, s_up = min(s_s, eta s_s sqrt(1 - r)), s_down^2 + s_up^2 = s_s^2 (k-diffusion)."""
    (eta,) = _etas(eta, 1)
    moves = []
    for g_t, g_s, variance in zip(gammas, gammas[1:], _posterior_variances(gammas), strict=False):
        up = min(eta**2 * variance, math.exp(g_s))
        moves.append(Move(1 - math.sqrt((math.exp(g_s) - up) * math.exp(-g_t)), math.sqrt(up)))
    return moves


def reverse_diffusion_moves(gammas: list[float]) -> list[Move]:
    """The reverse SDE discretised as its forward noise was (Song et al. 2021, appendix E): the posterior's mean, variance s_t^2 - s_s^2."""
    return [
        Move(-math.expm1(g_s - g_t), math.sqrt(math.exp(g_t) * -math.expm1(g_s - g_t)))
        for g_t, g_s in zip(gammas, gammas[1:], strict=False)
    ]


def sde_moves(gammas: list[float], lam: float = 1.0) -> list[Move]:
    """Euler-Maruyama of dy = (1 + lam^2) (y - x_hat) / s ds + lam sqrt(2 s) dW, s falling (Song et al. 2021): 0 is the ODE, 1 the SDE."""
    if not 0 <= lam < math.inf:
        raise ValueError(f"lam must be at least 0 and finite, got {lam:g}")
    moves = []
    for g_t, g_s in zip(gammas, gammas[1:], strict=False):
        fall = -math.expm1((g_s - g_t) / 2)  # (s_t - s_s) / s_t
        moves.append(Move((1 + lam**2) * fall, lam * math.sqrt(2 * math.exp(g_t) * fall)))
    return moves


def ancestral_moves(gammas: list[float], variance: str, process: Process | None) -> list[Move]:
    """The posterior's mean r y + (1 - r) x_hat with variance beta-tilde, or beta of the scaling the model was trained in."""
    if variance == "beta_tilde":
        variances = _posterior_variances(gammas)
    else:
        grid = torch.tensor(gammas, dtype=torch.float64)
        variances = step_variance(_scaling(process), grid[:-1], grid[1:]).tolist()
    weights = [-math.expm1(g_s - g_t) for g_t, g_s in zip(gammas, gammas[1:], strict=False)]
    return [Move(weight, math.sqrt(value)) for weight, value in zip(weights, variances, strict=True)]


def _scaling(process: Process | None) -> str:
    if process is None:
        raise ValueError("variance 'beta' and 'learned' depend on the scaling the model was trained in: give process=denoiser.process")
    return process.scaling


def ddim(
    y: Tensor,
    gammas: Tensor,
    noise: Noise,
    conditioning: Conditioning,
    *,
    eta: float | Sequence[float] = 0.0,
    clip: Clip | float | None = None,
) -> Procedure[Tensor]:
    """DDIM with any eta, one value or one a move: 0 deterministic, 1 DDPM's posterior variance. See `ddim_moves`."""
    grid = levels(gammas, y)
    return clipped(walk(y, grid, ddim_moves(grid, eta), noise, conditioning), clip)


def euler(
    y: Tensor, gammas: Tensor, noise: Noise, conditioning: Conditioning, *, clip: Clip | float | None = None
) -> Procedure[Tensor]:
    """Euler on the probability flow in s. In y this is DDIM with eta 0, exactly (Karras et al. 2022)."""
    return ddim(y, gammas, noise, conditioning, clip=clip)


def euler_ancestral(
    y: Tensor,
    gammas: Tensor,
    noise: Noise,
    conditioning: Conditioning,
    *,
    eta: float = 1.0,
    clip: Clip | float | None = None,
) -> Procedure[Tensor]:
    """Euler's step too far and fresh noise back. See `euler_ancestral_moves`."""
    grid = levels(gammas, y)
    return clipped(walk(y, grid, euler_ancestral_moves(grid, eta), noise, conditioning), clip)


def sde(
    y: Tensor,
    gammas: Tensor,
    noise: Noise,
    conditioning: Conditioning,
    *,
    lam: float = 1.0,
    clip: Clip | float | None = None,
) -> Procedure[Tensor]:
    """Every process between the probability flow (lam 0) and the reverse SDE (lam 1), and beyond. See `sde_moves`."""
    grid = levels(gammas, y)
    return clipped(walk(y, grid, sde_moves(grid, lam), noise, conditioning), clip)


def ancestral(
    y: Tensor,
    gammas: Tensor,
    noise: Noise,
    conditioning: Conditioning,
    *,
    variance: str = "beta_tilde",
    process: Process | None = None,
    clip: Clip | float | None = None,
) -> Procedure[Tensor]:
    """DDPM's ancestral sampling (Ho et al. 2020, algorithm 2); 'learned' interpolates log beta and log beta-tilde (IDDPM, eq. 15).

    variance: 'beta_tilde', 'beta' or 'learned'; the latter two need `process`. No noise in the last move.
    """
    if variance not in ("beta_tilde", "beta", "learned"):
        raise ValueError(f"variance must be 'beta_tilde', 'beta' or 'learned', got '{variance}'")
    grid = levels(gammas, y)
    if variance == "learned":
        upper = ancestral_moves(grid, "beta", process)
        return clipped(_learned(y, grid, upper, ancestral_moves(grid, "beta_tilde", None), noise, conditioning), clip)
    return clipped(walk(y, grid, ancestral_moves(grid, variance, process), noise, conditioning), clip)


def _learned(
    y: Tensor, grid: list[float], upper: list[Move], lower: list[Move], noise: Noise, conditioning: Conditioning
) -> Procedure[Tensor]:
    """log deviation = (v + 1) / 2 log sqrt(beta) + (1 - v) / 2 log sqrt(beta-tilde), v the network's second half, unbounded."""
    *queried, last = rows(grid, y)
    draws = torch.empty_like(y)
    for level, (weight, high), (_, low) in zip(queried, upper, lower, strict=True):
        answer = yield Query(y, level, conditioning)
        if answer.variance is None:
            raise ValueError("variance 'learned' needs a network with learned variance; use 'beta' or 'beta_tilde'")
        log_high, log_low = math.log(high), math.log(low)
        deviation = answer.variance.to(y.dtype).mul((log_high - log_low) / 2).add_((log_high + log_low) / 2).exp_()
        y.lerp_(answer.x_hat, weight).addcmul_(noise.normal_(draws), deviation)
    return (yield Query(y, last, conditioning)).x_hat


# --- second order -----------------------------------------------------------------------------------------------------------


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
    process: Process | None = None,
    clip: Clip | float | None = None,
) -> Procedure[Tensor]:
    """EDM's second-order sampler (Karras et al. 2022, algorithm 2): 2 steps - 1 queries.

    churn: S_churn; where churn_min <= s <= churn_max noise is raised to s (1 + min(churn / steps, sqrt(2) - 1)), but never beyond the
    model's gamma_max (without `process`: the first level). churn_noise: S_noise, the deviation of the added noise.
    """
    if not (0 <= churn < math.inf and churn_noise >= 0):
        raise ValueError(f"churn and churn_noise must be at least 0 and finite, got {churn:g} and {churn_noise:g}")
    grid = levels(gammas, y)
    highest = grid[0] if process is None else max(process.gamma_max, grid[0])
    raised = list(grid)
    for index, g in enumerate(grid[:-1]):
        if churn > 0 and churn_min <= math.exp(g / 2) <= churn_max:
            raised[index] = min(g + 2 * math.log1p(min(churn / len(grid), math.sqrt(2) - 1)), highest)
    return clipped(heun_walk(y, grid, raised, churn_noise, noise, conditioning, finish=True), clip)


def heun_walk(
    y: Tensor,
    grid: list[float],
    raised: list[float],
    churn_noise: float,
    noise: Noise | None,
    conditioning: Conditioning,
    *,
    finish: bool,
) -> Procedure[Tensor]:
    """Heun's rule through the levels, each first raised to `raised`; with `finish` the move to s = 0 too."""
    low, high = rows(grid, y), rows(raised, y)
    draws = torch.empty_like(y) if raised != grid else y
    for index in range(len(grid) - 1):
        g_t, g_s = raised[index], grid[index + 1]
        if g_t > grid[index] and noise is not None:
            added = math.exp(g_t / 2) * math.sqrt(-math.expm1(grid[index] - g_t))
            y.add_(noise.normal_(draws), alpha=added * churn_noise)
        first = (yield Query(y, high[index], conditioning)).x_hat
        weight = -math.expm1((g_s - g_t) / 2)
        ahead = torch.lerp(y, first, weight)
        y.lerp_(first, weight / 2)  # frees `first`: what is left is half the slope at the far end
        second = (yield Query(ahead, low[index + 1], conditioning)).x_hat
        half = math.expm1((g_t - g_s) / 2) / 2
        y.sub_(ahead, alpha=half).add_(second, alpha=half)
    if not finish:
        return y
    return (yield Query(y, low[-1], conditioning)).x_hat


def _log_ratios(grid: list[float]) -> list[float]:
    """h of each move: log(s_t / s_s)."""
    return [(g_t - g_s) / 2 for g_t, g_s in zip(grid, grid[1:], strict=False)]


def dpmpp_2m(
    y: Tensor, gammas: Tensor, noise: Noise, conditioning: Conditioning, *, clip: Clip | float | None = None
) -> Procedure[Tensor]:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): second order from one query a step, by the last answer but one."""
    grid = levels(gammas, y)
    return clipped(multistep_walk(y, grid, multistep_moves(grid, 0.0), noise, conditioning, finish=True), clip)


def dpmpp_2m_sde(
    y: Tensor,
    gammas: Tensor,
    noise: Noise,
    conditioning: Conditioning,
    *,
    eta: float = 1.0,
    clip: Clip | float | None = None,
) -> Procedure[Tensor]:
    """The SDE form of DPM-Solver++ 2M (Lu et al. 2022, section 4.3, the midpoint rule); eta is lam^2 of `sde`."""
    (eta,) = _etas(eta, 1)
    grid = levels(gammas, y)
    return clipped(multistep_walk(y, grid, multistep_moves(grid, eta), noise, conditioning, finish=True), clip)


def multistep_moves(grid: list[float], eta: float) -> list[tuple[float, float, float, float]]:
    """(a, b, c, deviation) of y_s = a y + b x_hat + c (x_hat of the level before) + deviation z.

    With h = log(s_t / s_s): a = exp(-(1 + eta) h), b + c = 1 - a, c = -(1 - a) h / (2 h_before), deviation = s_s sqrt(1 - exp(-2 eta h)).
    """
    steps = _log_ratios(grid)
    moves = []
    for index, h in enumerate(steps):
        gain = -math.expm1(-(1 + eta) * h)
        c = 0.0 if index == 0 else -gain * h / (2 * steps[index - 1])
        deviation = math.exp(grid[index + 1] / 2) * math.sqrt(-math.expm1(-2 * eta * h))
        moves.append((1 - gain, gain - c, c, deviation))
    return moves


def multistep_walk(
    y: Tensor,
    grid: list[float],
    moves: list[tuple[float, float, float, float]],
    noise: Noise | None,
    conditioning: Conditioning,
    *,
    finish: bool,
) -> Procedure[Tensor]:
    """The moves of `multistep_moves`; with `finish` the move to s = 0 too, which is first order."""
    level = rows(grid, y)
    draws = torch.empty_like(y) if any(move[3] for move in moves) else y
    before: Tensor | None = None
    for index, (a, b, c, deviation) in enumerate(moves):
        x_hat = (yield Query(y, level[index], conditioning)).x_hat
        y.mul_(a).add_(x_hat, alpha=b)
        if before is not None:
            y.add_(before, alpha=c)
        if deviation and noise is not None:
            y.add_(noise.normal_(draws), alpha=deviation)
        before = x_hat
    if not finish:
        return y
    return (yield Query(y, level[-1], conditioning)).x_hat


# --- Langevin ---------------------------------------------------------------------------------------------------------------


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
    """Annealed Langevin dynamics (Song & Ermon 2019, algorithm 1; defaults of NCSNv2), then x_hat.

    At each level, steps_per_level times y += e score + sqrt(2 e) z with e = step_size s^2. step_size is the published
    epsilon / s_min^2: 0.2 in NCSN (100 steps a level), 0.062 in NCSNv2. A fixed step leaves a bias of e / 2 in the variance.
    """
    _check_langevin(steps_per_level, "steps_per_level", step_size, "step_size", 2.0)
    grid = levels(gammas, y)
    repeated = [g for g in grid for _ in range(steps_per_level)]
    moves = [Move(step_size, math.exp(g / 2) * math.sqrt(2 * step_size)) for g in repeated]
    return clipped(walk(y, [*repeated, grid[-1]], moves, noise, conditioning), clip)


def _check_langevin(steps: int, steps_name: str, size: float, size_name: str, limit: float) -> None:
    if steps < 0:
        raise ValueError(f"{steps_name} must be at least 0, got {steps}")
    if not 0 < size < limit:
        raise ValueError(f"{size_name} must be above 0 and below {limit:g}, got {size:g}")


PREDICTORS: dict[str, Callable[[list[float]], list[Move]]] = {
    "reverse_diffusion": reverse_diffusion_moves,
    "ancestral": lambda grid: ancestral_moves(grid, "beta_tilde", None),
    "euler": ddim_moves,
    "sde": sde_moves,
}


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
    """Predictor-corrector (Song et al. 2021, algorithms 2-5): Langevin steps at a level, then the predictor's move to the next.

    predictor: key of PREDICTORS. Corrector: y += e score + sqrt(2 e) z, e = 2 (snr |z| / |score|)^2.
    Note: the published step takes the mean of the norms over the batch; here each image has its own, so that it does not depend
    on its batch.
    """
    _check_langevin(corrector_steps, "corrector_steps", snr, "snr", 1.0)
    grid = levels(gammas, y)
    moves = choose(PREDICTORS, predictor, "predictor")(grid)
    return clipped(_predict_correct(y, grid, moves, noise, conditioning, corrector_steps, snr), clip)


def _predict_correct(
    y: Tensor, grid: list[float], moves: list[Move], noise: Noise, conditioning: Conditioning, corrections: int, snr: float
) -> Procedure[Tensor]:
    draws, dims = torch.empty_like(y), tuple(range(1, y.ndim))
    level = rows(grid, y)
    for index, g in enumerate(grid):
        for _ in range(corrections):
            x_hat = (yield Query(y, level[index], conditioning)).x_hat
            pull = x_hat - y
            noise.normal_(draws)
            ratio = torch.linalg.vector_norm(draws, dim=dims) / torch.linalg.vector_norm(pull, dim=dims)
            root = shaped(ratio, y) * (math.sqrt(2) * snr * math.exp(g / 2))  # sqrt(e) / s
            y.addcmul_(root.square(), pull).addcmul_(root, draws, value=math.sqrt(2) * math.exp(g / 2))
        x_hat = (yield Query(y, level[index], conditioning)).x_hat
        if index == len(moves):
            return x_hat
        y.lerp_(x_hat, moves[index].weight)
        if moves[index].deviation:
            y.add_(noise.normal_(draws), alpha=moves[index].deviation)
    raise AssertionError("a grid has at least one level")


# --- the start, the way back, the table ---------------------------------------------------------------------------------------


def prior(process: Process, shape: Sequence[int], noise: Noise, dtype: torch.dtype = torch.float32) -> Tensor:
    """y at gamma_max, N(0, v I) with the model's own v, shape (n, ...) of `noise`'s n images."""
    return noise.normal_(torch.empty(*shape, dtype=dtype, device=noise.device)).mul_(math.sqrt(process.prior_variance))
