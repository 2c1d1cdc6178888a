"""The probability-flow ODE with the change of log density, each image stepped on its own.

Solved in tau = log s = gamma / 2 for the normalised state w = y / sqrt(s^2 + sigma_data^2), in which the ODE of Gaussian
data of that deviation stands still, so that steps are spent on what the network has learnt beyond it:

    dw/dtau = (sigma_data^2 / (s^2 + sigma_data^2) y - x_hat) / sqrt(s^2 + sigma_data^2)
"""

import math
from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.choose import choose
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.decoders import row_sum
from pipeline.diffusion.denoiser import shaped
from pipeline.diffusion.procedure import Answer, Procedure, Query


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


@dataclass(frozen=True)
class Flow:
    """The end of a solve, float64.

    y: (n, ...) at gamma_max; x_hat: (n, ...) the network's answer at the start.
    log_volume: (n,) log |d y_end / d y_start| = log p(y_start) - log p(y_end), mean over the probes.
    probe_variance: (n,) its estimated variance from the choice of probes (0 for the exact trace);
    evaluations: (n,); error: (n,) sum of the estimated errors of each step in log p, nats.
    """

    y: Tensor
    x_hat: Tensor
    log_volume: Tensor
    probe_variance: Tensor
    evaluations: Tensor
    error: Tensor


@dataclass(frozen=True)
class _Slope:
    """The right-hand side at one point, n rows: dw/dtau (n, ...), traces (n, k) of d x_hat / d y, J^T e (n, k, ...)."""

    w: Tensor
    trace: Tensor
    product: Tensor


@dataclass
class _State:
    """The rows still on their way."""

    row: Tensor  # place in the batch
    tau: Tensor
    h: Tensor  # the next step
    w: Tensor
    slope_w: Tensor  # the right-hand side here: the first stage of the next step
    slope_trace: Tensor
    slope_product: Tensor
    integral: Tensor  # (n, k): of the trace beyond that of Gaussian data
    swept: Tensor  # (n, k, ...): of J^T e
    error: Tensor
    evaluations: Tensor

    def at(self, index: Tensor) -> "_State":
        return _State(**{name: value[index] for name, value in vars(self).items()})

    def where(self, mask: Tensor, other: "_State") -> "_State":
        """Row by row, this where the mask says so, else the other."""
        return _State(
            **{
                name: torch.where(mask.view(-1, *[1] * (value.ndim - 1)), value, getattr(other, name))
                for name, value in vars(self).items()
            }
        )


@dataclass(frozen=True)
class Probes:
    """Vectors e for the trace e^T J e: (n, k, ...), the same through the whole solve (Grathwohl et al. 2019).

    exact: they are the D unit vectors, and the trace is the sum instead of the mean.
    """

    vectors: Tensor
    exact: bool = False

    def traces(self, products: Tensor) -> Tensor:
        """(n, k) from J^T e (n, k, ...); (n, 1) for the exact trace."""
        n, k = products.shape[:2]
        traces = row_sum((self.vectors * products).flatten(0, 1)).view(n, k)
        return row_sum(traces)[:, None] if self.exact else traces

    def variance(self, swept: Tensor) -> Tensor:
        """(n,) estimated variance of the mean of k traces e^T A e, from A^T e (n, k, ...).

        Of one Rademacher probe it is 2 (|A|^2 - sum of A_ii^2) for symmetric A. |A^T e|^2 estimates the first part; two
        probes estimate the second, by (e A^T e)_i (f A^T f)_i; from one alone it is taken to be trace^2 / D, which is at
        most that, so that the variance is not underestimated.
        """
        n, k = swept.shape[:2]
        if self.exact:
            return torch.zeros(n, dtype=torch.float64, device=swept.device)
        frobenius = row_sum(swept**2) / k
        diagonals = self.vectors * swept
        if k == 1:
            diagonal = row_sum(diagonals) ** 2 / diagonals[0].numel()
        else:
            diagonal = row_sum(diagonals.sum(1) ** 2 - (diagonals**2).sum(1)) / (k * (k - 1))
        return (2 / k * (frobenius - diagonal)).clamp(min=0)


