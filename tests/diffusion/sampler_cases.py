"""What the sampler tests share: oracles, noise that is an impulse, and the exact moments of an affine sampler."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Prediction, Process
from pipeline.diffusion.oracles.exact import GaussianMixture, diagonal_mixture, full_mixture
from pipeline.diffusion.procedure import Answer, Procedure, Query, drive
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.sampling.samplers import SAMPLERS
from pipeline.diffusion.scaling import prior_variance
from pipeline.diffusion.schedule import LinearGamma

NONE = Conditioning()
LOW, HIGH = -9.0, 5.0
PROCESS = Process("vp", LOW, HIGH, prior_variance("vp", HIGH), LinearGamma(LOW, HIGH))
DETERMINISTIC = [name for name, sampler in SAMPLERS.items() if not sampler.stochastic]
FIXED = [name for name in DETERMINISTIC if name != "adaptive"]
# options under which a sampler has another rule than by default
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in SAMPLERS),
    ("ancestral", {"variance": "beta"}),
    ("ddim", {"eta": 0.6}),
    ("ddim", {"eta": 1.0}),
    ("euler_ancestral", {"eta": 0.5}),
    ("heun", {"churn": 4.0, "churn_noise": 1.003}),
    ("dpmpp_2m_sde", {"eta": 0.3}),
    ("sde", {"lam": 0.4}),
    ("sde", {"lam": "sqrt(t)"}),
    ("ddim", {"sigma_1": 0.1}),
    ("heun", {"churn": 4.0, "churn_last": True}),
    ("langevin", {"level": -3.0, "finish": "y"}),
    ("predictor_corrector", {"predictor": "euler", "corrector_steps": 2}),
    ("predictor_corrector", {"predictor": "euler", "sde": "vp", "corrector_steps": 0}),
]


def pairwise(*sizes: int) -> list[tuple[int, ...]]:
    """A covering array: rows of one value of each factor, 0..size-1, in which every pair of values of every two factors
    comes together at least once. Greedy: each row starts from an open pair and closes as many others as it can.
    """
    factors = range(len(sizes))
    open_pairs = {((i, a), (j, b)) for i in factors for j in range(i) for a in range(sizes[i]) for b in range(sizes[j])}
    rows: list[tuple[int, ...]] = []
    while open_pairs:
        row = dict(min(open_pairs))
        for k in sorted(set(factors) - set(row), key=lambda k: -sizes[k]):
            gains = [
                sum(tuple(sorted(((k, v), other), reverse=True)) in open_pairs for other in row.items())
                for v in range(sizes[k])
            ]
            row[k] = gains.index(max(gains))
        open_pairs -= {((i, row[i]), (j, row[j])) for i in factors for j in range(i)}
        rows.append(tuple(row[k] for k in factors))
    return rows


def names(value: object) -> str | None:
    """A readable test id for an options dict."""
    return ",".join(f"{k}={v}" for k, v in value.items()) or "default" if isinstance(value, dict) else None


def uniform_gamma(steps: int, low: float = LOW, high: float = HIGH) -> Tensor:
    return torch.linspace(high, low, steps, dtype=torch.float64)


def mixture() -> GaussianMixture:
    """Three overlapping components in two dimensions: curved flows."""
    return diagonal_mixture(
        [0.5, 0.3, 0.2], [[-0.5, 0.2], [0.5, 0.4], [0.1, -0.6]], [[0.04, 0.09], [0.09, 0.03], [0.05, 0.05]]
    )


def correlated() -> GaussianMixture:
    """One Gaussian in three dimensions whose flow is known."""
    root = torch.tensor([[0.5, 0.0, 0.0], [0.3, 0.2, 0.0], [-0.1, 0.2, 0.3]], dtype=torch.float64)
    mean = torch.tensor([[0.2, -0.4, 0.1]], dtype=torch.float64)
    return full_mixture(torch.ones(1), mean, (root @ root.T)[None])


class Impulses(Noise):
    """Draw j is 1 in row j + 2 and 0 elsewhere: an affine sampler then shows its coefficients, one a row."""

    def __init__(self, rows: int) -> None:
        super().__init__(range(rows))
        self.draws = 0

    def normal_(self, out: Tensor) -> Tensor:
        out.zero_()
        if self.draws + 2 < len(out):
            out[self.draws + 2] = 1
        self.draws += 1
        return out


def affine_coefficients(
    procedure: Callable[[Tensor, Noise], Procedure[Tensor]], answerer: Any
) -> tuple[float, float, Tensor]:
    """(constant, factor of the start, factors of the draws) of a sampler of one pixel that is affine in both."""
    counter = Impulses(1)
    drive(procedure(torch.zeros(1, 1, 1, 1, dtype=torch.float64), counter), answerer)
    impulses = Impulses(counter.draws + 2)
    start = torch.zeros(counter.draws + 2, 1, 1, 1, dtype=torch.float64)
    start[1] = 1
    out = drive(procedure(start, impulses), answerer).flatten()
    return float(out[0]), float(out[1] - out[0]), out[2:] - out[0]


def gaussian_pixel(mean: float, variance: float) -> Callable[..., Prediction]:
    """The oracle of one pixel, x ~ N(mean, variance)."""

    def answer(y: Tensor, gamma: Tensor, conditioning: Conditioning, shared: object = None) -> Prediction:
        share = variance / (variance + torch.exp(gamma)).view(-1, 1, 1, 1)
        return Prediction(mean + share * (y - mean))

    return answer


def one_move(procedure: Procedure[Tensor], answers: list[Answer]) -> Tensor:
    """y at the query after these answers."""
    query: Query = next(procedure)
    for answer in answers:
        query = procedure.send(answer)
    y = query.y.clone()
    procedure.close()
    return y


def slope(errors: list[float]) -> float:
    """Order of convergence by the last two of errors at n, 2n, 4n, ... steps."""
    return math.log2(errors[-2] / errors[-1])
