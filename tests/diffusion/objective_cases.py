"""Networks whose losses are known in closed form."""

import torch
from torch import Tensor, nn

from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.parameterization import Parameterization
from pipeline.diffusion.randomness import StepKey
from pipeline.diffusion.rows import shaped
from pipeline.diffusion.schedule import LinearGamma, Schedule

NONE = Conditioning()


class GaussianNetwork(nn.Module):
    """x_hat = c^2 / (c^2 + s^2) y: exact for data N(0, c^2), told gamma by level log_sigma, in any prediction type."""

    def __init__(self, parameterization: Parameterization, std: float, learned_variance: bool = False) -> None:
        super().__init__()
        self.parameterization = parameterization
        self.std = std
        self.learned_variance = learned_variance
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.head = nn.Parameter(torch.full((1,), 0.3, dtype=torch.float64))

    def forward(self, z: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        gamma = level.double() * 8
        alpha, sigma = (shaped(v, z.double()) for v in self.parameterization.alpha_sigma(gamma))
        a, b = (shaped(v, z.double()) for v in self.parameterization.row(gamma))
        y = z.double() / alpha
        s = sigma / alpha
        x_hat = self.scale * self.std**2 / (self.std**2 + s**2) * y
        output = a * x_hat + b * (y - x_hat) / s
        if not self.learned_variance:
            return output
        return torch.cat([output, self.head * torch.tanh(z.double())], dim=1)


def gaussian_denoiser(
    std: float,
    schedule: Schedule | None = None,
    prediction: str = "eps",
    scaling: str = "vp",
    learned_variance: bool = False,
) -> Denoiser:
    parameterization = Parameterization(prediction, scaling)
    network = GaussianNetwork(parameterization, std, learned_variance)
    return Denoiser(
        network,
        schedule or LinearGamma(-9.0, 5.0),
        parameterization,
        level="log_sigma",
        learned_variance=learned_variance,
    )


def eps_error(gamma: Tensor, model_std: float, square: float) -> Tensor:
    """E over eps of the mean square of eps_hat - eps, for images of mean square `square` and a `GaussianNetwork`."""
    s2 = torch.exp(gamma)
    k = model_std**2 / (model_std**2 + s2)
    return (1 - k) ** 2 * square / s2 + k**2


def on_grid(images: int, std: float, seed: int = 0, size: int = 8) -> Tensor:
    """8-bit Gaussian noise images (n, 1, size, size) in [-1, 1]."""
    draws = torch.randn(images, 1, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    grey = (draws * std * 128 + 127.5).round().clamp(0, 255)
    return (2 * (grey + 0.5) / 256 - 1).float()


def key(step: int = 0, shard: int = 0, shards: int = 1, seed: int = 0) -> StepKey:
    return StepKey(seed, step, shard, shards)
