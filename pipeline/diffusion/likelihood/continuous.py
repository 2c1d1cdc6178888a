"""Real numbers in place of 8-bit pixels: latents, whose likelihood is a density (its -log, nats, may be negative).

A grid of pixels has a last link from y_0 = z + s_0 eps to a probability; here the link is a Gaussian density. Either
N(z; y_0, s_0^2 I), whose expectation is a constant (Vahdat et al. 2021, 2106.05931, eq. 7), or N(z; x_hat(y_0), beta),
the last move of an ancestral sampler.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOG_TAU = math.log(2 * math.pi)


@dataclass(frozen=True)
class Continuous:
    """Stands where a likelihood takes a `PixelGrid`: there are no grey levels, the values count as they are."""

    def index(self, x: Tensor) -> Tensor:
        """The values, float64.

        Raises:
            ValueError: one is not finite.
        """
        finite = torch.isfinite(x)
        if not bool(finite.all()):
            row = int((~finite).flatten(1).any(1).nonzero()[0, 0])
            raise ValueError(
                f"latent {row} of the batch has a value that is not finite: the codec that made it is broken"
            )
        return x.double()


CONTINUOUS = Continuous()


def gaussian_entropy(dimensions: int, log_variance: float) -> float:
    """Nats of N(0, exp(log_variance) I): also E[-log N(z; y_0, s^2 I)] over y_0 = z + s eps, a constant."""
    return 0.5 * dimensions * (LOG_TAU + 1 + log_variance)


def log_normal_density(mean: Tensor, std: float | Tensor, value: Tensor) -> Tensor:
    """log N(value; mean, std^2), elementwise."""
    scale = torch.as_tensor(std, dtype=mean.dtype, device=mean.device)
    return -0.5 * (((value - mean) / scale) ** 2 + LOG_TAU) - torch.log(scale)


def log_logistic_density(mean: Tensor, scale: float | Tensor, value: Tensor) -> Tensor:
    """log of the logistic density, elementwise; its standard deviation is pi / sqrt(3) scale."""
    scale = torch.as_tensor(scale, dtype=mean.dtype, device=mean.device)
    place = (value - mean) / scale
    return torch.nn.functional.logsigmoid(place) + torch.nn.functional.logsigmoid(-place) - torch.log(scale)
