"""The probability-flow ODE with the change of log density, each image stepped on its own.

Solved in tau = log s = gamma / 2 for the normalised state w = y / sqrt(s^2 + sigma_data^2). There the ODE of Gaussian
data of that deviation stands still, so that steps are spent on what the network has learnt beyond it:

    dw/dtau = (sigma_data^2 / (s^2 + sigma_data^2) y - x_hat) / sqrt(s^2 + sigma_data^2)
    d log p / dtau = tr J - D,   J = d x_hat / d y
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from pipeline.choose import choose
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.procedure import Answer, Procedure, Query
from pipeline.diffusion.rows import row_sum, shaped
from pipeline.diffusion.runge_kutta import PAIRS, Pair, weighted


@dataclass(frozen=True)
class Flow:
    """The end of a solve, float64.

    y: (n, ...) at gamma_max; x_hat: (n, ...) the network's answer at the start.
    log_volume: (n,) log |d y_end / d y_start| = log p(y_start) - log p(y_end), mean over the probes.
    probe_variance: (n,) its estimated variance from the choice of probes (0 for the exact trace).
    evaluations: (n,) int64. error: (n,) nats, the root of the summed squares of each step's estimated error in log p.
    """

    y: Tensor
    x_hat: Tensor
    log_volume: Tensor
    probe_variance: Tensor
    evaluations: Tensor
    error: Tensor


# --- the trace ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """How tr J is had from vector-Jacobian products J^T e.

    kind: 'fixed', Rademacher vectors that stay through the solve, whose trace is a smooth function that steps can be
        chosen by (Hutchinson; Grathwohl et al. 2019); 'refreshed', new ones at each evaluation, steps being chosen by y
        alone: as unbiased, and the errors of the evaluations average out instead of adding up; 'exact', D unit vectors.
    probes: vectors an evaluation. generators: one a row, for their draws; rows may share one.
    """

    kind: str
    probes: int
    generators: Sequence[torch.Generator]

    def vectors(self, like: Tensor, rows: Sequence[int]) -> Tensor:
        """(n, k, ...) for the given rows of the batch, y (n, ...) there being `like`."""
        n, shape = len(like), like.shape[1:]
        if self.kind == "exact":
            dimensions = like[0].numel()
            unit = torch.eye(dimensions, dtype=torch.float64, device=like.device).view(1, dimensions, *shape)
            return unit.expand(n, *unit.shape[1:])
        out = torch.empty(n, self.probes, *shape, dtype=torch.float64, device=like.device)
        for vector, row in zip(out, rows, strict=True):
            vector.bernoulli_(0.5, generator=self.generators[row])
        return out.mul_(2).sub_(1)


def trace_variance(diagonals: Tensor, others: Tensor | None = None) -> Tensor:
    """(n,) estimated variance of the mean of k traces e^T J e, from e * J^T e (n, k, ...).

    Of one Rademacher vector it is 2 (|J|^2 - sum of J_ii^2) for symmetric J. |e * J^T e|^2 estimates the first part;
    products of such diagonals of two vectors the second: of different ones of the k, or of `others`, from independent
    vectors with the same J. From one vector alone it is taken to be trace^2 / D, which is at most that.
    """
    k = diagonals.shape[1]
    if not k:
        return torch.zeros(len(diagonals), dtype=diagonals.dtype, device=diagonals.device)
    frobenius = row_sum(diagonals**2) / k
    if k > 1:
        square = row_sum(diagonals.sum(1) ** 2 - (diagonals**2).sum(1)) / (k * (k - 1))
    elif others is not None:
        square = row_sum(diagonals * others)
    else:
        square = row_sum(diagonals) ** 2 / diagonals[0].numel()
    return 2 / k * (frobenius - square)


# --- the right-hand side ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slope:
    """The right-hand side at one point, n rows.

    w: (n, ...) dw/dtau; trace: (n,) tr J beyond that of Gaussian data; diagonals: (n, k, ...) e * J^T e, for the
    variance; (n, 0, ...) where the trace is exact.
    """

    w: Tensor
    trace: Tensor
    diagonals: Tensor


class _Path:
    """What one solve has beside its state: the rows still on their way and their vectors."""

    def __init__(self, trace: Trace, data_std: float, ends: tuple[float, float], conditioning: Conditioning) -> None:
        self.trace = trace
        self.data_std = data_std
        self.ends = ends
        self.conditioning = conditioning
        self.rows: list[int] = list(range(len(trace.generators)))
        self.vectors: Tensor | None = None

    def norm(self, tau: Tensor) -> Tensor:
        """sqrt(s^2 + sigma_data^2)."""
        return torch.sqrt(torch.exp(2 * tau) + self.data_std**2)

    def x_hat(self, tau: Tensor, w: Tensor, slope_w: Tensor) -> Tensor:
        """What the network answered where dw/dtau is slope_w."""
        norm = self.norm(tau)
        return shaped(self.data_std**2 / norm, w) * w - shaped(norm, w) * slope_w

    def keep(self, index: Tensor) -> None:
        kept = cast(list[int], index.tolist())  # pyright: ignore[reportUnknownMemberType]
        self.rows = [self.rows[i] for i in kept]
        self.conditioning = self.conditioning[index]
        self.vectors = None if self.vectors is None else self.vectors[index]

    def slope(self, tau: Tensor, w: Tensor) -> Generator[Query, Answer, _Slope]:
        """One evaluation: one forward and one vector-Jacobian product a vector."""
        norm = self.norm(tau)
        y = shaped(norm, w) * w
        vectors = self.vectors
        if vectors is None or self.trace.kind == "refreshed":
            vectors = self.trace.vectors(y, self.rows)
        self.vectors = vectors
        gamma = (2 * tau).clamp(*self.ends)
        answer = yield Query(y, gamma, self.conditioning, probes=vectors.transpose(0, 1))
        if answer.products is None:
            raise RuntimeError("a query with probes was answered without products")
        diagonals = vectors * answer.products.double().transpose(0, 1)
        trace = row_sum(diagonals)
        if self.trace.kind == "exact":
            diagonals = diagonals[:, :0]
        else:
            trace = trace / self.trace.probes
        c_skip = (self.data_std / norm) ** 2
        slope_w = (shaped(c_skip, y) * y - answer.x_hat.double()) / shaped(norm, y)
        return _Slope(slope_w, trace - y[0].numel() * c_skip, diagonals)


# --- the solver ---------------------------------------------------------------------------------------------------


@dataclass
class _State:
    """The rows still on their way."""

    row: Tensor  # place in the batch
    tau: Tensor
    h: Tensor  # the next step
    w: Tensor
    slope_w: Tensor  # the right-hand side here: the first stage of the next step
    slope_trace: Tensor
    slope_diagonals: Tensor
    integral: Tensor  # of the trace
    swept: Tensor  # (n, k, ...): integral of the diagonals, for fixed vectors
    spread: Tensor  # variance of the integral of the trace, for refreshed ones
    error: Tensor  # summed squares
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


def _spread(pair: Pair, diagonals: list[Tensor]) -> Tensor:
    """Variance of a step's weighted sum of traces, of independent vectors at each stage.

    Of one vector a stage the second one that `trace_variance` needs is made of the two stages nearest to it, on a line.
    """
    nodes = (0.0, *pair.nodes)
    total = torch.zeros(len(diagonals[0]), dtype=torch.float64, device=diagonals[0].device)
    for stage, weight in enumerate(pair.stages[-1]):
        if weight and diagonals[stage].shape[1]:
            a, b = sorted((i for i in range(len(nodes)) if i != stage), key=lambda i: abs(nodes[i] - nodes[stage]))[:2]
            share = (nodes[stage] - nodes[a]) / (nodes[b] - nodes[a]) if nodes[a] != nodes[b] else 0.0
            others = diagonals[a] + share * (diagonals[b] - diagonals[a])  # torch.lerp's bits depend on the place
            total = total + weight**2 * trace_variance(diagonals[stage], others)
    return total


def _attempt(path: _Path, pair: Pair, state: _State) -> Generator[Query, Answer, tuple[_State, Tensor, Tensor]]:
    """One step of every row: the state after it, and its errors: rms of y in units of s, and of log p in nats.

    The error of log p that steps are chosen by leaves out the trace where its vectors are refreshed.
    """
    slopes = [_Slope(state.slope_w, state.slope_trace, state.slope_diagonals)]
    h = state.h
    w, tau = state.w, state.tau
    for node, weights in zip(pair.nodes, pair.stages, strict=True):
        w = state.w + shaped(h, w) * weighted(weights, [slope.w for slope in slopes])
        tau = state.tau + node * h
        slopes.append((yield from path.slope(tau, w)))
    last, stages = pair.stages[-1], slopes[:-1]
    error_w = shaped(h, w) * weighted(pair.error, [slope.w for slope in slopes])
    error_integral = h * weighted(pair.error, [slope.trace for slope in slopes])
    ratio = path.norm(tau) / torch.exp(tau)
    rms = torch.sqrt(row_sum(error_w**2) / w[0].numel()) * ratio
    # log p(y) moves by score . error; the score is -(w + ratio^2 dw/dtau) / norm, the error of y is norm error_w
    moved = -row_sum(w * error_w) - ratio**2 * row_sum(slopes[-1].w * error_w)
    after = _State(
        row=state.row,
        tau=tau,
        h=h,
        w=w,
        slope_w=slopes[-1].w,
        slope_trace=slopes[-1].trace,
        slope_diagonals=slopes[-1].diagonals,
        integral=state.integral + h * weighted(last, [slope.trace for slope in stages]),
        swept=state.swept + shaped(h, state.swept) * weighted(last, [slope.diagonals for slope in stages]),
        spread=state.spread + h**2 * _spread(pair, [slope.diagonals for slope in slopes]),
        error=state.error + (moved - error_integral) ** 2,
        evaluations=state.evaluations,
    )
    return after, rms, moved if path.trace.kind == "refreshed" else moved - error_integral


def _check(state: _State, rms: Tensor, max_evaluations: int, tolerance: float) -> None:
    """Raises ValueError for a network that answers NaN, and where the evaluations are used up."""
    bad = ~torch.isfinite(rms)
    if bool(bad.any()):
        index = int(bad.nonzero()[0, 0])
        start, end = 2 * float(state.tau[index]), 2 * float(state.tau[index] + state.h[index])
        raise ValueError(
            f"ode: not a finite number from the network for image {int(state.row[index])} of the batch, after "
            f"{int(state.evaluations[index])} evaluations, between gamma {start:.4f} and {end:.4f}"
        )
    if bool((state.evaluations >= max_evaluations).any()):
        index = int(state.evaluations.argmax())
        raise ValueError(
            f"ode: image {int(state.row[index])} of the batch is at gamma {2 * float(state.tau[index]):.4f} after "
            f"{max_evaluations} evaluations (step {2 * float(state.h[index]):.2g} in gamma): raise max_evaluations, or "
            f"take a tolerance above {tolerance:g}"
        )


class _Arrivals:
    """Where the rows that have arrived are written."""

    def __init__(self, state: _State) -> None:
        self.w = torch.empty_like(state.w)
        self.integral, self.variance, self.error = (torch.empty_like(state.tau) for _ in range(3))
        self.evaluations = torch.empty_like(state.evaluations)

    def write(self, state: _State, kind: str) -> None:
        row = state.row
        self.w[row], self.integral[row] = state.w, state.integral
        self.error[row], self.evaluations[row] = state.error.sqrt(), state.evaluations
        variance = state.spread if kind == "refreshed" else trace_variance(state.swept)
        self.variance[row] = variance.clamp(min=0)


def solve(
    y: Tensor,
    ends: tuple[float, float],
    conditioning: Conditioning,
    trace: Trace,
    *,
    tolerance: float = 1e-3,
    pair: str = "bosh3",
    data_std: float = 0.25,
    first_step: float = 0.25,
    max_evaluations: int = 10_000,
) -> Procedure[Flow]:
    """From y (n, ...) at gamma = ends[0] up to ends[1], with the log volume of the map.

    Every row has its own steps and leaves when it has arrived. A step is accepted where its error by the embedded pair
    is at most `tolerance`, both in y (root mean square over pixels, in units of s) and in log p (nats a dimension).

    pair: key of PAIRS. data_std: sigma_data of the state's scale; a little below the data's own takes fewest steps.
    first_step: the first step tried, in log s.

    Raises:
        ValueError: no finite number from the network, or `max_evaluations` used up by an image.
    """
    solver = choose(PAIRS, pair, "solver")
    path = _Path(trace, data_std, ends, conditioning)
    target = ends[1] / 2
    tau = torch.full((len(y),), ends[0] / 2, dtype=torch.float64, device=y.device)
    w = y.double() / shaped(path.norm(tau), y.double())
    slope = yield from path.slope(tau, w)
    start = path.x_hat(tau, w, slope.w)
    zeros = torch.zeros_like(tau)
    state = _State(
        row=torch.arange(len(y), device=y.device),
        tau=tau,
        h=torch.full_like(tau, min(first_step, target - ends[0] / 2)),
        w=w,
        slope_w=slope.w,
        slope_trace=slope.trace,
        slope_diagonals=slope.diagonals,
        integral=zeros,
        swept=torch.zeros_like(slope.diagonals),
        spread=zeros,
        error=zeros,
        evaluations=torch.ones_like(tau, dtype=torch.int64),
    )
    arrivals = _Arrivals(state)
    while len(state.row):
        after, rms, error_log_p = yield from _attempt(path, solver, state)
        after.evaluations = state.evaluations = state.evaluations + len(solver.nodes)
        _check(state, rms + error_log_p, max_evaluations, tolerance)
        badness = torch.maximum(rms, error_log_p.abs() / y[0].numel()) / tolerance
        accepted = badness <= 1
        # by exp and log: the bits of torch.pow depend on the place in the tensor
        factor = (0.9 * torch.exp(torch.log(badness.clamp(min=1e-10)) / -solver.order)).clamp(0.2, 5)
        state = after.where(accepted, state)
        state.h = torch.minimum(state.h * factor, target - state.tau)
        arrived = target - state.tau < 1e-12
        if bool(arrived.any()):
            done, rest = arrived.nonzero()[:, 0], (~arrived).nonzero()[:, 0]
            arrivals.write(state.at(done), trace.kind)
            state = state.at(rest)
            path.keep(rest)
    norm_start, norm_end = (math.sqrt(math.exp(gamma) + data_std**2) for gamma in ends)
    log_volume = y[0].numel() * math.log(norm_end / norm_start) - arrivals.integral
    y_end = arrivals.w * norm_end
    return Flow(y_end, start, log_volume, arrivals.variance, arrivals.evaluations, arrivals.error)
