"""Oracles against quadrature, automatic differentiation and each other."""

import math

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.oracles.exact import (
    EmpiricalMixture,
    GaussianMixture,
    diagonal_mixture,
    full_mixture,
    gaussian,
    oracle_denoiser,
)
from pipeline.diffusion.parameterization import Parameterization
from pipeline.diffusion.schedule import LinearGamma
from tests.diffusion.sampler_cases import correlated, mixture

F64 = torch.float64
NONE = Conditioning()
LEVELS = [-8.0, -3.0, 0.0, 2.0, 5.0]
LINE = diagonal_mixture([0.6, 0.4], [[-0.5], [0.4]], [[0.02], [0.09]])


def at(gamma: float, rows: int) -> Tensor:
    return torch.full((rows,), gamma, dtype=F64)


def tilted() -> GaussianMixture:
    """Full covariances in two dimensions."""
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(3, 2, 2, generator=generator, dtype=F64) * 0.4
    means = torch.randn(3, 2, generator=generator, dtype=F64) * 0.6
    return full_mixture(torch.tensor([0.2, 0.5, 0.3], dtype=F64), means, roots @ roots.mT + 0.01 * torch.eye(2))


ORACLES = {"line": LINE, "diagonal": mixture(), "full": tilted(), "gaussian": correlated()}


# --- Gaussian mixtures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [-math.inf, *LEVELS])
def test_marginals_integrate_to_one(gamma: float) -> None:
    reach = 2 + 9 * math.sqrt(0.1 + math.exp(gamma))
    y = torch.linspace(-reach, reach, 20001, dtype=F64)[:, None]
    density = torch.exp(LINE.log_density(y, at(gamma, len(y))))
    assert float(torch.trapezoid(density, y[:, 0])) == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("gamma", LEVELS)
def test_marginals_and_denoisers_are_convolutions_and_posterior_means(gamma: float) -> None:
    """By quadrature over x from the density of x alone: p(y) = integral p(x) N(y; x, s^2), E[x | y]."""
    s = math.exp(gamma / 2)
    y = torch.tensor([-2.0, -0.7, 0.0, 0.3, 1.5], dtype=F64)[:, None] * max(1.0, s)
    low, high = -3.0, 3.0
    x = torch.linspace(low, high, 200001, dtype=F64)
    kernel = torch.exp(-0.5 * ((y - x) / s) ** 2) / (s * math.sqrt(2 * math.pi))
    joint = torch.exp(LINE.log_density(x[:, None])) * kernel
    density = torch.trapezoid(joint, x)
    assert torch.allclose(torch.log(density), LINE.log_density(y, at(gamma, 5)), atol=1e-7)
    mean = torch.trapezoid(joint * x, x) / density
    assert torch.allclose(mean[:, None], LINE.denoise(y, at(gamma, 5)), atol=1e-7)


@pytest.mark.parametrize("gamma", LEVELS)
@pytest.mark.parametrize("name", ORACLES)
def test_score_is_the_gradient_and_tweedies_formula_holds(name: str, gamma: float) -> None:
    oracle = ORACLES[name]
    generator = torch.Generator().manual_seed(1)
    y = oracle.sample(6, generator) + math.exp(gamma / 2) * torch.randn(
        6, oracle.dimensions, generator=generator, dtype=F64
    )
    y.requires_grad_()
    (gradient,) = torch.autograd.grad(oracle.log_density(y, at(gamma, 6)).sum(), y)
    assert torch.allclose(oracle.score(y, at(gamma, 6)), gradient, rtol=1e-8, atol=1e-8)
    assert torch.allclose(oracle.denoise(y, at(gamma, 6)), y + math.exp(gamma) * gradient, rtol=1e-8, atol=1e-8)


def test_full_and_diagonal_agree_in_a_turned_frame() -> None:
    angle = torch.tensor(0.7, dtype=F64)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    plain = mixture()
    covariances = torch.stack([turn @ torch.diag(v) @ turn.T for v in plain.spectra])
    turned = full_mixture(plain.weights, plain.means @ turn.T, covariances)
    y, gamma = torch.randn(8, 2, dtype=F64, generator=torch.Generator().manual_seed(2)), at(-1.0, 8)
    assert torch.allclose(turned.log_density(y @ turn.T, gamma), plain.log_density(y, gamma), rtol=1e-10)
    assert torch.allclose(turned.denoise(y @ turn.T, gamma), plain.denoise(y, gamma) @ turn.T, rtol=1e-9)


