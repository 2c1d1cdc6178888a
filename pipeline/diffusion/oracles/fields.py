"""8-bit images of known probability: Gaussian random fields on a small grid, rounded to grey levels.

A draw of N(mu, K), in grey levels, rounded to integers v has log P(v) = log N(v; mu, K + I/12): where each pixel's
standard deviation given the others exceeds 2, within 1e-5 bits/dim on average and 1e-4 for a typical image (1/12 is
the variance of a rounding error; without it the probability is off by up to 0.015 bits/dim). A likelihood can be held
against the truth, image by image.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Prediction, Shared
from pipeline.diffusion.oracles.exact import GaussianMixture, full_mixture
from pipeline.diffusion.pixels import PixelGrid

LATTICE_LIMIT = 1.25  # grey levels of noise above which the lattice moves E[v | y] by less than 1e-10
REACH = 9  # grey levels summed over on either side; further ones weigh less than exp(-26) below the limit
SWEEPS = 4  # of the mean field; each reduces its error by the ratio of a pixel's noise to its conditional variance


@dataclass(frozen=True, eq=False)
class QuantisedField:
    """A Gaussian mixture over h x w pixels, in grey levels, rounded to integers within 0..255.

    Levels beyond 0..255 are clamped, so means must lie several standard deviations inside for `log_prob` to hold.
    """

    continuous: GaussianMixture
    height: int
    width: int
    pixels: PixelGrid = field(default_factory=PixelGrid)

    @property
    def lattice(self) -> GaussianMixture:
        """The density, in grey levels, that is P at integers."""
        return replace(self.continuous, spectra=self.continuous.spectra + 1 / 12)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """uint8 (count, 1, h, w)."""
        levels = self.continuous.sample(count, generator).round().clamp(0, self.pixels.levels - 1)
        return levels.to(torch.uint8).view(count, 1, self.height, self.width)

    def images(self, levels: Tensor) -> Tensor:
        """Grey levels as clean images x in model space, float64, same shape."""
        return self.pixels.first + self.pixels.bin * levels.double()

    def log_prob(self, levels: Tensor) -> Tensor:
        """(n,) nats: log P of each image of grey levels (n, 1, h, w)."""
        return self.lattice.log_density(levels.double())

    def bits_per_dim(self, levels: Tensor) -> Tensor:
        """(n,): -log2 P of each image over its number of pixels."""
        return -self.log_prob(levels) / (self.height * self.width * math.log(2))

    def denoise(self, y: Tensor, gamma: Tensor) -> Tensor:
        """E[x | y] in model space for images on the integer lattice, shaped like y, in its dtype; near exact.

        Given its component an image is N(mu, K + I/12) at integers. With noise of deviation s, in grey levels, the
        posterior of a pixel given the others is a Gaussian of precision P_ii + 1/s^2 at integers, P the inverse of
        K + I/12. The others enter through P_ij by their means (a mean field): small beside 1/s^2 wherever the lattice
        can be told from a continuum.
        """
        mixture = self.lattice
        grey = ((y - self.pixels.first) / self.pixels.bin).flatten(1).double()
        noise = gamma.double() - 2 * math.log(self.pixels.bin)  # log variance, grey levels
        share = torch.softmax(mixture.log_joint(grey, noise), 1)
        mean = _component_means(mixture, grey, noise)
        fine = noise < 2 * math.log(LATTICE_LIMIT)
        if bool(fine.any()):
            mean = mean.index_put((fine,), _on_lattice(mixture, mean[fine], noise[fine]))
        v_hat = torch.einsum("nk,nkd->nd", share, mean)
        return (self.pixels.first + self.pixels.bin * v_hat).view_as(y).to(y.dtype)

    def __call__(self, y: Tensor, gamma: Tensor, conditioning: Conditioning, shared: Shared = None) -> Prediction:
        return Prediction(self.denoise(y, gamma))


def _rotated(mixture: GaussianMixture, values: Tensor, *, back: bool = False) -> Tensor:
    """(n, k, d) along each component's axes, or back."""
    if mixture.axes is None:
        return values
    return torch.einsum("nkj,kij->nki" if back else "nki,kij->nkj", values, mixture.axes)


