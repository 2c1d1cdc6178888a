"""Likelihood estimators: the negative log-likelihood of 8-bit images, in nats an image, with parts and standard errors.

Each is a generator of queries; it is told nothing of the network but the answers. The variational bounds are in
bounds.py, the solver of the ODE in ode.py, pixels and decoders in decoders.py. All sums are float64.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pipeline.choose import choose
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Denoiser, Process
from pipeline.diffusion.guidance import CLIP, clipped
from pipeline.diffusion.likelihood import ode as flow
from pipeline.diffusion.likelihood.bounds import FEW_STEPS, REPEATS, ddim_bound, upper_log_variance, vlb, vlb_discrete
from pipeline.diffusion.likelihood.continuous import Continuous
from pipeline.diffusion.likelihood.decoders import DECODERS, DecoderTask, Grid, softmax_level
from pipeline.diffusion.likelihood.estimate import (
    Likelihood,
    Variance,
    check_input,
    log_mean_variance,
    mean_and_variance,
    repeat_rows,
    sum_parts,
)
from pipeline.diffusion.options import options_of, with_defaults
from pipeline.diffusion.pixels import PixelGrid
from pipeline.diffusion.procedure import Procedure
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.rows import row_sum
from pipeline.diffusion.schedule import evenly

__all__ = ["ESTIMATORS", "Estimator", "Likelihood", "PixelGrid", "ddim_bound", "ode", "vlb", "vlb_discrete"]

EXACT_TRACE_LIMIT = 1024  # dimensions; the exact trace costs one vector-Jacobian product each


TRACES = ("refreshed", "fixed", "exact")


def _trace(x: Tensor, noise: Noise, samples: int, probes: int, kind: str) -> flow.Trace:
    """For `samples` solves an image."""
    if kind not in TRACES:
        raise ValueError(f"likelihood ode: trace must be one of {', '.join(TRACES)}, got '{kind}'")
    dimensions = x[0].numel()
    if kind == "exact" and dimensions > EXACT_TRACE_LIMIT:
        raise ValueError(
            f"likelihood ode: the exact trace takes one vector-Jacobian product a dimension; the images have "
            f"{dimensions}, the limit is {EXACT_TRACE_LIMIT}: use trace 'refreshed'"
        )
    return flow.Trace(kind, probes, [generator for generator in noise.generators for _ in range(samples)])


# --- dequantisation: a point y_0 near x, and its density ------------------------------------------------------------


def _lift_gaussian(x: Tensor, samples: int, noise: Noise, process: Process, pixels: PixelGrid) -> tuple[Tensor, Tensor]:
    """y_0 ~ q(y_0 | x) (n samples, ...) and log q(y_0 | x)."""
    eps = noise.normal_(torch.empty(len(x), samples, *x.shape[1:], dtype=torch.float64, device=x.device))
    s = math.exp(process.gamma_min / 2)
    y = (x[:, None] + s * eps).flatten(0, 1)
    return y, -0.5 * row_sum(eps.flatten(0, 1) ** 2 + math.log(2 * math.pi * s**2))


def _lift_uniform(x: Tensor, samples: int, noise: Noise, process: Process, pixels: PixelGrid) -> tuple[Tensor, Tensor]:
    """Uniform in each pixel's bin, of density 1 / bin."""
    place = noise.uniform_(torch.empty(len(x), samples, *x.shape[1:], dtype=torch.float64, device=x.device))
    y = (x[:, None] + pixels.bin * (place - 0.5)).flatten(0, 1)
    return y, torch.full((len(y),), -x[0].numel() * pixels.log_volume, dtype=torch.float64, device=x.device)


DEQUANTISATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "gaussian": _lift_gaussian,
    "uniform": _lift_uniform,
}


def _spread(gradient: Tensor, n: int, linear: float, quadratic: float) -> Tensor:
    """(n,) variance of the mean over an image's draws of log p, from its gradients there (n samples, ...).

    Of a log p that is a line or a parabola in the draw it is linear |E g|^2 + quadratic (E|g|^2 - |E g|^2); of a
    rougher one it is at most that for a Gaussian (its Hermite expansion). |E g|^2 is estimated by the products of
    different draws; with one draw it is taken to be E|g|^2.
    """
    gradients = gradient.reshape(n, -1, gradient[0].numel())  # not a view: images may lie in channels_last
    samples = gradients.shape[1]
    power = row_sum(gradients**2) / samples
    mean = power
    if samples > 1:
        products = row_sum(gradients.sum(1) ** 2) - row_sum(gradients**2)
        mean = torch.minimum((products / (samples * (samples - 1))).clamp(min=0), power)
    return (linear * mean + quadratic * (power - mean)) / samples