@pytest.mark.parametrize("name", ORACLES)
def test_samples_have_the_mixtures_moments(name: str) -> None:
    oracle = ORACLES[name]
    x = oracle.sample(40_000, torch.Generator().manual_seed(3))
    mean = oracle.weights @ oracle.means
    axes = torch.eye(oracle.dimensions, dtype=F64) if oracle.axes is None else oracle.axes
    spread = axes * oracle.spectra[:, None, :] @ axes.mT + oracle.means[:, :, None] * oracle.means[:, None, :]
    covariance = torch.einsum("k,kij->ij", oracle.weights, spread) - mean[:, None] * mean
    deviation = covariance.diagonal().sqrt()
    assert bool(((x.mean(0) - mean).abs() < 5 * deviation / 200).all())
    assert bool(((x.T.cov() - covariance).abs() < 5 * 2 * deviation[:, None] * deviation / 200).all())


def test_flow_solves_the_probability_flow_and_carries_marginals() -> None:
    """dy/ds = (y - x_hat) / s by central differences; the change of volume is the change of density."""
    oracle = correlated()
    y = torch.tensor([[1.0, -2.0, 0.5], [8.0, 3.0, -6.0]], dtype=F64)
    g, h = 1.3, 1e-5
    s = math.exp(g / 2)
    ahead, behind = oracle.flow(y, g, 2 * math.log(s + h)), oracle.flow(y, g, 2 * math.log(s - h))
    assert torch.allclose((ahead - behind) / (2 * h), (y - oracle.denoise(y, at(g, 2))) / s, rtol=1e-7)
    there = oracle.flow(y, g, -4.0)
    assert torch.allclose(oracle.flow(there, -4.0, g), y, rtol=1e-12)
    assert torch.allclose(oracle.flow(oracle.flow(y, g, 0.2), 0.2, -4.0), there, rtol=1e-12)
    jacobian = torch.func.jacrev(lambda point: oracle.flow(point[None], g, -4.0)[0])(y[0])
    change = oracle.log_density(y, at(g, 2)) - oracle.log_density(there, at(-4.0, 2))
    assert float(torch.logdet(jacobian)) == pytest.approx(float(change[0]), rel=1e-9)
    with pytest.raises(ValueError, match="for one Gaussian, this mixture has 3"):
        mixture().flow(y[:, :2], g, -4.0)


@pytest.mark.parametrize("gamma", [-math.inf, -2.0, 3.0])
@pytest.mark.parametrize("name", ORACLES)
def test_entropy_is_the_mean_surprise(name: str, gamma: float) -> None:
    """Within 5 standard errors of a drawn mean."""
    oracle = ORACLES[name]
    generator = torch.Generator().manual_seed(4)
    y = oracle.sample(50_000, generator)
    y = y + math.exp(gamma / 2) * torch.randn(y.shape, generator=generator, dtype=F64)
    surprise = -oracle.log_density(y, at(gamma, len(y)))
    assert abs(float(surprise.mean()) - oracle.entropy(gamma)) < 5 * float(surprise.std()) / math.sqrt(len(y))


def test_entropy_of_separate_components_and_of_one_split_in_two() -> None:
    one = gaussian([0.3], [0.2])
    split = diagonal_mixture([0.25, 0.75], [[0.3], [0.3]], [[0.2], [0.2]])
    assert split.entropy() == pytest.approx(one.entropy(), abs=1e-9)
    apart = diagonal_mixture([0.25, 0.75], [[-50.0], [50.0]], [[0.2], [0.2]])
    mixing = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert apart.entropy() == pytest.approx(one.entropy() + mixing, abs=1e-9)
    with pytest.raises(ValueError, match="for 1 and 2 dimensions, this mixture has 3"):
        diagonal_mixture([0.5, 0.5], [[0.0] * 3] * 2, [[1.0] * 3] * 2).entropy()