class _Path:
    """One solve's constants, and its right-hand side as a question."""

    def __init__(self, probes: Probes, data_std: float, ends: tuple[float, float], conditioning: Conditioning) -> None:
        self.probes = probes
        self.data_std = data_std
        self.ends = ends
        self.conditioning = conditioning
        self.dimensions = probes.vectors[0, 0].numel()

    def norm(self, tau: Tensor) -> Tensor:
        """sqrt(s^2 + sigma_data^2)."""
        return torch.sqrt(torch.exp(2 * tau) + self.data_std**2)

    def keep(self, index: Tensor) -> None:
        self.probes = Probes(self.probes.vectors[index], self.probes.exact)
        self.conditioning = self.conditioning[index]

    def x_hat(self, tau: Tensor, w: Tensor, slope_w: Tensor) -> Tensor:
        """What the network answered where dw/dtau is slope_w."""
        norm = self.norm(tau)
        return shaped(self.data_std**2 / norm, w) * w - shaped(norm, w) * slope_w

    def slope(self, tau: Tensor, w: Tensor) -> Generator[Query, Answer, _Slope]:
        norm = self.norm(tau)
        y = shaped(norm, w) * w
        gamma = (2 * tau).clamp(*self.ends)
        answer = yield Query(y, gamma, self.conditioning, probes=self.probes.vectors.transpose(0, 1))
        if answer.products is None:
            raise RuntimeError("a query with probes was answered without products")
        c_skip = (self.data_std / norm) ** 2
        products = answer.products.double().transpose(0, 1)
        trace = self.probes.traces(products) - self.dimensions * c_skip[:, None]
        kept = products.flatten(2)[:, :, :0] if self.probes.exact else products
        return _Slope((shaped(c_skip, y) * y - answer.x_hat.double()) / shaped(norm, y), trace, kept)


def _weighted(weights: tuple[float, ...], values: list[Tensor]) -> Tensor:
    """Sum of weight x value over the stages, the zeros left out."""
    total: Tensor | None = None
    for weight, value in zip(weights, values, strict=True):
        if weight:
            total = value * weight if total is None else total.add(value, alpha=weight)
    if total is None:
        raise ValueError("a row of a tableau needs a weight")
    return total


def _attempt(path: _Path, pair: Pair, state: _State) -> Generator[Query, Answer, tuple[_State, Tensor, Tensor]]:
    """One step of every row: the state after it, the rms error of y in units of s, and the error in log p (signed, nats)."""
    slopes = [_Slope(state.slope_w, state.slope_trace, state.slope_product)]
    h = shaped(state.h, state.w)
    w, tau = state.w, state.tau
    for node, weights in zip(pair.nodes, pair.stages, strict=True):
        w = state.w + h * _weighted(weights, [slope.w for slope in slopes])
        tau = state.tau + node * state.h
        slopes.append((yield from path.slope(tau, w)))
    last = pair.stages[-1]
    error_w = h * _weighted(pair.error, [slope.w for slope in slopes])
    error_integral = state.h * _weighted(pair.error, [slope.trace for slope in slopes]).mean(1)
    ratio = path.norm(tau) / torch.exp(tau)
    rms = torch.sqrt(row_sum(error_w**2) / path.dimensions) * ratio
    # log p(y) moves by score . error; the score is -(w + ratio^2 dw/dtau) / norm, the error of y is norm error_w
    error_log_p = -row_sum(w * error_w) - ratio**2 * row_sum(slopes[-1].w * error_w) - error_integral
    after = _State(
        state.row,
        tau,
        state.h,
        w,
        slopes[-1].w,
        slopes[-1].trace,
        slopes[-1].product,
        state.integral + state.h[:, None] * _weighted(last, [slope.trace for slope in slopes[:-1]]),
        state.swept + shaped(state.h, state.swept) * _weighted(last, [slope.product for slope in slopes[:-1]]),
        state.error + error_log_p.abs(),
        state.evaluations,
    )
    return after, rms, error_log_p


