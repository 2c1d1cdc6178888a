"""What the likelihood tests share."""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Denoiser, Prediction, Process
from pipeline.diffusion.likelihood.estimate import Likelihood
from pipeline.diffusion.likelihood.estimators import ESTIMATORS, PixelGrid
from pipeline.diffusion.oracles.exact import GaussianMixture, full_mixture
from pipeline.diffusion.parameterization import Parameterization
from pipeline.diffusion.procedure import Answerer, drive
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.rows import shaped
from pipeline.diffusion.scaling import prior_variance
from pipeline.diffusion.schedule import LinearGamma

PIXELS = PixelGrid()
NONE = Conditioning()


def process(gamma_min: float = -13.3, gamma_max: float = 5.0, scaling: str = "vp") -> Process:
    return Process(scaling, gamma_min, gamma_max, prior_variance(scaling, gamma_max))


def estimate(
    name: str,
    denoiser: Answerer,
    x: Tensor,
    *,
    facts: Process | None = None,
    seeds: Sequence[int] | None = None,
    noise: Noise | None = None,
    conditioning: Conditioning = NONE,
    pixels: PixelGrid = PIXELS,
    chunk: int | None = None,
    **options: Any,
) -> Likelihood:
    noise = noise or Noise(range(len(x)) if seeds is None else seeds)
    procedure = ESTIMATORS[name].start(x, facts or process(), noise, conditioning, pixels=pixels, **options)
    return drive(procedure, denoiser, chunk=chunk)


class QuadratureNoise(Noise):
    """In place of chance: row i always draws eps[i], and every place is the middle of its part."""

    def __init__(self, eps: Tensor) -> None:
        super().__init__(range(len(eps)))
        self.eps = eps

    def normal_(self, out: Tensor) -> Tensor:
        """out (n, levels, ...) or (n, ...)."""
        missing = out.ndim - self.eps.ndim
        return out.copy_(self.eps.view(len(self.eps), *[1] * missing, *self.eps.shape[1:]).expand_as(out))

    def uniform_(self, out: Tensor) -> Tensor:
        return out.fill_(0.5)


def normal_nodes(dimensions: int, reach: float = 6.0, step: float = 0.6) -> tuple[Tensor, Tensor]:
    """Points (N, dimensions) and weights (N,) that integrate smooth functions against N(0, I): the trapezoid rule."""
    line = torch.arange(-reach, reach + step / 2, step, dtype=torch.float64)
    weight = torch.exp(-(line**2) / 2) / math.sqrt(2 * math.pi) * step
    points = torch.cartesian_prod(*[line] * dimensions).view(-1, dimensions)
    weights = torch.stack([torch.prod(w) for w in torch.cartesian_prod(*[weight] * dimensions).view(-1, dimensions)])
    return points, weights


def atoms(probabilities: Tensor, pixels: PixelGrid, dimensions: int) -> GaussianMixture:
    """The distribution on the pixel grid itself, as point masses; its denoiser is exact."""
    values = pixels.first + pixels.bin * torch.arange(pixels.levels, dtype=torch.float64)
    points = torch.cartesian_prod(*[values] * dimensions).view(-1, dimensions)
    return GaussianMixture(probabilities, points, torch.zeros_like(points))


class UniformLevels:
    """The exact denoiser of images whose pixels are uniform over all levels, each on its own."""

    def __init__(self, pixels: PixelGrid = PIXELS) -> None:
        self.values = pixels.first + pixels.bin * torch.arange(pixels.levels, dtype=torch.float64)

    def __call__(self, y: Tensor, gamma: Tensor, conditioning: Conditioning, shared: object = None) -> Prediction:
        distance = (y[..., None] - self.values) / shaped(torch.exp(gamma / 2), y)[..., None]
        return Prediction((torch.softmax(-0.5 * distance**2, -1) * self.values).sum(-1))


def field_covariance(side: int, std: float, length: float, nugget: float) -> Tensor:
    """Exponential in the distance, in model space: a smooth field whose Jacobians are far from diagonal."""
    points = torch.tensor(list(product(range(side), repeat=2)), dtype=torch.float64)
    distance = (points[:, None] - points[None]).norm(dim=-1)
    return std**2 * torch.exp(-distance / length) + nugget**2 * torch.eye(len(points), dtype=torch.float64)


def gaussian_field(side: int, mean: float = 0.05) -> GaussianMixture:
    covariance = field_covariance(side, 0.2, 4.0, 0.02)
    return full_mixture(torch.ones(1), torch.full((1, side * side), mean), covariance[None])


def grey_images(count: int, side: int, channels: int = 1, seed: int = 0) -> Tensor:
    """Uniform grey levels in model space, float32 (count, channels, side, side)."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (count, channels, side, side), generator=generator)
    return (PIXELS.first + PIXELS.bin * levels.double()).float()


class SmallNetwork(nn.Module):
    """Convolutions told of label and level. Checks that every row comes with its own."""

    def __init__(self, channels: int = 1, outputs: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Conv2d(channels, 16, 3, padding=1)
        self.second = nn.Conv2d(16, channels * outputs, 3, padding=1)
        self.label = nn.Embedding(11, 16)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
            parameter.requires_grad_(False)
        self.outputs = outputs
        self.rows: list[int] = []

    def forward(self, z: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.label is not None
        assert len(z) == len(level) == len(conditioning.label)
        self.rows.append(len(z))
        told = self.label(conditioning.label + 1) * (1 + level[:, None])
        out = self.second(torch.tanh(self.first(z) + told[:, :, None, None]))
        return out + 0.5 * z.repeat(1, self.outputs, 1, 1)


def small_denoiser(channels: int = 1, *, learned_variance: bool = False) -> Denoiser:
    network = SmallNetwork(channels, 2 if learned_variance else 1)
    law = LinearGamma(-13.3, 5.0)
    return Denoiser(network, law, Parameterization("v", "vp"), learned_variance=learned_variance)