def test_de_bruijn() -> None:
    """dh / d gamma = D / 2 - E|x - x_hat|^2 / (2 s^2), the identity the continuous bound rests on (1 dimension)."""
    g, step = -0.5, 1e-4
    numeric = (LINE.entropy(g + step) - LINE.entropy(g - step)) / (2 * step)
    y = torch.linspace(-8, 8, 40001, dtype=F64)[:, None]
    density = torch.exp(LINE.log_density(y, at(g, len(y))))
    fisher = float(torch.trapezoid(density * LINE.score(y, at(g, len(y)))[:, 0] ** 2, y[:, 0]))
    mmse = math.exp(g) - math.exp(2 * g) * fisher
    assert numeric == pytest.approx(0.5 - mmse / (2 * math.exp(g)), rel=1e-6)


def test_a_label_selects_its_component() -> None:
    oracle = mixture()
    y, gamma = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(5)), at(0.3, 4)
    labels = torch.tensor([2, 0, -1, 1])
    got = oracle(y, gamma, Conditioning(labels)).x_hat
    for row, label in enumerate(labels.tolist()):
        part = slice(None) if label < 0 else slice(label, label + 1)
        weights = oracle.weights[part] / oracle.weights[part].sum()
        alone = GaussianMixture(weights, oracle.means[part], oracle.spectra[part])
        assert torch.allclose(got[row], alone.denoise(y[row : row + 1], gamma[:1])[0], rtol=1e-12)


@pytest.mark.parametrize(
    ("weights", "means", "variances", "message"),
    [
        ([0.5, 0.4], [[0.0], [1.0]], [[1.0], [1.0]], "sum to 1"),
        ([1.5, -0.5], [[0.0], [1.0]], [[1.0], [1.0]], "above 0"),
        ([1.0], [[0.0], [1.0]], [[1.0], [1.0]], r"got \(1,\), \(2, 1\) and \(2, 1\)"),
        ([1.0], [[0.0]], [[-1.0]], "variances must be at least 0"),
    ],
)
def test_bad_mixtures_are_refused(
    weights: list[float], means: list[list[float]], variances: list[list[float]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        diagonal_mixture(weights, means, variances)


def test_bad_covariances_are_refused() -> None:
    one, mean = torch.ones(1), torch.zeros(1, 2)
    with pytest.raises(ValueError, match="symmetric"):
        full_mixture(one, mean, torch.tensor([[[1.0, 0.5], [0.0, 1.0]]]))
    with pytest.raises(ValueError, match="at least 0"):
        full_mixture(one, mean, torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]))


# --- the empirical mixture --------------------------------------------------------------------------------------------


def test_the_empirical_mixture_is_a_mixture_of_points() -> None:
    points = torch.randn(7, 3, dtype=F64, generator=torch.Generator().manual_seed(6))
    oracle, general = (
        EmpiricalMixture(points),
        GaussianMixture(torch.full((7,), 1 / 7, dtype=F64), points, torch.zeros(7, 3)),
    )
    y = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(7)) * 2
    for gamma in LEVELS:
        assert torch.allclose(oracle.log_density(y, at(gamma, 5)), general.log_density(y, at(gamma, 5)), rtol=1e-8)
        assert torch.allclose(oracle.denoise(y, at(gamma, 5)), general.denoise(y, at(gamma, 5)), rtol=1e-6, atol=1e-9)


def test_it_remembers_at_low_noise_and_averages_at_high() -> None:
    points = torch.randn(50, 1, 4, 4, generator=torch.Generator().manual_seed(8))
    oracle = EmpiricalMixture(points.flatten(1))
    y = points[[3, 17]] + 0.01 * torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(9))
    remembered = oracle(y, at(2 * math.log(0.01), 2), NONE).x_hat
    assert torch.allclose(remembered, points[[3, 17]], atol=1e-6)
    assert remembered.dtype == torch.float32
    far = oracle(y, at(20.0, 2), NONE).x_hat
    assert torch.allclose(far, points.mean(0).expand(2, 1, 4, 4), atol=1e-3)


# --- behind a denoiser ------------------------------------------------------------------------------------------------


def test_the_oracle_denoiser_is_bound_by_the_same_errors() -> None:
    with pytest.raises(ValueError, match="unknown prediction 'epsilon'"):
        oracle_denoiser(LINE, LinearGamma(), Parameterization("epsilon"))
    with pytest.raises(ValueError, match="unknown level 'gamma'"):
        oracle_denoiser(LINE, LinearGamma(), Parameterization(), level="gamma")
    with pytest.raises(ValueError, match="unknown network input 'y'"):
        oracle_denoiser(LINE, LinearGamma(), Parameterization(), network_input="y")
