"""The likelihood of codec and prior together, against distributions where it is known."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Process
from pipeline.diffusion.likelihood.continuous import CONTINUOUS, gaussian_entropy
from pipeline.diffusion.likelihood.decoders import log_bin_probability
from pipeline.diffusion.likelihood.estimate import Likelihood
from pipeline.diffusion.likelihood.estimators import ESTIMATORS
from pipeline.diffusion.likelihood.reconstruction import (
    fit_log_scales,
    log_logistic_bin_probability,
    pixel_log_likelihood,
)
from pipeline.diffusion.likelihood.whole import (
    Whole,
    codec_answerers,
    paired_information,
    posterior_draws,
    posterior_entropy,
    posterior_of,
    whole,
)
from pipeline.diffusion.oracles.exact import GaussianMixture, diagonal_mixture, full_mixture, gaussian
from pipeline.diffusion.pixels import PixelGrid
from pipeline.diffusion.procedure import Answerer, drive
from pipeline.diffusion.randomness import Noise
from tests.diffusion.likelihood_cases import NONE, PIXELS, process

WIDE = process(-12.0, 7.0)
FAR = process(-12.0, 16.0)  # where single points are compared: their prior is N(0, v) to 1e-3 nats there


@dataclasses.dataclass(frozen=True)
class LinearCodec:
    """x = matrix z + offset + std eps, of orthogonal columns; q is the exact posterior under N(mean, spread)."""

    matrix: Tensor
    offset: Tensor
    std: float
    mean: Tensor
    spread: Tensor
    gain: float = 1.0  # the codec's own latents are that many times larger, its normalisation takes it off again

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        precision = 1 / self.spread + (self.matrix**2).sum(0) / self.std**2
        mean = (self.mean / self.spread + (x.double() - self.offset) @ self.matrix / self.std**2) / precision
        raw_mean, raw_log_variance = self.gain * mean, -torch.log(precision) + 2 * math.log(self.gain)
        return raw_mean / self.gain, (raw_log_variance - 2 * math.log(self.gain)).expand_as(mean)

    def reconstruction(self, z: Tensor) -> tuple[Tensor, Tensor]:
        raw = self.gain * z
        mean = raw @ (self.matrix / self.gain).T + self.offset
        return mean, torch.tensor(math.log(self.std), dtype=torch.float64)

    def answerers(self, prior: Answerer) -> dict[str, Answerer]:
        return {"main": prior} | codec_answerers(self.posterior, self.reconstruction)

    def marginal(self, prior: GaussianMixture) -> GaussianMixture:
        """Of x, exactly."""
        noise = self.std**2 * torch.eye(len(self.matrix), dtype=torch.float64)
        covariances = torch.einsum("ij,kj,lj->kil", self.matrix, prior.spectra, self.matrix) + noise
        return full_mixture(prior.weights, prior.means @ self.matrix.T + self.offset, covariances)


PRIOR = gaussian([0.3, -0.5, 0.0, 0.8], [1.2, 0.7, 0.9, 0.5])
MIXTURE = diagonal_mixture(
    [0.5, 0.3, 0.2],
    [[1.0, 0.0, -1.0, 0.5], [-1.0, 1.0, 0.5, 0.0], [0.0, -1.5, 0.0, -1.0]],
    [[0.3, 0.2, 0.4, 0.3], [0.2, 0.4, 0.3, 0.2], [0.4, 0.3, 0.2, 0.3]],
)


def linear_codec(prior: GaussianMixture, gain: float = 1.0) -> LinearCodec:
    """8 dimensions of pixels from 4 of latents."""
    torch.manual_seed(4)
    basis = torch.linalg.qr(torch.randn(8, 4, dtype=torch.float64))[0]
    matrix = basis * torch.tensor([1.5, 1.0, 0.7, 2.0], dtype=torch.float64)
    mean = prior.weights @ prior.means
    spread = prior.weights @ (prior.spectra + (prior.means - mean) ** 2)
    return LinearCodec(matrix, torch.linspace(-1, 1, 8, dtype=torch.float64), 0.4, mean, spread, gain)


def images(codec: LinearCodec, prior: GaussianMixture, count: int) -> Tensor:
    return codec.marginal(prior).sample(count, torch.Generator().manual_seed(5))


def total(
    codec: LinearCodec, prior: GaussianMixture, x: Tensor, setting: Whole, first: int = 0, **options: Any
) -> Likelihood:
    noise = Noise(range(first, first + len(x)))
    return drive(whole(x, setting, noise, NONE, **options), codec.answerers(prior))


FINE = {"terms": 256, "steps": 20_000, "rows": 1 << 15}
SETTINGS: dict[str, dict[str, Any]] = {
    "vlb": {"options": {"levels": 256, "rows": 1 << 15}},
    "vlb_discrete": {"options": FINE},
    "ddim_bound": {"options": FINE | {"eta": 1.0}},
    "ode": {"options": {"trace": "exact", "tolerance": 1e-5, "solver": "dopri5"}},
}
# images, latents, and nats a dimension that the standard error of each may have at most; all of it in the long form
Many = tuple[int, int, float, float]
FEW: Many = (80, 250, 0.01, 0.025)
MANY: dict[str, Many] = {
    "vlb": (170, 1700, 0.005, 0.005),
    "vlb_discrete": FEW,
    "ddim_bound": FEW,
    "ode": (16, 64, 0.005, 0.005),
}
ALL: dict[str, Many] = {name: (320, 5500, 0.005, 0.005) for name in ("vlb_discrete", "ddim_bound")}
CASES = [*MANY.items(), *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL.items())]


@pytest.mark.parametrize(("estimator", "many"), CASES)
def test_gaussian_prior_and_linear_codec_give_the_exact_density(estimator: str, many: Many) -> None:
    codec = linear_codec(PRIOR)
    x = images(codec, PRIOR, many[0])
    facts = FAR if estimator == "ode" else WIDE
    setting = Whole(facts, CONTINUOUS, estimator=estimator, draws=4, rounding=None, **SETTINGS[estimator])
    found = total(codec, PRIOR, x, setting)
    gap = found.nats + codec.marginal(PRIOR).log_density(x)
    error = float(found.standard_error.square().sum().sqrt()) / len(x)
    assert error / x.shape[1] < many[2]
    loss = 0.04 if "steps" in SETTINGS[estimator]["options"] else 2e-3  # nats: of so many steps; of the ends of gamma
    assert -3 * error - 2e-3 < float(gap.mean()) < 3 * error + loss
    assert set(found.parts) == {"decoder", "prior", "diffusion", "entropy"}
    torch.testing.assert_close(sum(found.parts.values()), found.nats)


@pytest.mark.parametrize(("estimator", "many"), CASES)
def test_the_cost_of_a_latent_is_its_exact_density(estimator: str, many: Many) -> None:
    z = MIXTURE.sample(many[1], torch.Generator().manual_seed(1))
    setting = Whole(FAR if estimator == "ode" else WIDE, CONTINUOUS, estimator=estimator, **SETTINGS[estimator])
    found = drive(setting.cost(z, Noise(range(len(z))), NONE), MIXTURE)
    gap = found.nats + MIXTURE.log_density(z)
    error = float(found.standard_error.square().sum().sqrt()) / len(z)
    if estimator == "ode":
        assert float(gap.abs().max()) < 2e-3
    else:
        assert error / 4 < many[3]
        loss = 0.04 if "steps" in SETTINGS[estimator]["options"] else 2e-3
        assert -3 * error - 2e-3 < float(gap.mean()) < 3 * error + loss


@pytest.mark.parametrize("estimator", ["vlb", "ode"])
def test_a_mixture_prior_is_bounded_from_above(estimator: str) -> None:
    """q is one Gaussian where the exact posterior is a mixture: the bound is above, by the divergence of the two."""
    codec = linear_codec(MIXTURE)
    x = images(codec, MIXTURE, 40)
    setting = Whole(WIDE, CONTINUOUS, estimator=estimator, draws=4, **SETTINGS[estimator])
    found = total(codec, MIXTURE, x, setting)
    gap = found.nats + codec.marginal(MIXTURE).log_density(x)
    error = float(found.standard_error.square().sum().sqrt()) / len(x)
    assert float(gap.mean()) > -3 * error
    low, _ = found.interval
    assert float((low <= -codec.marginal(MIXTURE).log_density(x)).double().mean()) > 0.8  # tight where q is good
    # R + C - H with C exact, at the same z: what is left is the estimator's alone
    answerers = codec.answerers(MIXTURE)
    draws = drive(posterior_draws(x, setting, Noise(range(len(x)))), answerers)
    exact = torch.stack([-MIXTURE.log_density(z) for z in draws]).mean(0)
    estimated = found.parts["prior"] + found.parts["diffusion"]
    noise_error = float(found.standard_errors["noise"].square().sum().sqrt()) / len(x)
    assert float((estimated - exact).mean().abs()) < 3 * noise_error + 2e-3


def test_the_same_whatever_the_codec_multiplies_its_latents_by() -> None:
    x = images(linear_codec(MIXTURE), MIXTURE, 8)
    setting = Whole(WIDE, CONTINUOUS, draws=2, options={"levels": 16})
    a = total(linear_codec(MIXTURE), MIXTURE, x, setting)
    b = total(linear_codec(MIXTURE, gain=10.0), MIXTURE, x, setting)
    assert float((a.nats - b.nats).abs().max()) / x.shape[1] < 1e-6


def test_the_same_whatever_latents_prior_and_levels_are_all_multiplied_by() -> None:
    """C and H are in one coordinate: latents 10 times as large cost d log 10 more, and have as much more entropy."""
    factor, codec = 10.0, linear_codec(MIXTURE)
    larger = GaussianMixture(MIXTURE.weights, factor * MIXTURE.means, factor**2 * MIXTURE.spectra)
    far = LinearCodec(codec.matrix / factor, codec.offset, codec.std, factor * codec.mean, factor**2 * codec.spread)
    shift = 2 * math.log(factor)
    facts = Process("ve", WIDE.gamma_min, WIDE.gamma_max, math.exp(WIDE.gamma_max))
    moved = Process("ve", WIDE.gamma_min + shift, WIDE.gamma_max + shift, math.exp(WIDE.gamma_max + shift))
    x = images(codec, MIXTURE, 8)
    for estimator, options in (("vlb", {"levels": 16}), ("vlb_discrete", {"steps": 40})):
        near, away = (
            total(c, p, x, Whole(f, CONTINUOUS, estimator=estimator, draws=2, rounding=None, options=options))
            for c, p, f in ((codec, MIXTURE, facts), (far, larger, moved))
        )
        assert float((near.nats - away.nats).abs().max()) / x.shape[1] < 1e-6
        assert float((near.parts["entropy"] - away.parts["entropy"] - 4 * math.log(factor)).abs().max()) < 1e-9


@pytest.mark.parametrize(
    ("setting", "control"),
    [
        (Whole(WIDE, CONTINUOUS, draws=4, options={"levels": 8}), True),
        (Whole(WIDE, CONTINUOUS, draws=3, options={"levels": 8}), False),
        (Whole(WIDE, CONTINUOUS, draws=2, options={"levels": 8}), True),
    ],
    ids=["4 draws", "3 draws, not controlled", "2 draws"],
)
def test_the_interval_covers_as_often_as_it_says(setting: Whole, control: bool) -> None:
    codec = linear_codec(PRIOR)
    x = images(codec, PRIOR, 1).expand(1000, -1)
    found = total(codec, PRIOR, x, setting, control=control)
    truth = -float(codec.marginal(PRIOR).log_density(x[:1]))
    low, high = found.interval
    covered = float(((low <= truth) & (truth <= high)).double().mean())
    assert 0.93 <= covered <= 0.97
    # by source: what is said of the draws of z and of the levels is what the repeats show
    spread = float(found.nats.std())
    assert float(found.standard_error.square().mean().sqrt()) == pytest.approx(spread, rel=0.1)


def test_control_takes_nothing_but_error_off() -> None:
    codec = linear_codec(PRIOR)
    x = images(codec, PRIOR, 24)
    setting = Whole(WIDE, CONTINUOUS, estimator="ode", draws=4, rounding=None, options={"trace": "exact"})
    plain, controlled = (total(codec, PRIOR, x, setting, control=control) for control in (False, True))
    difference = plain.nats - controlled.nats
    assert float(difference.mean().abs()) < 3 * float(difference.std()) / len(x) ** 0.5
    error = {
        name: each.standard_errors["posterior"].square().mean().sqrt()
        for name, each in (("plain", plain), ("controlled", controlled))
    }
    assert float(error["controlled"]) < 0.05 * float(error["plain"])


def test_r_c_and_h_have_the_same_rounded_posterior() -> None:
    codec = linear_codec(PRIOR)
    x = images(codec, PRIOR, 6)
    setting = Whole(WIDE, CONTINUOUS, draws=2, options={"levels": 4})
    answerers = codec.answerers(PRIOR)
    mean, log_variance = drive(posterior_of(x, torch.float16), answerers)
    assert torch.equal(mean, codec.posterior(x)[0].half().double())
    assert not torch.equal(mean, codec.posterior(x)[0])
    found = total(codec, PRIOR, x, setting)
    assert torch.equal(found.parts["entropy"], -posterior_entropy(log_variance))
    draws = torch.stack(drive(posterior_draws(x, setting, Noise(range(6))), answerers))
    reconstructed, log_scale = codec.reconstruction(draws)
    eps = (draws - mean) / torch.exp(log_variance / 2)
    r = -pixel_log_likelihood("gaussian", reconstructed, log_scale, x, CONTINUOUS).sum(-1) - 0.5 * (eps**2 - 1).sum(-1)
    torch.testing.assert_close(found.parts["decoder"], r.mean(0))


def test_an_image_alone_and_in_company_has_the_same_bits() -> None:
    codec = linear_codec(MIXTURE)
    x = images(codec, MIXTURE, 5)
    setting = Whole(WIDE, CONTINUOUS, draws=2, options={"levels": 8, "rows": 1})
    answerers = codec.answerers(MIXTURE)
    together = drive(whole(x, setting, Noise(range(5)), NONE), answerers, chunk=4)
    for i in range(5):
        alone = drive(whole(x[i : i + 1], setting, Noise([i]), NONE), answerers, chunk=4)
        assert torch.equal(alone.nats, together.nats[i : i + 1])


# --- 8-bit pixels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gaussian", "logistic"])
def test_the_probabilities_of_all_levels_sum_to_1(family: str) -> None:
    mean = torch.tensor([-1.5, -0.99, 0.0, 0.313, 1.2], dtype=torch.float64)[:, None]
    levels = torch.arange(256).expand(5, 256)
    for log_scale in (-7.0, -4.0, -1.0, 1.0):
        log_p = pixel_log_likelihood(family, mean.expand(5, 256), torch.tensor(log_scale), levels, PIXELS)
        torch.testing.assert_close(torch.logsumexp(log_p, 1), torch.zeros(5, dtype=torch.float64), atol=1e-9, rtol=0)


def test_a_bin_of_the_logistic_is_the_integral_of_its_density_far_into_the_tails() -> None:
    value = torch.linspace(-0.5, 0.5, 4001, dtype=torch.float64) * PIXELS.bin
    for index, mean, scale in ((128, 0.0, 0.05), (10, 0.9, 0.02), (250, -0.9, 0.013)):
        centre = PIXELS.first + PIXELS.bin * index
        density = (
            torch.sigmoid((centre + value - mean) / scale) * torch.sigmoid((mean - centre - value) / scale) / scale
        )
        expected = math.log(float(torch.trapezoid(density, value)))
        got = log_logistic_bin_probability(torch.tensor(mean, dtype=torch.float64), scale, torch.tensor(index), PIXELS)
        assert float(got) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", ["gaussian", "logistic"])
def test_gradients_are_finite_and_right_on_every_level(family: str) -> None:
    index = torch.tensor([0, 0, 3, 128, 255, 255, 255])
    mean = torch.tensor([-1.2, 0.9, 1.0, 0.1, 1.5, -0.99, 0.99], dtype=torch.float64, requires_grad=True)
    log_scale = torch.full((7,), -2.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda m, s: pixel_log_likelihood(family, m, s, index, PIXELS), (mean, log_scale), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("family", ["gaussian", "logistic"])
def test_r_of_8_bit_pixels_is_that_of_quadrature(family: str) -> None:
    """Two latents, six pixels of a decoder that is not linear."""
    torch.manual_seed(2)
    matrix, std = torch.randn(6, 2, dtype=torch.float64), torch.tensor([0.3, 0.5], dtype=torch.float64)

    def decode(z: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(z @ matrix.T), -0.7 + 0.3 * torch.sin(z @ matrix.T)

    def posterior(x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x[:, :2].double() * 0.8
        return mean, (2 * std.log()).expand_as(mean)

    levels = torch.randint(0, 256, (12, 6), generator=torch.Generator().manual_seed(3))
    x = PIXELS.first + PIXELS.bin * levels.double()
    line = torch.linspace(-6, 6, 161, dtype=torch.float64)
    weight = torch.exp(-(line**2) / 2)
    nodes = torch.cartesian_prod(line, line)
    weights = torch.outer(weight, weight).flatten() / weight.sum() ** 2
    mean, log_variance = posterior(x)
    z = mean[:, None] + torch.exp(log_variance / 2)[:, None] * nodes
    decoded, log_scale = decode(z)
    index = levels[:, None].expand(-1, len(nodes), -1)
    costs = -pixel_log_likelihood(family, decoded, log_scale, index, PIXELS).sum(-1)
    exact = (costs * weights).sum(1)
    prior = gaussian([0.0, 0.0], [1.0, 1.0])
    setting = Whole(WIDE, PIXELS, family=family, draws=1500, rounding=None, options={"levels": 2, "rows": 1 << 15})
    answerers = {"main": prior} | codec_answerers(posterior, decode)
    found = drive(whole(x, setting, Noise(range(12)), NONE), answerers)
    draws_cost = costs - 0.5 * (nodes**2 - 1).sum(1)
    variance = (draws_cost**2 * weights).sum(1) - exact**2
    error = float((variance / 1500).sum().sqrt()) / 12
    assert error / 6 < 0.01
    assert float((found.parts["decoder"] - exact).mean().abs()) < 3 * error
    assert float(found.bits_per_dim.mean()) == pytest.approx(float(found.nats.mean()) / (6 * math.log(2)))


@pytest.mark.parametrize("family", ["gaussian", "logistic"])
def test_a_fitted_scale_is_the_most_likely_one(family: str) -> None:
    generator = torch.Generator().manual_seed(6)
    truth = torch.tensor([0.03, 0.2], dtype=torch.float64)
    mean = torch.rand(40, 2, 12, 12, generator=generator, dtype=torch.float64) * 1.2 - 0.6
    unit = torch.rand(mean.shape, generator=generator, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
    spread = torch.special.ndtri(unit) if family == "gaussian" else torch.logit(unit)
    grey = ((mean + truth[:, None, None] * spread - PIXELS.first) / PIXELS.bin).round().clamp(0, 255).long()
    fitted = fit_log_scales(family, [(mean[:25], grey[:25]), (mean[25:], grey[25:])], PIXELS)
    assert (fitted - truth.log()).abs().max() < 0.03  # 5,760 pixels a channel
    at = pixel_log_likelihood(family, mean, fitted[:, None, None], grey, PIXELS).sum()
    for step in (-0.02, 0.02):
        assert at > pixel_log_likelihood(family, mean, fitted[:, None, None] + step, grey, PIXELS).sum()
    with pytest.raises(ValueError, match="belong together"):
        fit_log_scales(family, [(mean * 0 - 5, grey)], PIXELS)
    with pytest.raises(ValueError, match="no images"):
        fit_log_scales(family, [], PIXELS)


# --- the continuous terminal ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "levels", "options"),
    [
        ("vlb", 512, {"levels": 8}),
        ("vlb_discrete", 512, {"steps": 20}),
        ("vlb_discrete", 1 << 16, {"steps": 20, "decoder": "gaussian", "variance": "beta_throughout"}),
    ],
)
def test_the_terminal_is_the_limit_of_ever_finer_grey_levels(name: str, levels: int, options: dict[str, Any]) -> None:
    """-log P of the bin + D log bin -> the density, for the same levels and noise."""
    x = MIXTURE.sample(6, torch.Generator().manual_seed(8))
    grid = PixelGrid(levels=levels, first=-8.0, bin=16 / levels)
    x = grid.first + grid.bin * ((x - grid.first) / grid.bin).round()
    facts = process(-6.0, 5.0)
    binned, density = (
        drive(ESTIMATORS[name].start(x, facts, Noise(range(6)), NONE, pixels=pixels, **options), MIXTURE)
        for pixels in (grid, CONTINUOUS)
    )
    torch.testing.assert_close(binned.nats + 4 * grid.log_volume, density.nats, atol=1e-3, rtol=0)
    torch.testing.assert_close(binned.standard_error, density.standard_error, atol=1e-3, rtol=0)


def test_the_terminal_of_y_0_is_a_constant_and_that_of_x_hat_has_an_error_bar() -> None:
    z = MIXTURE.sample(4, torch.Generator().manual_seed(8))
    facts = process(-7.0, 5.0)

    def reconstruction(**options: Any) -> Likelihood:
        return drive(
            ESTIMATORS["vlb"].start(z, facts, Noise(range(4)), NONE, pixels=CONTINUOUS, levels=4, **options), MIXTURE
        )

    constant = reconstruction().parts["reconstruction"]
    assert torch.equal(constant, torch.full_like(constant, gaussian_entropy(4, -7.0)))
    sharper = reconstruction(decoder="gaussian", decoder_draws=50).parts["reconstruction"]
    assert float(sharper.mean()) < float(constant.mean())  # x_hat is nearer to z than y_0


@pytest.mark.parametrize("estimator", ["vlb", "vlb_discrete", "ddim_bound"])
def test_clipping_latents_is_refused(estimator: str) -> None:
    z = MIXTURE.sample(2, torch.Generator().manual_seed(8))
    with pytest.raises(ValueError, match="clip is a habit of pixels"):
        drive(ESTIMATORS[estimator].start(z, WIDE, Noise(range(2)), NONE, pixels=CONTINUOUS, clip=1.0), MIXTURE)


def test_what_has_no_likelihood_is_refused_by_name() -> None:
    codec, setting = linear_codec(PRIOR), Whole(WIDE, CONTINUOUS)
    x = images(codec, PRIOR, 2)

    def asked(posterior: Any, reconstruction: Any) -> Likelihood:
        answerers = {"main": PRIOR} | codec_answerers(posterior, reconstruction)
        return drive(whole(x, setting, Noise(range(2)), NONE), answerers)

    with pytest.raises(ValueError, match="no posterior variance"):
        asked(lambda y: (codec.posterior(y)[0], None), codec.reconstruction)
    with pytest.raises(ValueError, match="fit a scale"):
        asked(codec.posterior, lambda z: (codec.reconstruction(z)[0], None))
    with pytest.raises(ValueError, match="float16"):
        asked(lambda y: (codec.posterior(y)[0] * 1e6, codec.posterior(y)[1]), codec.reconstruction)
    with pytest.raises(ValueError, match="at least 2"):
        Whole(WIDE, CONTINUOUS, draws=1)
    with pytest.raises(ValueError, match="estimator"):
        Whole(WIDE, CONTINUOUS, estimator="elbo")
    with pytest.raises(ValueError, match="samples at 1"):
        drive(ESTIMATORS["ode"].start(x[:, :4], WIDE, Noise(range(2)), NONE, pixels=CONTINUOUS, samples=2), PRIOR)
    with pytest.raises(ValueError, match="latent 1"):
        CONTINUOUS.index(torch.tensor([[0.0], [math.nan]]))


# --- paired information -----------------------------------------------------------------------------------------------


def labels(n: int, label: int) -> Conditioning:
    return Conditioning(torch.full((n,), label))


@pytest.mark.parametrize("estimator", ["vlb", "ode"])
def test_paired_information_is_that_of_the_exact_densities(estimator: str) -> None:
    """A label of the mixture names its component: log p(z | c) - log p(z) is known."""
    n = 40 if estimator == "vlb" else 6
    x = images(linear_codec(MIXTURE), MIXTURE, n)
    options = {"levels": 64} if estimator == "vlb" else {"trace": "exact"}
    setting = Whole(WIDE, CONTINUOUS, estimator=estimator, draws=2, options=options)
    answerers = linear_codec(MIXTURE).answerers(MIXTURE)
    draws = drive(posterior_draws(x, setting, Noise(range(n))), answerers)
    conditions = [labels(n, c) for c in range(3)]
    found = drive(paired_information(draws, setting.cost, conditions, labels(n, -1), Noise(range(n))), answerers)
    level = torch.full((n,), -math.inf, dtype=torch.float64)
    joint = [MIXTURE.log_joint(z, level) - MIXTURE.weights.log() for z in draws]
    exact = torch.stack([j - MIXTURE.log_density(z)[:, None] for j, z in zip(joint, draws, strict=True)]).mean(0)
    slack = 3 * float(found.standard_error.square().sum().sqrt()) / found.nats.numel()
    assert float((found.nats - exact).mean().abs()) < slack + 0.01
    right = (found.probabilities().argmax(1) == exact.argmax(1)).double().mean()
    assert float(right) >= 0.95
    assert torch.equal(found.bits, found.nats / math.log(2))
    with pytest.raises(ValueError, match="at least 2 draws"):
        drive(paired_information(draws[:1], setting.cost, conditions, labels(n, -1), Noise(range(n))), answerers)


def test_pairs_have_a_smaller_error_than_two_scores_apart() -> None:
    x = images(linear_codec(MIXTURE), MIXTURE, 30)
    setting = Whole(WIDE, CONTINUOUS, draws=4, options={"levels": 8})
    answerers = linear_codec(MIXTURE).answerers(MIXTURE)
    draws = drive(posterior_draws(x, setting, Noise(range(30))), answerers)
    own = Conditioning(MIXTURE.log_joint(draws[0], torch.full((30,), -math.inf)).argmax(1))
    found = drive(paired_information(draws, setting.cost, [own], labels(30, -1), Noise(range(30))), answerers)
    apart = drive(setting.cost(draws[0], Noise(range(30)), labels(30, -1)), answerers)
    error = float(found.standard_error.square().mean().sqrt())
    assert error < 0.5 * float(apart.standard_error.square().mean().sqrt()) * math.sqrt(2 / 4)


def test_bins_of_the_gaussian_stay_what_they_were() -> None:
    mean = torch.zeros(1, 3, dtype=torch.float64)
    index = torch.tensor([[0, 128, 255]])
    a = pixel_log_likelihood("gaussian", mean, torch.tensor(math.log(0.3)), index, PIXELS)
    torch.testing.assert_close(a, log_bin_probability(mean, 0.3, index, PIXELS))
