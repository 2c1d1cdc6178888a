"""The last link of a likelihood: from the least noisy y_0 = x + s_0 eps to the probability of an 8-bit image.

A decoder is a generator (it may ask the network) that returns log p(u | y_0) of the image's grey levels u.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from pipeline.choose import choose
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.likelihood.continuous import Continuous, log_normal_density
from pipeline.diffusion.pixels import PixelGrid
from pipeline.diffusion.procedure import Procedure, Query
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.rows import row_sum

Grid = PixelGrid | Continuous  # what the values of an image are: grey levels, or real numbers


def softmax_level(y: Tensor, s: float, index: Tensor, pixels: PixelGrid) -> tuple[Tensor, Tensor]:
    """Elementwise log p(u | y) and the mean of the levels under it.

    p is a softmax over all levels v of -((y - v) / s)^2 / 2 (Kingma et al. 2021, section 3.2).
    """
    nearest = ((y - pixels.first) / pixels.bin).round().clamp(0, pixels.levels - 1)
    reach = min(pixels.levels - 1, math.ceil(9 * s / pixels.bin) + 1)  # levels further off weigh less than e^-40
    level = nearest[..., None] + torch.arange(-reach, reach + 1, dtype=y.dtype, device=y.device)
    value = pixels.first + pixels.bin * level
    logits = -0.5 * ((y[..., None] - value) / s) ** 2
    logits = logits.masked_fill((level < 0) | (level >= pixels.levels), -math.inf)
    own = -0.5 * ((y - (pixels.first + pixels.bin * index.to(y.dtype))) / s) ** 2
    total = torch.logsumexp(logits, -1)
    return own - total, (torch.exp(logits - total[..., None]) * value).sum(-1)


def decoded_pixels(y: Tensor, s: float, pixels: PixelGrid, noise: Noise | None) -> Tensor:
    """Images of grey levels in model space, shaped like y (n, ...), in its dtype: drawn from the softmax decoder
    p(u | y) at y = x + s eps, or its mode, the nearest level, without `noise`.
    """
    z, last = (y.double() - pixels.first) / pixels.bin, pixels.levels - 1
    nearest = z.round().clamp(0, last)
    if noise is None:
        return (pixels.first + pixels.bin * nearest).to(y.dtype)
    reach = min(last, math.ceil(9 * s / pixels.bin) + 1)

    def weight(level: Tensor) -> Tensor:
        """In proportion to p, 1 at the nearest level."""
        value = torch.exp(0.5 * (pixels.bin / s) ** 2 * ((z - nearest) ** 2 - (z - level) ** 2))
        return value.masked_fill_((level < 0) | (level > last), 0)

    offsets = range(-reach, reach + 1)
    total = sum((weight(nearest + offset) for offset in offsets), torch.zeros_like(z))
    left = noise.uniform_(torch.empty_like(z)).mul_(total)  # the first level at which the sum exceeds it
    level = nearest - reach
    for offset in offsets[:-1]:
        left -= weight(nearest + offset)
        level += left >= 0
    return (pixels.first + pixels.bin * level.clamp_(0, last)).to(y.dtype)


def _log_cdf(value: Tensor) -> Tensor:
    """log of the standard normal distribution function, exact in the lower tail."""
    return cast(Tensor, torch.special.log_ndtr(value))  # pyright: ignore[reportUnknownMemberType]


def log_bin_probability(mean: Tensor, std: float | Tensor, index: Tensor, pixels: PixelGrid) -> Tensor:
    """log of the mass of N(mean, std^2) in each pixel's bin, elementwise, by the exact CDF (Ho et al. 2020, eq. 13).

    The end bins reach to infinity.
    """
    centre = pixels.first + pixels.bin * index.to(mean.dtype) - mean
    upper = torch.where(index == pixels.levels - 1, math.inf, (centre + pixels.bin / 2) / std)
    lower = torch.where(index == 0, -math.inf, (centre - pixels.bin / 2) / std)
    # in the upper tail both CDFs are 1 to rounding: take the mirror image there
    mirrored = lower > 0
    upper, lower = torch.where(mirrored, -lower, upper), torch.where(mirrored, -upper, lower)
    log_upper, log_lower = _log_cdf(upper), _log_cdf(lower)
    return log_upper + torch.log(-torch.expm1(log_lower - log_upper))


@lru_cache(maxsize=8)
def _expected_softmax(pixels: PixelGrid, s: float) -> Tensor:
    """float64 (levels,): E[-log p(u | x_u + s eps)] by the trapezoid rule, the integrand being smooth and vanishing."""
    eps = torch.linspace(-9, 9, 361, dtype=torch.float64)
    weight = torch.exp(-0.5 * eps**2) / math.sqrt(2 * math.pi) * (eps[1] - eps[0])
    values: list[Tensor] = []
    for start in range(0, pixels.levels, 32):  # a bounded part at a time
        index = torch.arange(start, min(start + 32, pixels.levels))
        y = pixels.first + pixels.bin * index[:, None].double() + s * eps
        log_p, _ = softmax_level(y, s, index[:, None].expand_as(y), pixels)
        values.append(-(log_p * weight).sum(1))
    return torch.cat(values)


def expected_softmax(s: float, index: Tensor, pixels: PixelGrid) -> Tensor:
    """(n,) nats: E over y_0 = x + s eps of -log p(u | y_0), the softmax decoder's term, without sampling."""
    return row_sum(_expected_softmax(pixels, s).to(index.device)[index])


