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
from pipeline.diffusion.procedure import Procedure, Query


def row_sum(values: Tensor) -> Tensor:
    """(n, ...) -> (n,): the sum of each row, by pairwise folding.

    Elementwise additions alone, so that a row's bits do not depend on how many rows there are, on any device.
    """
    flat = values.flatten(1)
    while flat.shape[1] > 1:
        half = flat.shape[1] // 2
        odd = flat[:, 2 * half :]
        flat = flat[:, :half] + flat[:, half : 2 * half]
        if odd.shape[1]:
            flat = torch.cat([flat[:, :-1], flat[:, -1:] + odd], dim=1)
    return flat[:, 0] if flat.shape[1] else flat.sum(1)


@dataclass(frozen=True)
class PixelGrid:
    """Where the grey levels lie in model space: level u at first + bin u, u in 0..levels-1; a level's volume is bin."""

    levels: int = 256
    first: float = -255 / 256
    bin: float = 1 / 128

    def __post_init__(self) -> None:
        if self.levels < 2 or not self.bin > 0:
            raise ValueError(f"pixel grid: need levels >= 2 and bin > 0, got {self.levels} and {self.bin:g}")

    @property
    def log_volume(self) -> float:
        """log(bin): nats a dimension between a density in model space and the probability of a grey level."""
        return math.log(self.bin)

    def index(self, x: Tensor) -> Tensor:
        """int64, shaped like x: the grey level of each pixel.

        Raises:
            ValueError: a pixel lies off the grid by more than 1/1000 of a bin, or beyond its ends.
        """
        position = (x.double() - self.first) / self.bin
        index = position.round()
        bad = ~((position - index).abs() <= 1e-3) | (index < 0) | (index >= self.levels)
        if bool(bad.any()):
            last = self.first + self.bin * (self.levels - 1)
            image = int(bad.flatten(1).any(1).nonzero()[0, 0])
            last = self.first + self.bin * (self.levels - 1)
            raise ValueError(
                f"image {image} of the batch has the value {float(x[bad][0]):.6g}, which is not one of the "
                f"{self.levels} grey levels {self.first:.6g}, {self.first + self.bin:.6g}, ..., {last:.6g} of model "
                f"space: a likelihood is that of an 8-bit image; convert it with pipeline.data.images, add no noise"
            )
        return index.long()


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


# log variance from log beta-tilde, log beta and the network's head v in about [-1, 1] (Nichol & Dhariwal 2021, eq. 15)
VARIANCES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "posterior": lambda low, high, head: low,
    "beta": lambda low, high, head: high,
    "learned": _learned,
}


def mix_log_variance(variance: str, low: Tensor, high: Tensor, head: Tensor | None) -> Tensor:
    """The model's log variance of a step, by name."""
    return choose(VARIANCES, variance, "variance")(low, high, head)


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
    pixels: PixelGrid
    log_variances: tuple[float, float]
    variance: str


def softmax_decoder(task: DecoderTask) -> Procedure[Tensor]:
    """VDM's decoder: asks nothing of the network."""
    yield from ()
    return row_sum(softmax_level(task.y, math.exp(task.gamma / 2), task.index, task.pixels)[0])


def gaussian_decoder(task: DecoderTask) -> Procedure[Tensor]:
    """DDPM's decoder: N(x_hat(y), variance) integrated over each bin."""
    level = torch.full((len(task.y),), task.gamma, dtype=torch.float64, device=task.y.device)
    answer = yield Query(task.y, level, task.conditioning)
    low, high = (torch.full_like(task.y, value) for value in task.log_variances)
    std = torch.exp(mix_log_variance(task.variance, low, high, answer.variance) / 2)
    return row_sum(log_bin_probability(answer.x_hat.double(), std, task.index, task.pixels))


DECODERS: dict[str, Callable[[DecoderTask], Procedure[Tensor]]] = {
    "softmax": softmax_decoder,
    "gaussian": gaussian_decoder,
}