def _dequantisation_variance(
    nats: Tensor, y: Tensor, x_hat: Tensor, index: Tensor, gamma: float, names: tuple[str, str], pixels: PixelGrid
) -> Variance:
    """Of the mean over draws (n, samples), of which y, x_hat and index have the rows."""
    n, samples = nats.shape
    dequantisation, decoder = names
    s = math.exp(gamma / 2)
    if dequantisation == "uniform":
        return Variance.known(_spread((x_hat - y) / s**2, n, pixels.bin**2 / 12, pixels.bin**2 / 60))
    if decoder == "softmax":
        return Variance.known(_spread((x_hat - softmax_level(y, s, index, pixels)[1]) / s, n, 1, 0.5))
    if samples == 1:
        return Variance.known(torch.full_like(nats[:, 0], math.nan))
    return mean_and_variance(nats)[1]


def _density(
    x: Tensor, process: Process, conditioning: Conditioning, trace: flow.Trace, options: dict[str, Any]
) -> Procedure[Likelihood]:
    """-log p of the points themselves (n, ...) at gamma_min: nothing is drawn but probes."""
    end = yield from flow.solve(x, (process.gamma_min, process.gamma_max), conditioning, trace, **options)
    v = process.prior_variance
    parts = {"prior": 0.5 * row_sum(end.y**2 / v + math.log(2 * math.pi * v)), "volume": -end.log_volume}
    spread = Variance.known(end.probe_variance)
    return Likelihood(
        sum_parts(parts),
        parts,
        {"probes": spread.value.sqrt()},
        end.evaluations,
        x[0].numel(),
        solver_error=end.error,
        freedom=spread.freedom,
    )


