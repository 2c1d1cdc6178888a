"""The bound as an objective: its value, and what a learnt schedule is taught."""

import math

import pytest
import torch
from torch import Tensor, nn

from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.likelihood.bounds import prior_term
from pipeline.diffusion.likelihood.decoders import expected_softmax
from pipeline.diffusion.likelihood.estimators import vlb
from pipeline.diffusion.objectives.variational import BIT, VLB, interior_surrogate, path, prior_nats, softmax_nats
from pipeline.diffusion.parameterization import Parameterization
from pipeline.diffusion.pixels import PixelGrid
from pipeline.diffusion.procedure import drive
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.scaling import SCALINGS
from pipeline.diffusion.schedule import EDM, Flow, LearnedGamma, LinearGamma, derivative
from tests.diffusion.objective_cases import NONE, eps_error, gaussian_denoiser, key, on_grid

X = on_grid(64, std=0.3)
SQUARE = float(X.double().square().mean())
LAWS = {
    "linear": LinearGamma(-13.3, 5.0),
    "flow": Flow(-13.3, 5.0),
    "edm": EDM(math.exp(-13.3 / 2), math.exp(2.5)),
    "learned": LearnedGamma(hidden=32),
}


def total(objective: VLB, denoiser: Denoiser, steps: int) -> tuple[float, float]:
    with torch.no_grad():
        values = torch.stack([objective.loss(denoiser, X, NONE, key(step)).per_image.mean() for step in range(steps)])
    return float(values.mean()), float(values.std() / math.sqrt(steps))


# --- its value ------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
def test_the_bound_is_the_evaluators_for_any_law(law: str) -> None:
    """Continuous time: the value depends on the end points alone, and is what the estimator of likelihoods finds."""
    denoiser = gaussian_denoiser(0.25, LAWS[law])
    density = "schedule" if law in ("linear", "learned") else "uniform_gamma"
    value, error = total(VLB(density=density), denoiser, 200)
    noise = Noise(range(len(X)))
    likelihood = drive(vlb(X, denoiser.process, noise, NONE, pixels=PixelGrid(), levels=200), denoiser)
    expected = float(likelihood.bits_per_dim.mean())
    expected_error = float(likelihood.bits_per_dim_standard_error.square().sum().sqrt()) / len(X)
    assert error < 0.03
    assert abs(value - expected) < 5 * math.hypot(error, expected_error)


def test_discrete_steps_sum_to_the_closed_form_and_fall_to_the_continuous_bound() -> None:
    denoiser = gaussian_denoiser(0.25, LAWS["linear"])
    ends = path(LAWS["linear"], torch.zeros(1, dtype=torch.float64))
    fixed = (
        prior_nats(X, ends.gamma_max, "vp") + softmax_nats(ends.gamma_min, PixelGrid().index(X), PixelGrid())
    ).mean() / BIT
    gaps = []
    gamma = torch.linspace(-13.3, 5.0, 20001, dtype=torch.float64)
    continuous = float(torch.trapezoid(0.5 * eps_error(gamma, 0.25, SQUARE), gamma)) / BIT
    for steps in (64, 128, 256):
        levels = torch.linspace(-13.3, 5.0, steps + 1, dtype=torch.float64)
        terms = 0.5 * torch.expm1(levels[1:] - levels[:-1]) * eps_error(levels[1:], 0.25, SQUARE)
        expected = float(terms.sum() / BIT + fixed)
        value, error = total(VLB(steps), denoiser, 200)
        assert abs(value - expected) < 5 * error + 1e-3
        gaps.append(float(terms.sum()) / BIT - continuous)
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert abs(gaps[1] / gaps[2] - 2) < 0.1  # as 1 / T


@pytest.mark.parametrize("scaling", SCALINGS)
def test_prior_is_the_evaluators(scaling: str) -> None:
    denoiser = gaussian_denoiser(0.3, scaling=scaling)
    ours = prior_nats(X, torch.tensor(5.0, dtype=torch.float64), scaling) * X[0].numel()
    expected = prior_term(X, 5.0, denoiser.process.prior_variance)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gamma_min", [-15.0, -13.3, -9.0])
def test_softmax_reconstruction_is_the_evaluators_and_has_the_right_gradient(gamma_min: float) -> None:
    index = torch.arange(256).view(4, 1, 8, 8)
    gamma = torch.tensor(gamma_min, dtype=torch.float64, requires_grad=True)
    ours = softmax_nats(gamma, index, PixelGrid())
    expected = expected_softmax(math.exp(gamma_min / 2), index, PixelGrid()) / 64
    torch.testing.assert_close(ours.detach(), expected, rtol=1e-9, atol=1e-12)
    (slope,) = torch.autograd.grad(ours.sum(), gamma)
    with torch.no_grad():
        change = softmax_nats(gamma + 1e-4, index, PixelGrid()) - softmax_nats(gamma - 1e-4, index, PixelGrid())
    assert float(slope) == pytest.approx(float(change.sum()) / 2e-4, rel=1e-5)


