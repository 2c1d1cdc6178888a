"""log p(x | z) of an autoencoder: the grey levels under a binned Gaussian or logistic; scales fitted to images."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.choose import choose
from pipeline.diffusion.likelihood.continuous import Continuous, log_logistic_density, log_normal_density
from pipeline.diffusion.likelihood.decoders import Grid, log_bin_probability
from pipeline.diffusion.pixels import PixelGrid

SCALES = torch.linspace(math.log(1 / 512), math.log(1.0), 97, dtype=torch.float64)  # log scales that a fit looks at


def log_logistic_bin_probability(mean: Tensor, scale: float | Tensor, index: Tensor, pixels: PixelGrid) -> Tensor:
    """log of the logistic's mass in each pixel's bin, elementwise (Salimans et al. 2017, 1701.05517, eq. 2).

    The end bins reach to infinity. Exact in both tails, since the difference of two sigmoids is
    sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - e^(l - u)).
    """
    centre = pixels.first + pixels.bin * index.to(mean.dtype) - mean
    upper = torch.where(index == pixels.levels - 1, math.inf, (centre + pixels.bin / 2) / scale)
    lower = torch.where(index == 0, -math.inf, (centre - pixels.bin / 2) / scale)
    inside = (index > 0) & (index < pixels.levels - 1)
    width = torch.as_tensor(pixels.bin / scale, dtype=mean.dtype, device=mean.device)
    share = torch.where(inside, torch.log(-torch.expm1(-width)), 0.0)
    return F.logsigmoid(upper) + F.logsigmoid(-lower) + share


def _gaussian(mean: Tensor, scale: Tensor, value: Tensor, grid: Grid) -> Tensor:
    if isinstance(grid, Continuous):
        return log_normal_density(mean, scale, value)
    return log_bin_probability(mean, scale, value, grid)


def _logistic(mean: Tensor, scale: Tensor, value: Tensor, grid: Grid) -> Tensor:
    if isinstance(grid, Continuous):
        return log_logistic_density(mean, scale, value)
    return log_logistic_bin_probability(mean, scale, value, grid)


# (mean, scale, grey levels or values, grid) -> log p, elementwise
PIXEL_LIKELIHOODS: dict[str, Callable[[Tensor, Tensor, Tensor, Grid], Tensor]] = {
    "gaussian": _gaussian,
    "logistic": _logistic,
}


def pixel_log_likelihood(family: str, mean: Tensor, log_scale: Tensor, value: Tensor, grid: Grid) -> Tensor:
    """log p(x | z), elementwise, float64; differentiable.

    Args:
        family: key of `PIXEL_LIKELIHOODS`.
        mean: what the decoder says, model space. log_scale: broadcastable; of a Gaussian its log standard deviation.
        value: `grid.index(x)`.

    Raises:
        ValueError: unknown family.
    """
    scale = torch.exp(log_scale.double()).expand_as(mean)
    return choose(PIXEL_LIKELIHOODS, family, "pixel likelihood")(mean.double(), scale, value, grid)


def fit_log_scales(family: str, batches: Iterable[tuple[Tensor, Tensor]], grid: Grid) -> Tensor:
    """The log scale of each colour channel, float64 (channels,), under which the images are most likely: one pass.

    batches: (decoded mean (n, channels, ...), `grid.index` of the images), the mean from posterior draws, as in the
    likelihood that the scale is for. The likelihood is looked at on a grid of scales from 1/512 to 1, then a parabola.

    Raises:
        ValueError: no batches, or the best scale lies at an end: the codec does not decode these images.
    """
    total: Tensor | None = None
    for mean, value in batches:
        sums = [
            pixel_log_likelihood(family, mean, log_scale, value, grid).transpose(0, 1).flatten(1).sum(1)
            for log_scale in SCALES.to(mean.device)
        ]
        part = torch.stack(sums)
        total = part if total is None else total + part
    if total is None:
        raise ValueError("fitting a pixel scale: no images were given")
    best = total.argmax(0)
    at_end = (best == 0) | (best == len(SCALES) - 1)
    if bool(at_end.any()):
        raise ValueError(
            f"fitting a pixel scale: the best of channel {int(at_end.nonzero()[0, 0])} lies outside 1/512..1 of model "
            f"space: the decoded images and the given ones do not belong together"
        )
    below, at, above = (total.gather(0, (best + step)[None])[0] for step in (-1, 0, 1))
    spacing = float(SCALES[1] - SCALES[0])
    return SCALES.to(best.device)[best] + 0.5 * spacing * (below - above) / (below - 2 * at + above)