def ode(
    x: Tensor,
    process: Process,
    noise: Noise,
    conditioning: Conditioning,
    *,
    pixels: Grid,
    probes: int = 1,
    trace: str = "refreshed",
    dequantisation: str = "gaussian",
    samples: int = 1,
    importance: bool = False,
    decoder: str = "softmax",
    tolerance: float = 1e-3,
    solver: str = "bosh3",
    data_std: float = 0.25,
    max_evaluations: int = 10_000,
) -> Procedure[Likelihood]:
    """The likelihood of the probability-flow ODE by the change of variables (Song et al. 2021, section 4.3).

    The ODE gives a density at gamma_min; `dequantisation` says how that scores grey levels u:
        'gaussian': log P(u) >= E_{y_0 ~ q(y_0 | x)}[ log p(y_0) + log p(u | y_0) - log q(y_0 | x) ], with `decoder`;
            the one to use for a network that has learnt the pixel lattice;
        'uniform': log P(u) >= E[ log p(x + bin (U - 1/2)) ] + D log bin.
    With pixels CONTINUOUS x are latents: their density at gamma_min, without dequantisation or decoder; data_std about
    0.9 suits normalised ones. Parts: 'prior', 'volume'; standard error: 'probes'.
    Parts: 'prior', 'volume', 'dequantisation', with 'gaussian' 'reconstruction', with `importance` 'importance'.
    Standard errors: 'dequantisation' (of one Gaussian draw at most that; nan for one draw and decoder 'gaussian') and
    'probes' (of one fixed probe at most that), both from gradients and products that the solve has anyway.

    samples: draws of y_0, each a solve. importance: log of the mean weight instead of the mean log, a tighter bound
    (Burda et al. 2016). probes: vector-Jacobian products an evaluation. trace: 'refreshed', 'fixed' or 'exact', see
    `pipeline.diffusion.likelihood.ode.Trace`; 'refreshed' has a several times smaller standard error than 'fixed' for
    equal work.
    tolerance, solver ('bosh3', 'dopri5'), data_std, max_evaluations: see `pipeline.diffusion.likelihood.ode.solve`.

    Raises:
        ValueError: pixels off the grid, a count below 1, several samples of latents, the exact trace in too many
            dimensions, no finite number from the network, `max_evaluations` used up.
    """
    check_input(x, noise, probes=probes, samples=samples, max_evaluations=max_evaluations)
    if not 0 < tolerance < 1:
        raise ValueError(f"likelihood ode: tolerance must be between 0 and 1, got {tolerance:g}")
    if not 0 < data_std < math.inf:
        raise ValueError(f"likelihood ode: data_std must be positive, got {data_std:g}")
    lift = choose(DEQUANTISATIONS, dequantisation, "dequantisation")
    decode = choose(DECODERS, decoder, "decoder")
    index, x, n, dimensions = pixels.index(x), x.double(), len(x), x[0].numel()
    rows, tracing = repeat_rows(n, samples, x), _trace(x, noise, samples, probes, trace)
    solving: dict[str, Any] = {
        "tolerance": tolerance,
        "pair": solver,
        "data_std": data_std,
        "max_evaluations": max_evaluations,
    }
    if isinstance(pixels, Continuous):
        if samples > 1 or importance:
            raise ValueError("likelihood ode: latents are not dequantised: leave samples at 1 and importance off")
        return (yield from _density(x, process, conditioning, tracing, solving))
    y, log_q = lift(x, samples, noise, process, pixels)
    ends = (process.gamma_min, process.gamma_max)
    end = yield from flow.solve(y, ends, conditioning[rows], tracing, **solving)
    v = process.prior_variance
    parts = {
        "prior": 0.5 * row_sum(end.y**2 / v + math.log(2 * math.pi * v)),
        "volume": -end.log_volume,
        "dequantisation": log_q,
    }
    evaluations = end.evaluations
    if dequantisation == "gaussian":
        log_beta = upper_log_variance(process, process.gamma_min)
        task = DecoderTask(y, process.gamma_min, index[rows], conditioning[rows], pixels, (log_beta, log_beta), "beta")
        parts["reconstruction"] = -(yield from decode(task))
        evaluations = evaluations + int(decoder != "softmax")
    nats = sum_parts(parts).view(n, samples)
    weights = torch.softmax(-nats, 1) if importance else torch.full_like(nats, 1 / samples)
    means = {name: row_sum(value.view(n, samples)) / samples for name, value in parts.items()}
    names = dequantisation, decoder
    variance = _dequantisation_variance(nats, y, end.x_hat, index[rows], process.gamma_min, names, pixels)
    if importance:
        means["importance"] = math.log(samples) - torch.logsumexp(-nats, 1) - sum_parts(means)
        if samples > 1:
            variance = log_mean_variance(-nats)
    spread = Variance.known(row_sum(weights**2 * end.probe_variance.view(n, samples)))
    return Likelihood(
        sum_parts(means),
        means,
        {"dequantisation": variance.value.sqrt(), "probes": spread.value.sqrt()},
        row_sum(evaluations.view(n, samples)),
        dimensions,
        solver_error=row_sum(weights * end.error.view(n, samples)),
        freedom=(variance + spread).freedom,
    )


# --- the table --------------------------------------------------------------------------------------------------------

SOLVE = 128  # evaluations of a solve at a tolerance of 1e-3; 104 measured
ORDERS = {"bosh3": 3, "dopri5": 5}  # evaluations grow as tolerance^(-1/order)
PRODUCT_COST = 2  # a vector-Jacobian product in units of a network evaluation


def _as_given(options: Mapping[str, Any], model: Denoiser) -> Mapping[str, Any]:
    return options


