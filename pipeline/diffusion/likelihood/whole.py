"""The likelihood of an autoencoder and a diffusion prior together: one procedure around another.

    -log P(x | c) <= R + C - H
    R = E_q[-log p(x | z)],  C = E_q[-log p(z | c)] by any estimator,  H = 1/2 sum_i log(2 pi e s_i^2)

with q(z | x) = N(m(x), diag s(x)^2) (Kingma & Welling 2014; Vahdat et al. 2021, eq. 3). All three have the same rounded
posterior, R and C the same draws of z. What the codec is asked is a query as any other: "encode" is answered by m as
x_hat and log s^2 as variance, "decode" by the mean of p(x | z) as x_hat and its log scale as variance.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.choose import choose
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Prediction, Process, Shared
from pipeline.diffusion.likelihood.continuous import CONTINUOUS, LOG_TAU
from pipeline.diffusion.likelihood.decoders import Grid
from pipeline.diffusion.likelihood.estimate import Likelihood, check_input, repeat_rows, sum_parts
from pipeline.diffusion.likelihood.estimators import ESTIMATORS
from pipeline.diffusion.likelihood.reconstruction import pixel_log_likelihood
from pipeline.diffusion.procedure import Answerer, Procedure, Query
from pipeline.diffusion.randomness import Noise, key_seed
from pipeline.diffusion.rows import row_sum

ENCODE, DECODE = "encode", "decode"


@dataclass(frozen=True)
class Whole:
    """What does not change from image to image.

    process: of the prior. family: of p(x | z), key of PIXEL_LIKELIHOODS. grid: of the images' values.
    estimator: of C, key of ESTIMATORS; options: its own. draws: of z, each with its own noise in C.
    rounding: the dtype that latents are stored in, to which mean and log variance are rounded; None: as they come.
    """

    process: Process
    grid: Grid
    family: str = "gaussian"
    estimator: str = "vlb"
    draws: int = 4
    rounding: torch.dtype | None = torch.float16
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        choose(ESTIMATORS, self.estimator, "estimator")
        if self.draws < 2:
            raise ValueError(
                f"likelihood: draws of z must be at least 2, got {self.draws}: one gives no standard error"
            )

    def cost(self, z: Tensor, noise: Noise, conditioning: Conditioning) -> Procedure[Likelihood]:
        """-log p(z | c), (m,) nats of latents (m, ...), by the estimator."""
        estimator = ESTIMATORS[self.estimator]
        options = {**estimator.of_latents, **self.options}
        return estimator.start(z, self.process, noise, conditioning, pixels=CONTINUOUS, **options)


def codec_answerers(
    posterior: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    reconstruction: Callable[[Tensor], tuple[Tensor, Tensor | None]],
) -> dict[str, Answerer]:
    """A codec's two functions as what its queries are put to.

    posterior: pixels (n, ...) in model space -> (mean, log variance) of normalised z, None from a deterministic one.
    reconstruction: z -> (mean, log scale) of the pixels, log scale broadcastable, or None.
    """

    def encode(y: Tensor, gamma: Tensor, conditioning: Conditioning, shared: Shared = None) -> Prediction:
        return Prediction(*posterior(y))

    def decode(y: Tensor, gamma: Tensor, conditioning: Conditioning, shared: Shared = None) -> Prediction:
        mean, log_scale = reconstruction(y)
        return Prediction(mean, None if log_scale is None else log_scale.expand_as(mean))

    return {ENCODE: encode, DECODE: decode}


def asked(network: str, y: Tensor) -> Query:
    """A codec's query; it has no level and is told nothing else."""
    return Query(y, torch.zeros(len(y), dtype=torch.float64, device=y.device), network=network)


def posterior_of(x: Tensor, rounding: torch.dtype | None) -> Procedure[tuple[Tensor, Tensor]]:
    """Rounded (mean, log variance) of q(z | x), float64, (n, ...).

    Raises:
        ValueError: a codec without a posterior, for which no likelihood exists, or one that is not finite.
    """
    answer = yield asked(ENCODE, x)
    if answer.variance is None:
        raise ValueError(
            "likelihood: this codec has no posterior variance (it is deterministic): the entropy of z is minus "
            "infinity, the bound infinite; take a codec with a Gaussian posterior"
        )
    mean, log_variance = answer.x_hat, answer.variance
    if rounding is not None:
        mean, log_variance = mean.to(rounding), log_variance.to(rounding)
    if not bool(torch.isfinite(mean).all() and torch.isfinite(log_variance).all()):
        raise ValueError(f"likelihood: the codec's posterior is not finite, or beyond {rounding}")
    return mean.double(), log_variance.double()


def posterior_entropy(log_variance: Tensor) -> Tensor:
    """(n,) nats: H of N(., diag exp(log_variance)), (n, ...), exactly."""
    return 0.5 * row_sum(log_variance + (LOG_TAU + 1))


def drawn(mean: Tensor, log_variance: Tensor, draws: int, noise: Noise) -> tuple[Tensor, Tensor]:
    """(z, eps), each (n draws, ...), the draws of an image one after the other."""
    rows = repeat_rows(len(mean), draws, mean)
    eps = draw_noise(noise, draws, "posterior").normal_like(mean[rows])
    return mean[rows] + torch.exp(log_variance[rows] / 2) * eps, eps


def draw_noise(noise: Noise, draws: int, purpose: str) -> Noise:
    """Noise for `draws` rows an image, each of its own key."""
    seeds = [key_seed(purpose, seed, draw) for seed in noise.seeds for draw in range(draws)]
    return Noise(seeds, noise.device)