# --- variances of a step -----------------------------------------------------------------------------------------


def _learned(low: Tensor, high: Tensor, head: Tensor | None) -> Tensor:
    if head is None:
        raise ValueError("variance 'learned' needs a network with a variance head; use 'beta' or 'posterior'")
    return torch.lerp(low, high, (head.double() + 1) / 2)


@dataclass(frozen=True)
class StepVariance:
    """log variance from log beta-tilde, log beta and the network's head v in about [-1, 1]: of a step, and of the last.

    The last move is the decoder's; its own beta-tilde is 0, and that of the step before stands for it.
    """

    step: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    last: Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _low(low: Tensor, high: Tensor, head: Tensor | None) -> Tensor:
    return low


def _high(low: Tensor, high: Tensor, head: Tensor | None) -> Tensor:
    return high


# 'beta' is DDPM's fixed-large, whose decoder has the small variance (Ho et al. 2020, the authors' code);
# 'learned' is eq. 15 of Nichol & Dhariwal 2021
VARIANCES: dict[str, StepVariance] = {
    "posterior": StepVariance(_low, _low),
    "beta": StepVariance(_high, _low),
    "beta_throughout": StepVariance(_high, _high),
    "learned": StepVariance(_learned, _learned),
}


def mix_log_variance(variance: str, low: Tensor, high: Tensor, head: Tensor | None, *, last: bool = False) -> Tensor:
    """The model's log variance of a step, or of the last one, by name."""
    rule = choose(VARIANCES, variance, "variance")
    return (rule.last if last else rule.step)(low, high, head)


# --- decoders ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecoderTask:
    """What a decoder is asked: log p(index | y) where y (n, ...) is at `gamma`.

    log_variances: log beta-tilde and log beta of the last move, in model space, for the Gaussian decoder.
    """

    y: Tensor
    gamma: float
    index: Tensor
    conditioning: Conditioning
    pixels: Grid
    log_variances: tuple[float, float]
    variance: str


def softmax_decoder(task: DecoderTask) -> Procedure[Tensor]:
    """VDM's decoder: asks nothing of the network."""
    yield from ()
    if isinstance(task.pixels, Continuous):  # its limit of infinitely fine levels
        return row_sum(log_normal_density(task.y, math.exp(task.gamma / 2), task.index))
    return row_sum(softmax_level(task.y, math.exp(task.gamma / 2), task.index, task.pixels)[0])


def gaussian_decoder(task: DecoderTask) -> Procedure[Tensor]:
    """DDPM's decoder: N(x_hat(y), variance), integrated over each bin where there are bins."""
    level = torch.full((len(task.y),), task.gamma, dtype=torch.float64, device=task.y.device)
    answer = yield Query(task.y, level, task.conditioning)
    low, high = (torch.full_like(task.y, value) for value in task.log_variances)
    std = torch.exp(mix_log_variance(task.variance, low, high, answer.variance, last=True) / 2)
    if isinstance(task.pixels, Continuous):
        return row_sum(log_normal_density(answer.x_hat.double(), std, task.index))
    return row_sum(log_bin_probability(answer.x_hat.double(), std, task.index, task.pixels))


DECODERS: dict[str, Callable[[DecoderTask], Procedure[Tensor]]] = {
    "softmax": softmax_decoder,
    "gaussian": gaussian_decoder,
}
