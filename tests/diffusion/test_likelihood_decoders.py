"""Pixels, and the probabilities of grey levels given a point."""

import math

import pytest
import torch

from pipeline.diffusion.likelihood.decoders import (
    expected_softmax,
    log_bin_probability,
    mix_log_variance,
    softmax_level,
)
from pipeline.diffusion.pixels import PixelGrid
from pipeline.diffusion.rows import row_sum
from tests.diffusion.likelihood_cases import PIXELS, UniformLevels, estimate, grey_images, process, small_denoiser

LEVELS = torch.arange(256)


def test_pixel_grid_is_that_of_eight_bits() -> None:
    x = 2 * (LEVELS.double() + 0.5) / 256 - 1
    assert torch.equal(PIXELS.index(x[None].float())[0], LEVELS)
    assert math.exp(PIXELS.log_volume) == pytest.approx(2 / 256)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 3 / 256 + 1e-4, math.nan])
def test_pixels_off_the_grid_are_refused(value: float) -> None:
    x = grey_images(3, 2)
    x[1, 0, 1, 0] = value
    for name in ("vlb", "ode"):
        with pytest.raises(ValueError, match=r"image 1 of the batch has the value .* not one of the 256"):
            estimate(name, small_denoiser(), x)


@pytest.mark.parametrize("s", [1e-3, 4e-3, 0.02, 0.3, 5.0])
def test_softmax_is_a_distribution(s: float) -> None:
    y = torch.linspace(-1.3, 1.3, 41, dtype=torch.float64)[:, None].expand(-1, 256)
    log_p, mean = softmax_level(y, s, LEVELS, PIXELS)
    values = PIXELS.first + PIXELS.bin * LEVELS.double()
    direct = torch.log_softmax(-0.5 * ((y - values) / s) ** 2, 1)
    torch.testing.assert_close(torch.logsumexp(log_p, 1), torch.zeros(41, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(log_p, direct, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mean[:, 0], direct.exp() @ values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("s", [1e-4, 1.3e-3, 4e-3, 0.1])
def test_expected_softmax_is_the_mean(s: float) -> None:
    index = torch.tensor([[0, 255, 17], [128, 3, 254]])
    eps = torch.linspace(-10, 10, 2001, dtype=torch.float64)
    weight = torch.exp(-(eps**2) / 2) / math.sqrt(2 * math.pi) * 1e-2
    flat = index.flatten()[:, None]
    log_p, _ = softmax_level(PIXELS.first + PIXELS.bin * flat.double() + s * eps, s, flat, PIXELS)
    expected = -(log_p * weight).sum(1).view(2, 3).sum(1)
    torch.testing.assert_close(expected_softmax(s, index, PIXELS), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("std", [1e-3, 0.01, 0.5, 20.0])
@pytest.mark.parametrize("mean", [-1.5, -0.997, 0.1, 0.9999])
def test_bins_sum_to_one(std: float, mean: float) -> None:
    log_p = log_bin_probability(torch.full((256,), mean, dtype=torch.float64), std, LEVELS, PIXELS)
    assert bool(torch.isfinite(log_p).all())
    assert float(torch.logsumexp(log_p, 0)) == pytest.approx(0, abs=1e-12)


def test_bins_are_those_of_the_exact_distribution_function() -> None:
    mean, std = torch.tensor(0.05, dtype=torch.float64), 0.02
    normal = torch.distributions.Normal(mean, std)
    centre = PIXELS.first + PIXELS.bin * LEVELS.double()
    upper = normal.cdf(centre + PIXELS.bin / 2).index_fill(0, torch.tensor([255]), 1.0)
    lower = normal.cdf(centre - PIXELS.bin / 2).index_fill(0, torch.tensor([0]), 0.0)
    got = log_bin_probability(mean.expand(256), std, LEVELS, PIXELS).exp()
    torch.testing.assert_close(got, upper - lower, rtol=1e-9, atol=1e-15)
    # far in both tails the logarithm stays exact where the difference of two CDFs is lost: density times width
    far = torch.tensor([20, 230])
    narrow = log_bin_probability(mean.expand(2), 0.03, far, PIXELS)
    edge = (centre[far] - mean).abs() - PIXELS.bin / 2
    leading = -0.5 * (edge / 0.03) ** 2 - torch.log(edge / 0.03 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(narrow, leading, rtol=2e-3, atol=0)


def test_learned_variance_interpolates_logarithms() -> None:
    low, high = torch.tensor([-4.0], dtype=torch.float64), torch.tensor([-2.0], dtype=torch.float64)
    for head, expected in ((-1.0, -4.0), (0.0, -3.0), (1.0, -2.0), (2.0, -1.0)):
        assert float(mix_log_variance("learned", low, high, torch.tensor([head]))) == pytest.approx(expected)
    with pytest.raises(ValueError, match="needs a network with a variance head"):
        mix_log_variance("learned", low, high, None)


@pytest.mark.parametrize("dimensions", [1, 2, 3, 64, 77, 40_000])
def test_row_sums_have_the_same_bits_in_any_batch(dimensions: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(9, dimensions, dtype=torch.float64, generator=generator)
    whole = row_sum(values)
    torch.testing.assert_close(whole, values.sum(1), rtol=1e-12, atol=1e-10)
    assert torch.equal(whole, torch.cat([row_sum(values[i : i + 1]) for i in range(9)]))
    assert torch.equal(whole[:5], row_sum(values[:5]))


def test_a_grid_of_other_depth() -> None:
    pixels = PixelGrid(levels=16, first=-15 / 16, bin=1 / 8)
    x = (pixels.first + pixels.bin * torch.arange(16.0)).view(4, 1, 2, 2)
    result = estimate("vlb", UniformLevels(pixels), x, facts=process(-8.0), pixels=pixels, levels=4)
    assert bool(torch.isfinite(result.nats).all())
    with pytest.raises(ValueError, match="levels >= 2"):
        PixelGrid(levels=1)