def whole(
    x: Tensor, setting: Whole, noise: Noise, conditioning: Conditioning, *, control: bool = True
) -> Procedure[Likelihood]:
    """The bound on -log P(x | c) of images x (n, ...) in model space, in nats an image with parts that sum to it.

    Parts: 'decoder' (R), 'prior' and 'diffusion' (C: the estimator's part of that name, and the rest of it), 'entropy'
    (-H, exact). Standard errors: 'posterior' (the draws of z) and 'noise' (levels or probes of C), together that
    of the mean over the draws, which are independent, with draws - 1 degrees of freedom.

    control: R less 1/2 (|eps|^2 - d), of mean 0, eps being the draw of z = m + s eps: so log q(z | x) at the draw meets
    -log p(x, z) there, whose difference a good posterior makes constant. The same expectation.

    Raises:
        ValueError: pixels off the grid, a codec without posterior or pixel likelihood, what the estimator refuses.
    """
    check_input(x, noise)
    value = setting.grid.index(x)
    mean, log_variance = yield from posterior_of(x, setting.rounding)
    n, k = len(x), setting.draws
    rows = repeat_rows(n, k, x)
    z, eps = drawn(mean, log_variance, k, noise)
    decoder = yield from _reconstruction_cost(z, value[rows], setting)
    if control:
        decoder = decoder - 0.5 * row_sum(eps**2 - 1)
    cost = yield from setting.cost(z, draw_noise(noise, k, "prior"), conditioning[rows])
    prior = cost.parts["prior"]
    entropy = posterior_entropy(log_variance)
    total = (decoder + cost.nats).view(n, k)
    parts = {"decoder": decoder, "prior": prior, "diffusion": cost.nats - prior}
    means = {name: row_sum(part.view(n, k)) / k for name, part in parts.items()} | {"entropy": -entropy}
    errors = split_errors(total, cost.standard_error.view(n, k))
    freedom = torch.full_like(entropy, k - 1)
    evaluations = row_sum(cost.evaluations.view(n, k))
    return Likelihood(sum_parts(means), means, errors, evaluations, x[0].numel(), freedom=freedom)


def _reconstruction_cost(z: Tensor, value: Tensor, setting: Whole) -> Procedure[Tensor]:
    """(m,) nats: -log p(x | z)."""
    answer = yield asked(DECODE, z)
    if answer.variance is None:
        raise ValueError(
            "likelihood: this codec gives no likelihood of pixels: fit a scale on training images and store it with it"
        )
    return -row_sum(pixel_log_likelihood(setting.family, answer.x_hat, answer.variance, value, setting.grid))


def split_errors(totals: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Standard errors (n,) of the mean of independent totals (n, k), by source: their squares sum to its variance.

    The totals' own spread is the whole of it; noise (n, k), each total's standard error from its own levels or probes,
    says how much of that is not the draws'.
    """
    k = totals.shape[1]
    mean = row_sum(totals) / k
    variance = row_sum((totals - mean[:, None]) ** 2) / (k * (k - 1))
    own = torch.minimum(row_sum(noise**2) / k**2, variance)
    return {"posterior": (variance - own).clamp(min=0).sqrt(), "noise": own.sqrt()}


# --- what a condition tells of an image -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Information:
    """log p(x | c) - log p(x | none) of each condition, a difference of two bounds, nats (n, conditions), float64.

    standard_error: (n, conditions), of the difference; draws: how many pairs it is the mean of.
    """

    nats: Tensor
    standard_error: Tensor
    draws: int

    @property
    def bits(self) -> Tensor:
        return self.nats / math.log(2)

    def probabilities(self) -> Tensor:
        """(n, conditions): which of them it is, each being as likely beforehand. Its argmax is a classifier."""
        return torch.softmax(self.nats, dim=1)


Estimate = Callable[[Tensor, Noise, Conditioning], Procedure[Likelihood]]


def paired_information(
    draws: Sequence[Tensor], estimate: Estimate, conditions: Sequence[Conditioning], none: Conditioning, noise: Noise
) -> Procedure[Information]:
    """How many nats each condition explains of each image: the same z, levels and noise with and without it.

    draws: at least two of the latents (n, ...), as R and H do not depend on the condition and cancel; of a model of
    pixels the images themselves, as often as there are to be draws of the noise.
    estimate: (z, noise, conditioning) -> the estimator's procedure, `Whole.cost` on latents.
    conditions, none: of n rows each. The model must have been trained without its condition too.

    Raises:
        ValueError: fewer than two draws, or no conditions.
    """
    if len(draws) < 2 or not conditions:
        raise ValueError(
            f"paired information: at least 2 draws and 1 condition are needed, got {len(draws)} and {len(conditions)}"
        )
    rows: list[Tensor] = []
    for number, z in enumerate(draws):
        seeds = [key_seed("paired", seed, number) for seed in noise.seeds]
        without = yield from estimate(z, Noise(seeds, noise.device), none)
        told: list[Tensor] = []
        for condition in conditions:
            with_it = yield from estimate(z, Noise(seeds, noise.device), condition)
            told.append(without.nats - with_it.nats)
        rows.append(torch.stack(told, 1))
    differences = torch.stack(rows)  # (draws, n, conditions)
    k = len(rows)
    mean = differences.sum(0) / k
    variance = ((differences - mean) ** 2).sum(0) / (k * (k - 1))
    return Information(mean, variance.sqrt(), k)


def posterior_draws(x: Tensor, setting: Whole, noise: Noise) -> Procedure[list[Tensor]]:
    """`setting.draws` of z (n, ...), the same as `whole` has."""
    mean, log_variance = yield from posterior_of(x, setting.rounding)
    z, _ = drawn(mean, log_variance, setting.draws, noise)
    return [z[draw :: setting.draws] for draw in range(setting.draws)]