def test_variance_reduction_by_stratified_times() -> None:
    """Measured: 0.09 of the variance of independent times in the mean over 64 images; what is left is that of eps."""
    denoiser = gaussian_denoiser(0.25, LAWS["linear"])
    _, even = total(VLB(), denoiser, 200)
    _, independent = total(VLB(stratified=False), denoiser, 200)
    assert even**2 < 0.2 * independent**2


def test_uniform_gamma_mends_a_law_of_great_variance() -> None:
    """Measured: a standard error of 1.7 in place of 89 bits/dim."""
    denoiser = gaussian_denoiser(0.25, LAWS["edm"])
    _, plain = total(VLB(), denoiser, 100)
    _, mended = total(VLB(density="uniform_gamma"), denoiser, 100)
    assert mended < 0.1 * plain


# --- learnt schedules -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["net", "scalar"])
def test_law_derivatives_against_finite_differences(shape: str) -> None:
    law = LearnedGamma(-9.0, 5.0, shape, hidden=16)
    if shape == "net":
        law.l3_weight.data.mul_(300)  # so that it bends
    t = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    with torch.no_grad():
        value, first, second = law.interior(t)
        up, down = law.fraction(t + 1e-4), law.fraction(t - 1e-4)
    torch.testing.assert_close(value, law.fraction(t).detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(first, (up - down) / 2e-4, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(second, (up - 2 * value + down) / 1e-8, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(derivative(law.gamma, t), 14 * first, rtol=1e-10, atol=0)
    assert bool((first > 0).all())
    ends = law.gamma(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    assert ends == [-9.0, 5.0]


class KnownError(nn.Module):
    """eps_hat = eps + h(gamma) exactly, on images that are all `pixel`: the error is h^2 whatever the draws."""

    def __init__(self, pixel: float) -> None:
        super().__init__()
        self.pixel = pixel

    @staticmethod
    def error(gamma: Tensor) -> Tensor:
        return (0.3 + 1 / (1 + torch.exp(-(gamma + 3)))) ** 2

    def forward(self, z: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        gamma = (level.double() * 8).view(-1, 1, 1, 1)
        alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        clean = alpha.detach() * self.pixel, sigma.detach()
        return (z.double().detach() - clean[0]) / clean[1] + self.error(gamma).sqrt()


def known(law: LearnedGamma) -> tuple[Denoiser, Tensor]:
    x = torch.full((512, 1, 1, 1), 1 / 256)
    return Denoiser(KnownError(1 / 256), law, Parameterization(), level="log_sigma"), x


def bent(**options: bool) -> LearnedGamma:
    law = LearnedGamma(-9.0, 5.0, hidden=8, **options)  # pyright: ignore[reportArgumentType]
    law.l3_weight.data.copy_(torch.tensor([6.0, -2.0, 1.0, 8.0, 3.0, 2.0, -9.0, 1.0]))
    law.l2_weight.data.mul_(6)
    return law


def test_interior_follows_the_variance() -> None:
    """The surrogate's gradient is that of E[l^2] by finite differences and quadrature, for every parameter."""
    law = bent()
    denoiser, x = known(law)
    steps = 8
    for step in range(steps):
        (VLB().loss(denoiser, x, NONE, key(step)).per_image.mean() / steps).backward()
    t = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000

    def second_moment() -> Tensor:
        with torch.no_grad():
            _, slope, _ = law.interior(t)
            return (0.5 * 14 * slope * KnownError.error(law.gamma(t)) / BIT).square().mean()

    for name, parameter in law.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None
        flat, grad = parameter.data.view(-1), parameter.grad.view(-1)
        for index in range(len(flat)):
            flat[index] += 1e-5
            up = second_moment()
            flat[index] -= 2e-5
            down = second_moment()
            flat[index] += 1e-5
            assert float(grad[index]) == pytest.approx(float(up - down) / 2e-5, rel=2e-3, abs=2e-4), name


def test_the_interior_learns_a_smaller_variance() -> None:
    """Its optimum is l constant in t: the variance of the single draw goes to zero while the bound stays."""
    law = bent()
    denoiser, x = known(law)
    optimiser = torch.optim.Adam(law.parameters(), lr=0.03)
    first = VLB().loss(denoiser, x, NONE, key())
    for step in range(300):
        optimiser.zero_grad()
        VLB().loss(denoiser, x, NONE, key(step)).per_image.mean().backward()
        optimiser.step()
    last = VLB().loss(denoiser, x, NONE, key(1000))
    means = [float(loss.per_image.detach().mean()) for loss in (first, last)]
    assert means[1] == pytest.approx(means[0], rel=5e-3)
    assert float(last.parts["diffusion"].var()) < 0.05 * float(first.parts["diffusion"].var())


def test_end_points_follow_the_bound() -> None:
    """Against finite differences of the whole bound by quadrature."""
    law = bent(learn_ends=True)
    denoiser, x = known(law)
    steps = 32
    for step in range(steps):
        (VLB().loss(denoiser, x, NONE, key(step)).per_image.mean() / steps).backward()
    assert law.ends.grad is not None
    index = PixelGrid().index(x[:1])

    def bound(low: float, high: float) -> float:
        gamma = torch.linspace(low, high, 20001, dtype=torch.float64)
        ends = torch.tensor([low, high], dtype=torch.float64)
        parts = prior_nats(x[:1], ends[1], "vp") + softmax_nats(ends[0], index, PixelGrid())
        return float(torch.trapezoid(0.5 * KnownError.error(gamma), gamma) + parts[0]) / BIT

    expected = [
        (bound(-9 + 1e-3, 5) - bound(-9 - 1e-3, 5)) / 2e-3,
        (bound(-9, 5 + 1e-3) - bound(-9, 5 - 1e-3)) / 2e-3,
    ]
    assert law.ends.grad.tolist() == pytest.approx(expected, rel=2e-3)


class Linear(nn.Module):
    """eps_hat = h(level) z, so that the gradient also runs through the noisy image."""

    def forward(self, z: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        return (0.2 + 0.6 * level).view(-1, 1, 1, 1) * z


def test_end_points_with_a_normalised_level() -> None:
    """The network is told (gamma - gamma_min) / (gamma_max - gamma_min), which learnt end points do not change."""
    law = LearnedGamma(-9.0, 3.0, "scalar", learn_ends=True)
    denoiser = Denoiser(Linear(), law, Parameterization())
    steps = 100
    gradients = []
    for step in range(steps):
        law.ends.grad = None
        loss = VLB().loss(denoiser, X, NONE, key(step))
        loss.per_image.mean().backward()
        assert law.ends.grad is not None
        gradients.append(law.ends.grad.clone())
    stack = torch.stack(gradients)
    index = PixelGrid().index(X)

    def bound(low: float, high: float) -> float:
        t = torch.linspace(0, 1, 4001, dtype=torch.float64)
        gamma = low + (high - low) * t
        alpha2, sigma2, h = torch.sigmoid(-gamma), torch.sigmoid(gamma), 0.2 + 0.6 * t
        error = (h * sigma2.sqrt() - 1) ** 2 + h**2 * alpha2 * SQUARE
        ends = torch.tensor([low, high], dtype=torch.float64)
        parts = (prior_nats(X, ends[1], "vp") + softmax_nats(ends[0], index, PixelGrid())).mean()
        return float(torch.trapezoid(0.5 * error, gamma) + parts) / BIT

    expected = torch.tensor(
        [
            (bound(-9 + 1e-3, 3) - bound(-9 - 1e-3, 3)) / 2e-3,
            (bound(-9, 3 + 1e-3) - bound(-9, 3 - 1e-3)) / 2e-3,
        ]
    )
    z = (stack.mean(0) - expected) / (stack.std(0) / math.sqrt(steps))
    assert float(z.abs().max()) < 5


def test_discrete_time_teaches_the_interior_by_the_bound() -> None:
    law = bent()
    denoiser, x = known(law)
    objective = VLB(steps=8)
    passes = 64
    for step in range(passes):
        (objective.loss(denoiser, x, NONE, key(step)).per_image.mean() / passes).backward()

    def bound() -> float:
        with torch.no_grad():
            gamma = law.gamma(torch.linspace(0, 1, 9, dtype=torch.float64))
            return float((0.5 * torch.expm1(gamma[1:] - gamma[:-1]) * KnownError.error(gamma[1:])).sum()) / BIT

    for name, parameter in law.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None
        flat, grad = parameter.data.view(-1), parameter.grad.view(-1)
        for index in range(len(flat)):
            flat[index] += 1e-5
            up = bound()
            flat[index] -= 2e-5
            down = bound()
            flat[index] += 1e-5
            assert float(grad[index]) == pytest.approx((up - down) / 2e-5, rel=2e-3, abs=1e-4), name


def test_fixed_laws_have_no_surrogate() -> None:
    p = path(LAWS["linear"], torch.rand(5, dtype=torch.float64))
    assert torch.equal(interior_surrogate(p, torch.ones(5)), torch.zeros(5))


def test_errors() -> None:
    with pytest.raises(ValueError, match="steps"):
        VLB(steps=-1)
    with pytest.raises(ValueError, match="grey level"):
        VLB().loss(gaussian_denoiser(0.3), X + 0.001, NONE, key())