@dataclass(frozen=True)
class Estimator:
    """A procedure and all that callers go by: a new estimator is a procedure and its line in ESTIMATORS.

    title: in reports. price: (dimensions, options, all of them) -> expected network evaluations an image.
    needs: (options given, model) -> them completed by what the model says of itself; ValueError where it refuses them.
    clips: x_hat may be clipped: the value is then that of the model that samples so.
    of_latents: options where x are latents and the caller says nothing.
    """

    procedure: Callable[..., Procedure[Likelihood]]
    title: str
    price: Callable[[int, Mapping[str, Any]], float]
    needs: Callable[[Mapping[str, Any], Denoiser], Mapping[str, Any]] = _as_given
    clips: bool = False
    of_latents: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @cached_property
    def options(self) -> Mapping[str, inspect.Parameter]:
        """What a user may set."""
        return options_of(self.procedure) | ({"clip": CLIP} if self.clips else {})

    def evaluations(self, dimensions: int, options: Mapping[str, Any]) -> int:
        """Expected network evaluations of an image of so many values."""
        return max(1, math.ceil(self.price(dimensions, with_defaults(self.options, options))))

    def start(
        self, x: Tensor, process: Process, noise: Noise, conditioning: Conditioning, *, pixels: Grid, **options: Any
    ) -> Procedure[Likelihood]:
        """The procedure for images x (n, ...) in model space, or latents with pixels CONTINUOUS.

        Raises:
            ValueError: unknown option, clipped latents; while it runs, what the procedure itself refuses.
        """
        for name in options:
            if name not in self.options:
                raise ValueError(f"likelihood: there is no option '{name}', only {', '.join(self.options)}")
        clip = options.pop("clip", None)
        if clip is not None and isinstance(pixels, Continuous):
            raise ValueError("likelihood: clip is a habit of pixels, latents have no range: leave it out")
        return clipped(self.procedure(x, process, noise, conditioning, pixels=pixels, **options), clip)


def _decoding(options: Mapping[str, Any]) -> int:
    return 0 if options["decoder"] == "softmax" else int(options["decoder_draws"])


def _price_of_levels(dimensions: int, options: Mapping[str, Any]) -> float:
    return options["levels"] + _decoding(options)


def _price_of_steps(dimensions: int, options: Mapping[str, Any]) -> float:
    """Every step is asked once, the few of a short bound REPEATS times; or `terms` of them."""
    if options.get("spacing") == "t":
        steps = options["steps"] * (REPEATS if options["steps"] < FEW_STEPS else 1)
    else:
        steps = (options["steps"] if options["gammas"] is None else len(options["gammas"])) - 1
    return (steps if options["terms"] is None else options["terms"]) + _decoding(options)


def _price_of_a_solve(dimensions: int, options: Mapping[str, Any]) -> float:
    products = dimensions if options["trace"] == "exact" else max(1, options["probes"])
    finer = max(1.0, (1e-3 / options["tolerance"]) ** (1 / ORDERS.get(options["solver"], 3)))
    return math.ceil(SOLVE * finer) * (1 + PRODUCT_COST * products) * max(1, options["samples"])


def _of_table(options: Mapping[str, Any], model: Denoiser) -> Mapping[str, Any]:
    """A bound over steps is that of the model's own table, where its law has one: all of it, or `steps` of its levels
    evenly by index (`gammas` names any others), with the learned variance where there is one, and the Gaussian decoder
    that a table was trained with. A law without a table has `steps` levels uniform in gamma.
    """
    table = model.schedule.table
    if table is None:
        return options
    own: dict[str, Any] = {"decoder": "gaussian"}
    if options.get("gammas") is None and options.get("spacing") != "t":
        steps = options.get("steps", len(table))
        if not (isinstance(steps, int) and 3 <= steps <= len(table)):
            raise ValueError(f"likelihood: steps must be an integer in 3..{len(table)}, the table's, got {steps}")
        own["gammas"] = evenly(table, steps)
    return own | {name: value for name, value in options.items() if value is not None}


def _of_table_and_variance(options: Mapping[str, Any], model: Denoiser) -> Mapping[str, Any]:
    learned = {"variance": "learned"} if model.schedule.table is not None and model.learned_variance else {}
    return learned | dict(_of_table(options, model))


# bounds of a sampler's steps end, on latents, in its last move; the solver's own scale there is that of normalised ones
ESTIMATORS: dict[str, Estimator] = {
    "vlb": Estimator(vlb, "variational bound", _price_of_levels, clips=True),
    "vlb_discrete": Estimator(
        vlb_discrete, "bound over T steps", _price_of_steps, _of_table_and_variance, True, {"decoder": "gaussian"}
    ),
    "ddim_bound": Estimator(
        ddim_bound, "DDIM's bound over T steps", _price_of_steps, _of_table, True, {"decoder": "gaussian"}
    ),
    "ode": Estimator(ode, "probability-flow ODE", _price_of_a_solve, of_latents={"data_std": 0.9}),
}
