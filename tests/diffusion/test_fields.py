"""8-bit fields: their probabilities against integration, their denoiser against enumeration and the bound."""

import math

import numpy as np
import pytest
import torch
from scipy.special import ndtr
from torch import Tensor

from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Process
from pipeline.diffusion.likelihood.estimators import vlb
from pipeline.diffusion.oracles.exact import full_mixture, gaussian
from pipeline.diffusion.oracles.fields import FIELDS, QuantisedField, mat, matern, mix
from pipeline.diffusion.procedure import drive
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.scaling import prior_variance

F64 = torch.float64
NONE = Conditioning()


def pair(deviation: float, correlation: float) -> QuantisedField:
    """Two pixels around 100."""
    covariance = deviation**2 * torch.tensor([[[1.0, correlation], [correlation, 1.0]]], dtype=F64)
    return QuantisedField(full_mixture(torch.ones(1), torch.full((1, 2), 100.3), covariance), 1, 2)


def lattice(low: int, high: int) -> Tensor:
    """All images of two grey levels."""
    line = torch.arange(low, high, dtype=F64)
    return torch.cartesian_prod(line, line).view(-1, 1, 1, 2)


def box_masses(deviation: float, correlation: float, images: Tensor) -> Tensor:
    """(n,) mass of `pair`'s density where both pixels round to these: Gauss-Legendre over one, then the normal law."""
    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(24))
    first, second = images.flatten(1)[:, :1] - 100.3, images.flatten(1)[:, 1:] - 100.3
    point = first + 0.5 * nodes
    inner = deviation * math.sqrt(1 - correlation**2)
    upper, lower = ((second + half - correlation * point) / inner for half in (0.5, -0.5))
    density = torch.exp(-0.5 * (point / deviation) ** 2) / (deviation * math.sqrt(2 * math.pi))
    return (0.5 * weights * density * torch.from_numpy(ndtr(upper.numpy()) - ndtr(lower.numpy()))).sum(1)


# --- probabilities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("deviation", "correlation"), [(2.6, 0.6), (5.0, 0.85)])
def test_probability_is_the_mass_of_each_bin(deviation: float, correlation: float) -> None:
    """Conditional deviations above 2: within 1e-5 bits/dim of the integral over each image's box on average.

    Image by image within 1e-4 in the mean; without the I/12 both are off by far more.
    """
    field, images = pair(deviation, correlation), lattice(70, 131)
    assert deviation * math.sqrt(1 - correlation**2) > 2
    mass = box_masses(deviation, correlation, images)
    assert float(mass.sum()) == pytest.approx(1, abs=1e-6)
    likely = mass > 1e-6
    exact, mass = -torch.log2(mass[likely]) / 2, mass[likely]
    error = field.bits_per_dim(images[likely]) - exact
    assert abs(float((mass * error).sum())) < 1e-5
    assert float((mass * error.abs()).sum()) < 1e-4
    without = -field.continuous.log_density(images[likely]) / (2 * math.log(2)) - exact
    assert abs(float((mass * without).sum())) > 10 * abs(float((mass * error).sum()))
    assert float((mass * without.abs()).sum()) > 10 * float((mass * error.abs()).sum())


def test_probabilities_sum_to_one() -> None:
    assert float(torch.exp(pair(4.0, 0.7).log_prob(lattice(60, 141))).sum()) == pytest.approx(1, abs=1e-9)


def test_the_published_truths() -> None:
    """mat: 5.1980 bits/dim, as independent pixels 6.700; mix: 4.5440, its moment-matched Gaussian 4.672."""
    entropy = mat().lattice.entropy() / (64 * math.log(2))
    assert entropy == pytest.approx(5.1980, abs=5e-5)
    assert 0.5 * math.log2(2 * math.pi * math.e * (25**2 + 3**2)) == pytest.approx(6.701, abs=1e-3)
    field = mix()
    bits = field.bits_per_dim(field.sample(20_000, torch.Generator().manual_seed(0)))
    assert abs(float(bits.mean()) - 4.5440) < 5 * float(bits.std()) / math.sqrt(20_000)
    mixture = field.lattice
    assert mixture.axes is not None
    inner = (mixture.axes * mixture.spectra[:, None, :] @ mixture.axes.mT).mean(0)
    matched = inner + (mixture.means - 128).T @ (mixture.means - 128) / 4
    moment = 0.5 * float(torch.logdet(2 * math.pi * math.e * matched)) / (64 * math.log(2))
    assert moment == pytest.approx(4.672, abs=5e-4)


@pytest.mark.parametrize("name", FIELDS)
def test_samples_are_8_bit_images_and_their_bits_are_the_entropy(name: str) -> None:
    field = FIELDS[name]()
    levels = field.sample(4000, torch.Generator().manual_seed(1))
    assert levels.dtype == torch.uint8
    assert levels.shape == (4000, 1, 8, 8)
    assert int(levels.min()) > 0  # means lie so far inside that nothing is clamped
    assert int(levels.max()) < 255
    x = field.images(levels)
    assert torch.equal(field.pixels.index(x), levels.long())
    assert torch.equal(levels, field.sample(4000, torch.Generator().manual_seed(1)))