def _check(state: _State, rms: Tensor, max_evaluations: int, tolerance: float) -> None:
    """Raises ValueError for a network that answers NaN, and where the evaluations are used up."""
    bad = ~torch.isfinite(rms)
    if bool(bad.any()):
        index = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"ode: not a finite number from the network for image {int(state.row[index])} of the batch, after "
            f"{int(state.evaluations[index])} evaluations, between gamma {2 * float(state.tau[index]):.4f} and "
            f"{2 * float(state.tau[index] + state.h[index]):.4f}"
        )
    if bool((state.evaluations >= max_evaluations).any()):
        index = int(state.evaluations.argmax())
        raise ValueError(
            f"ode: image {int(state.row[index])} of the batch is at gamma {2 * float(state.tau[index]):.4f} after "
            f"{max_evaluations} evaluations (step {2 * float(state.h[index]):.2g} in gamma): raise max_evaluations, or "
            f"take a tolerance above {tolerance:g}"
        )


def solve(
    y: Tensor,
    ends: tuple[float, float],
    conditioning: Conditioning,
    probes: Probes,
    *,
    tolerance: float = 1e-3,
    pair: str = "dopri5",
    data_std: float = 0.5,
    first_step: float = 0.25,
    max_evaluations: int = 10_000,
) -> Procedure[Flow]:
    """From y (n, ...) at gamma = ends[0] up to ends[1], with the log volume of the map.

    Every row has its own steps and leaves when it has arrived. A step is accepted where its error, by the embedded pair,
    is at most `tolerance` both in y (root mean square over pixels, in units of s) and in log p (nats a dimension).

    first_step: the first step tried, in log s.

    Raises:
        ValueError: no finite number from the network, or `max_evaluations` used up by an image.
    """
    solver = choose(PAIRS, pair, "solver")
    path = _Path(probes, data_std, ends, conditioning)
    n, device = len(y), y.device
    tau = torch.full((n,), ends[0] / 2, dtype=torch.float64, device=device)
    target = ends[1] / 2
    w = y.double() / shaped(path.norm(tau), y.double())
    slope = yield from path.slope(tau, w)
    start = path.x_hat(tau, w, slope.w)
    zeros = torch.zeros_like(tau)
    state = _State(
        row=torch.arange(n, device=device),
        tau=tau,
        h=torch.full_like(tau, min(first_step, target - ends[0] / 2)),
        w=w,
        slope_w=slope.w,
        slope_trace=slope.trace,
        slope_product=slope.product,
        integral=torch.zeros_like(slope.trace),
        swept=torch.zeros_like(slope.product),
        error=zeros,
        evaluations=torch.ones_like(tau, dtype=torch.int64),
    )
    end_w = torch.empty_like(w)
    volume, variance, error = (torch.empty_like(tau) for _ in range(3))
    evaluations = torch.empty_like(state.evaluations)
    while len(state.row):
        after, rms, error_log_p = yield from _attempt(path, solver, state)
        state.evaluations += len(solver.nodes)
        _check(state, rms + error_log_p, max_evaluations, tolerance)
        badness = torch.maximum(rms, error_log_p.abs() / path.dimensions) / tolerance
        accepted = badness <= 1
        arrived = accepted & (after.tau >= target - 1e-12)
        # by exp and log: the bits of torch.pow depend on the place in the tensor
        factor = (0.9 * torch.exp(torch.log(badness.clamp(min=1e-10)) / -solver.order)).clamp(0.2, 5)
        # a rejected row keeps everything but its step
        state = after.where(accepted, state)
        state.h = torch.minimum(state.h * factor, target - state.tau)
        if bool(arrived.any()):
            done = arrived.nonzero()[:, 0]
            row = state.row[done]
            end_w[row] = state.w[done]
            volume[row] = state.integral[done].mean(1)
            variance[row] = Probes(path.probes.vectors[done], probes.exact).variance(state.swept[done])
            error[row], evaluations[row] = state.error[done], state.evaluations[done]
            rest = (~arrived).nonzero()[:, 0]
            state = state.at(rest)
            path.keep(rest)
    norm_start, norm_end = (math.sqrt(math.exp(gamma) + data_std**2) for gamma in ends)
    log_volume = path.dimensions * math.log(norm_end / norm_start) - volume
    return Flow(end_w * norm_end, start, log_volume, variance, evaluations, error)