def _component_means(mixture: GaussianMixture, grey: Tensor, noise: Tensor) -> Tensor:
    """(n, k, d): E[v | y, component] of the continuous mixture."""
    u = _rotated(mixture, grey.unsqueeze(1) - mixture.means)
    gain = mixture.spectra / (mixture.spectra + torch.exp(noise)[:, None, None])
    return mixture.means + _rotated(mixture, u * gain, back=True)


def _on_lattice(mixture: GaussianMixture, mean: Tensor, noise: Tensor) -> Tensor:
    """(n, k, d): E[v | y, component] at integers from that of the continuum, by the mean field."""
    if mixture.axes is None:
        diagonal = 1 / mixture.spectra
    else:
        diagonal = torch.einsum("kij,kj->ki", mixture.axes**2, 1 / mixture.spectra)
    precision = diagonal + torch.exp(-noise)[:, None, None]
    expected = mean
    for _ in range(SWEEPS if mixture.axes is not None else 1):
        moved = expected - mean
        pull = _rotated(mixture, _rotated(mixture, moved) / mixture.spectra, back=True) - diagonal * moved
        expected = _integer_mean(mean - pull / precision, precision)
    return expected


def _integer_mean(centre: Tensor, precision: Tensor) -> Tensor:
    """The mean of N(centre, 1 / precision) at integers, elementwise."""
    offset = torch.arange(-REACH, REACH + 1, dtype=centre.dtype)
    nearest = centre.detach().round()
    distance = (nearest - centre)[..., None] + offset
    weight = torch.softmax(-0.5 * precision[..., None] * distance**2, -1)
    return nearest + (weight * offset).sum(-1)


def matern(height: int, width: int, length: float, stretch: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Matern-3/2 correlation (h w, h w): (1 + r) exp(-r), r = sqrt(3) distance / length, the length stretched by axis.

    stretch: of the length down the rows and along the columns.
    """
    index = torch.arange(height * width)
    place = torch.stack([index // width, index % width], 1).double()
    scale = length * torch.tensor(stretch, dtype=torch.float64)
    r = math.sqrt(3) * ((place[:, None] - place) / scale).square().sum(-1).sqrt()
    return (1 + r) * torch.exp(-r)


def mat() -> QuantisedField:
    """8 x 8: mean 128, deviation 25, Matern-3/2 of length 3, nugget of deviation 3. Truth 5.1980 bits/dim."""
    covariance = 25**2 * matern(8, 8, 3.0) + 3**2 * torch.eye(64, dtype=torch.float64)
    mean = torch.full((1, 64), 128.0, dtype=torch.float64)
    return QuantisedField(full_mixture(torch.ones(1), mean, covariance[None]), 8, 8)


def mix() -> QuantisedField:
    """8 x 8, four components: means 128 +- 40 cos(pi i / 8) along rows or columns, deviation 16, nugget 2.5.

    Matern-3/2 of length 3, stretched 1.6 along each one's axis and 0.8 across it. Truth 4.544 bits/dim.
    """
    wave = 40 * torch.cos(math.pi * torch.arange(8, dtype=torch.float64) / 8)
    down, along = wave[:, None].expand(8, 8).reshape(-1), wave.expand(8, 8).reshape(-1)
    means = 128 + torch.stack([down, -down, along, -along])
    nugget = 2.5**2 * torch.eye(64, dtype=torch.float64)
    vertical = 16**2 * matern(8, 8, 3.0, (1.6, 0.8)) + nugget
    horizontal = 16**2 * matern(8, 8, 3.0, (0.8, 1.6)) + nugget
    covariances = torch.stack([vertical, vertical, horizontal, horizontal])
    return QuantisedField(full_mixture(torch.full((4,), 0.25), means, covariances), 8, 8)


FIELDS: dict[str, Callable[[], QuantisedField]] = {"mat": mat, "mix": mix}