def test_matern_correlation() -> None:
    correlation = matern(3, 4, 2.0, (1.6, 0.8))
    assert torch.allclose(correlation.diagonal(), torch.ones(12, dtype=F64))
    assert torch.allclose(correlation, correlation.T)
    r = math.sqrt(3) / 3.2  # one row down
    assert float(correlation[0, 4]) == pytest.approx((1 + r) * math.exp(-r))
    r = math.sqrt(3) * math.hypot(1 / 3.2, 2 / 1.6)
    assert float(correlation[0, 6]) == pytest.approx((1 + r) * math.exp(-r))


# --- the denoiser -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grey_noise", [0.1, 0.25, 0.4, 0.6, 0.9, 1.2, 1.3, 2.0, 6.0])
def test_denoiser_is_the_mean_over_all_images(grey_noise: float) -> None:
    """Against enumeration of the lattice, two correlated pixels, to a thousandth of a grey level."""
    field = pair(4.0, 0.8)
    generator = torch.Generator().manual_seed(2)
    s = grey_noise * field.pixels.bin
    x = field.images(field.sample(200, generator))
    y = x + s * torch.randn(x.shape, generator=generator, dtype=F64)
    gamma = torch.full((200,), 2 * math.log(s), dtype=F64)
    every = lattice(70, 131)
    points = field.images(every).flatten(1)
    log_joint = field.log_prob(every) - 0.5 * ((y.flatten(1)[:, None] - points) / s).square().sum(-1)
    exact = torch.softmax(log_joint, 1) @ points
    error = (field.denoise(y, gamma).flatten(1) - exact).abs().max() / field.pixels.bin
    assert float(error) < (1e-8 if grey_noise > 1.25 else 1e-3)


def test_without_correlation_the_denoiser_is_exact() -> None:
    field = QuantisedField(gaussian([100.3, 90.0], [9.0, 16.0]), 1, 2)
    y = field.images(torch.tensor([[[[100.4, 91.2]]], [[[98.7, 90.5]]]]))
    every = torch.cartesian_prod(torch.arange(60, 141, dtype=F64), torch.arange(50, 131, dtype=F64))
    for grey_noise in (0.15, 0.5, 1.0, 3.0):
        s = grey_noise * field.pixels.bin
        points = field.images(every)
        log_joint = field.log_prob(every) - 0.5 * ((y.flatten(1)[:, None] - points) / s).square().sum(-1)
        got = field.denoise(y, torch.full((2,), 2 * math.log(s), dtype=F64)).flatten(1)
        assert torch.allclose(got, torch.softmax(log_joint, 1) @ points, atol=1e-10)


def test_denoiser_takes_rows_of_different_levels_and_their_gradient() -> None:
    field = mix()
    gamma = torch.tensor([-13.0, -9.0, -4.0, 3.0], dtype=F64)
    y = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3), dtype=F64, requires_grad=True)
    together = field.denoise(y, gamma)
    for row in range(4):
        alone = field.denoise(y[row : row + 1], gamma[row : row + 1])
        assert torch.allclose(together[row : row + 1], alone, rtol=1e-10, atol=1e-12)
    point = y[1:3].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda point: field.denoise(point, gamma[1:3]), point)


def bound_gap(name: str, images: int, seed: int) -> tuple[float, float]:
    """Mean and standard error of bound minus exact bits/dim, paired by image, by the exact denoiser."""
    field = FIELDS[name]()
    process = Process("vp", -13.3, 5.0, prior_variance("vp", 5.0))
    levels = field.sample(images, torch.Generator().manual_seed(seed))
    gaps: list[Tensor] = []
    for first in range(0, images, 64):
        part = levels[first : first + 64]
        noise = Noise(range(first, first + len(part)))
        got = drive(vlb(field.images(part), process, noise, NONE, pixels=field.pixels, levels=64), field)
        gaps.append(got.bits_per_dim - field.bits_per_dim(part))
    gap = torch.cat(gaps)
    return float(gap.mean()), float(gap.std()) / math.sqrt(images)


@pytest.mark.parametrize("name", FIELDS)
def test_the_bound_by_the_exact_denoiser_is_the_truth(name: str) -> None:
    gap, error = bound_gap(name, 192, 5)
    assert abs(gap) < 3 * error
    assert error < 0.012


@pytest.mark.slow
@pytest.mark.parametrize("name", FIELDS)
def test_the_bound_is_the_truth_to_three_thousandths_of_a_bit(name: str) -> None:
    gap, error = bound_gap(name, 5000, 6)
    assert abs(gap) < 3 * error
    assert error < 0.003
