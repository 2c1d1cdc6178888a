"""The variational bounds: against quadrature, closed forms and each other."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Prediction, Process
from pipeline.diffusion.likelihood.bounds import ancestral_steps, ddim_steps, step_divergence
from pipeline.diffusion.likelihood.estimators import PixelGrid
from pipeline.diffusion.procedure import Answer
from pipeline.diffusion.sampling.grids import grid
from pipeline.diffusion.scaling import SCALINGS, prior_variance
from pipeline.diffusion.schedule import Cosine, LinearBeta, LinearGamma
from tests.diffusion.likelihood_cases import (
    NONE,
    QuadratureNoise,
    atoms,
    estimate,
    gaussian_field,
    grey_images,
    normal_nodes,
    process,
    small_denoiser,
)

COARSE = {1: PixelGrid(levels=8, first=-7 / 8, bin=1 / 4), 2: PixelGrid(levels=4, first=-3 / 4, bin=1 / 2)}
WIDE = process(-11.0, 14.0)


def _law(dimensions: int) -> Tensor:
    """Uneven, correlated probabilities over the levels of COARSE."""
    level = torch.arange(COARSE[dimensions].levels, dtype=torch.float64)
    one = torch.exp(-((level - 1) ** 2)) + 0.5 * torch.exp(-((level - 3) ** 2) / 0.5)
    if dimensions == 1:
        return one / one.sum()
    both = one[:, None] * one * torch.exp(-0.3 * (level[:, None] - level) ** 2)
    return (both / both.sum()).flatten()


def _expected(name: str, dimensions: int, **options: Any) -> tuple[float, float]:
    """The bound in expectation over images and noise, by quadrature through the estimator, and the entropy; nats."""
    law = _law(dimensions)
    pixels = COARSE[dimensions]
    oracle = atoms(law, pixels, dimensions)
    eps, weights = normal_nodes(dimensions)
    images = oracle.means.repeat_interleave(len(eps), 0)[:, None]
    noise = QuadratureNoise(eps.repeat(len(law), 1)[:, None])
    # rows times levels of a query: as little memory as there may be
    result = estimate(name, oracle, images, facts=WIDE, noise=noise, pixels=pixels, control=False, rows=1, **options)
    total = (result.nats.view(len(law), -1) * weights).sum(1) @ law
    return float(total), float(-(law * law.log()).sum())


@pytest.mark.parametrize(("dimensions", "levels"), [(1, 300), (2, 160)])
def test_continuous_bound_is_the_entropy(dimensions: int, levels: int) -> None:
    bound, entropy = _expected("vlb", dimensions, levels=levels)
    assert bound == pytest.approx(entropy, abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"variance": "beta"}])
def test_discrete_bound_falls_to_the_continuous_one_as_one_over_steps(options: dict[str, Any]) -> None:
    limit, _ = _expected("vlb", 1, levels=300)
    steps = (100, 200, 400)
    gaps = [_expected("vlb_discrete", 1, steps=T + 1, **options)[0] - limit for T in steps]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    slopes = [math.log2(a / b) for a, b in pairwise(gaps)]
    assert slopes[-1] == pytest.approx(1, abs=0.1 if options == {} else 0.3)


def test_ddim_bound_is_least_at_its_own_process() -> None:
    """At eta = 1 it is DDPM's; with less noise than the posterior has, the bound is looser."""
    bounds = [_expected("ddim_bound", 1, steps=100, eta=eta)[0] for eta in (1.0, 0.7, 0.4)]
    assert bounds[0] == pytest.approx(_expected("vlb_discrete", 1, steps=100)[0], abs=1e-9)
    assert bounds[0] < bounds[1] < bounds[2]


# --- each step's term against the published formulas, in the published coordinates -----------------------------------


def _step() -> tuple[Tensor, Tensor, Answer, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, x_hat, eps, head = (torch.randn(6, 3, 2, 2, dtype=torch.float64, generator=generator) for _ in range(4))
    gamma_s = torch.linspace(-9, 3, 6, dtype=torch.float64)
    return x, eps, Answer(x_hat, head), gamma_s + torch.rand(6, dtype=torch.float64, generator=generator), gamma_s


def _kl(mean_q: Tensor, variance_q: Tensor, mean_p: Tensor, variance_p: Tensor) -> Tensor:
    return kl_divergence(Normal(mean_q, variance_q.sqrt()), Normal(mean_p, variance_p.sqrt())).flatten(1).sum(1)


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


@pytest.mark.parametrize("variance", ["posterior", "beta", "learned"])
def test_ancestral_term_is_the_divergence_of_ddpm(variance: str) -> None:
    """Ho et al. 2020, eq. 6-7, in z, with the step's alpha_t = abar_t / abar_s."""
    x, eps, answer, gamma_t, gamma_s = _step()
    abar_t, abar_s = (_column(torch.sigmoid(-gamma)) for gamma in (gamma_t, gamma_s))
    a = abar_t / abar_s
    z = abar_t.sqrt() * x + (1 - abar_t).sqrt() * eps

    def mean(clean: Tensor) -> Tensor:
        return (abar_s.sqrt() * (1 - a) * clean + a.sqrt() * (1 - abar_s) * z) / (1 - abar_t)

    tilde, beta = (1 - abar_s) / (1 - abar_t) * (1 - a), 1 - a
    assert answer.variance is not None
    share = (answer.variance + 1) / 2
    model = {"posterior": tilde, "beta": beta, "learned": torch.exp(share * beta.log() + (1 - share) * tilde.log())}
    expected = _kl(mean(x), tilde.expand_as(x), mean(answer.x_hat), model[variance].expand_as(x))
    got = step_divergence(variance)(answer, x, ancestral_steps(gamma_t, gamma_s, "vp"))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [1.0, 0.6, 1.1])
def test_ddim_term_is_the_divergence_of_ddim(eta: float) -> None:
    """Song et al. 2020, eq. 7 and 16, in z."""
    x, eps, answer, gamma_t, gamma_s = _step()
    abar_t, abar_s = (_column(torch.sigmoid(-gamma)) for gamma in (gamma_t, gamma_s))
    z = abar_t.sqrt() * x + (1 - abar_t).sqrt() * eps
    variance = eta**2 * (1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)

    def mean(clean: Tensor) -> Tensor:
        direction = (z - abar_t.sqrt() * clean) / (1 - abar_t).sqrt()
        return abar_s.sqrt() * clean + (1 - abar_s - variance).sqrt() * direction

    expected = _kl(mean(x), variance.expand_as(x), mean(answer.x_hat), variance.expand_as(x))
    got = step_divergence("posterior")(answer, x, ddim_steps(gamma_t, gamma_s, eta))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


# --- on Gaussian data, in closed form -------------------------------------------------------------------------------


class Shrink:
    """x_hat = c(gamma) y: the denoiser of N(0, variance I) data, with a variance head where asked."""

    def __init__(self, variance: float, head: float | None = None) -> None:
        self.variance, self.head = variance, head

    def __call__(self, y: Tensor, gamma: Tensor, conditioning: Conditioning, shared: object = None) -> Prediction:
        gain = self.variance / (self.variance + torch.exp(gamma.view(-1, *[1] * (y.ndim - 1))))
        return Prediction(gain * y, None if self.head is None else torch.full_like(y, self.head))

    def error(self, x: Tensor, gamma: Tensor) -> Tensor:
        """E |eps - eps_hat|^2 (n, k) at gammas (k,)."""
        s2 = torch.exp(gamma)
        gain = self.variance / (self.variance + s2)
        return ((1 - gain) ** 2 / s2) * x.double().flatten(1).square().sum(1, keepdim=True) + gain**2 * x[0].numel()


@pytest.mark.parametrize("law", [LinearBeta(), Cosine(), LinearBeta(steps=50)], ids=["linear", "cosine", "linear50"])
def test_every_term_of_a_table(law: LinearBeta | Cosine) -> None:
    """Prior and steps of published tables, in expectation: the mean over repeats lies within 5 standard errors."""
    facts = Process("vp", law.gamma_min, law.gamma_max, prior_variance("vp", law.gamma_max))
    oracle = Shrink(0.25)
    x = grey_images(1, 4).expand(40, 1, 4, 4)
    gammas = grid("linspace", law, len(law.table))
    result = estimate("vlb_discrete", oracle, x, facts=facts, gammas=gammas)
    table = law.table
    steps = 0.5 * torch.expm1(table.diff()) * oracle.error(x[:1], table[1:])
    z = (result.parts["steps"] - steps.sum()) / result.standard_error
    assert abs(float(z.mean())) * math.sqrt(40) < 5
    abar = torch.sigmoid(-table[-1])
    prior = kl_divergence(Normal(abar.sqrt() * x[0].double(), (1 - abar).sqrt()), Normal(0.0, 1.0)).sum()
    assert float(result.parts["prior"][0]) == pytest.approx(float(prior), rel=1e-9, abs=1e-12)
    assert int(result.evaluations[0]) == len(table) - 1


def test_learned_variance_spans_beta_tilde_to_beta() -> None:
    x, facts = grey_images(3, 4), process()
    for head, name in ((-1.0, "posterior"), (1.0, "beta_throughout")):
        for decoder in ("softmax", "gaussian"):
            options: dict[str, Any] = {"steps": 30, "decoder": decoder}
            learned = estimate("vlb_discrete", Shrink(0.3, head), x, facts=facts, variance="learned", **options)
            fixed = estimate("vlb_discrete", Shrink(0.3), x, facts=facts, variance=name, **options)
            torch.testing.assert_close(learned.nats, fixed.nats, rtol=1e-12, atol=1e-9)


class Still:
    """x_hat = 0.1, whatever is asked."""

    def __call__(self, y: Tensor, gamma: Tensor, conditioning: Conditioning, shared: object = None) -> Prediction:
        return Prediction(torch.full_like(y, 0.1))


@pytest.mark.parametrize(("variance", "index"), [("beta", 1), ("posterior", 1), ("beta_throughout", 0)])
def test_decoders_variance_is_that_of_the_original_code(variance: str, index: int) -> None:
    """Ho et al.'s fixed-large is (beta-tilde_1, beta_1, ..., beta_T-1), indices from 0; ours throughout has beta_0."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = torch.cumprod(1 - betas, 0)
    expected = betas[0] if index == 0 else betas[1] * (1 - abar[0]) / (1 - abar[1])
    law, x = LinearBeta(1000), (0.1 * 128 + 0.5 + torch.arange(4.0).view(1, 1, 2, 2)).floor() / 128 - 1 / 256
    facts = Process("vp", law.gamma_min, law.gamma_max, prior_variance("vp", law.gamma_max))
    options: dict[str, Any] = {"variance": variance, "decoder": "gaussian", "terms": 2}
    found = estimate("vlb_discrete", Still(), x, facts=facts, gammas=grid("linspace", law, 1000), **options)
    bins = Normal(0.1, expected.sqrt())
    mass = bins.cdf(x.double() + 1 / 256) - bins.cdf(x.double() - 1 / 256)
    assert float(found.parts["reconstruction"]) == pytest.approx(float(-mass.log().sum()), rel=1e-6)


@pytest.mark.parametrize("scaling", list(SCALINGS))
@pytest.mark.parametrize("importance", ["uniform", "gamma", "weights"])
def test_a_subset_of_terms_has_the_mean_of_all(scaling: str, importance: str) -> None:
    facts, oracle = process(-9.0, 5.0, scaling), Shrink(0.3)
    x = grey_images(1, 4).expand(200, 1, 4, 4)
    gammas = grid("rho", LinearGamma(-9.0, 5.0), 61)
    weights: Tensor | str = torch.linspace(3, 1, 60) if importance == "weights" else importance
    result = estimate("vlb_discrete", oracle, x, facts=facts, gammas=gammas, terms=12, importance=weights)
    ascending = gammas.flip(0)
    truth = float((0.5 * torch.expm1(ascending.diff()) * oracle.error(x[:1], ascending[1:])).sum())
    estimates = result.parts["steps"]
    assert abs(float(estimates.mean()) - truth) < 5 * float(estimates.std()) / math.sqrt(200)


def _field_image(side: int) -> Tensor:
    """One image of the field's deviation, on the pixel grid."""
    return (grey_images(1, side) * 0.25 * 128 + 0.5).floor() / 128 - 1 / 256


def test_a_tenth_of_the_work_gives_the_full_sum() -> None:
    """100 terms an image against all 1,000: the same number of bits/dim.

    An image's own error is 0.09 bits/dim then (0.03 with every term), over these 60 images 0.012.
    """
    oracle = gaussian_field(8)
    x = _field_image(8).expand(60, 1, 8, 8)
    full = estimate("vlb_discrete", oracle, x, steps=1001)
    part = estimate("vlb_discrete", oracle, x, seeds=range(100, 160), steps=1001, terms=100)
    assert int(full.evaluations[0]) == 10 * int(part.evaluations[0])
    gap = float((full.bits_per_dim - part.bits_per_dim).mean())
    errors = full.bits_per_dim_standard_error.square() + part.bits_per_dim_standard_error.square()
    error = float(errors.sum().sqrt()) / 60
    assert error < 0.015
    assert abs(gap) < 3 * error


def test_the_control_variate_keeps_the_mean_and_halves_the_error() -> None:
    oracle, x = gaussian_field(8), _field_image(8).expand(400, 1, 8, 8)
    plain = estimate("vlb", oracle, x, control=False).nats
    controlled = estimate("vlb", oracle, x).nats
    assert float(controlled.std()) < 0.6 * float(plain.std())
    assert abs(float((plain - controlled).mean())) < 4 * float((plain - controlled).std()) / math.sqrt(400)


def test_parts_sum_and_rows_do_not_matter() -> None:
    denoiser, x = small_denoiser(), grey_images(5, 8)
    labels = Conditioning(torch.arange(5))
    for name in ("vlb", "vlb_discrete", "ddim_bound"):
        options: dict[str, Any] = {"levels": 12} if name == "vlb" else {"steps": 40, "terms": 12}
        few = estimate(name, denoiser, x, conditioning=labels, rows=1, chunk=4, **options)
        many = estimate(name, denoiser, x, conditioning=labels, rows=1000, chunk=4, **options)
        torch.testing.assert_close(sum(few.parts.values()), few.nats)
        # the draws differ where levels are asked together; the order of an image's levels does not
        assert few.nats.shape == many.nats.shape == (5,)
        assert bool((few.evaluations == 12).all())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vlb", {"levels": 1}, "levels must be at least 2"),
        ("vlb", {"decoder": "gausian"}, "did you mean 'gaussian'"),
        ("vlb", {"decoder": "gaussian", "decoder_draws": 1}, "decoder_draws must be at least 2"),
        ("vlb", {"rows": 0}, "rows must be at least 1, got 0"),
        ("vlb_discrete", {"terms": 1}, "terms must be at least 2"),
        ("vlb_discrete", {"steps": 2}, "steps must be at least 3"),
        ("vlb_discrete", {"variance": "learned"}, "needs a network with a variance head"),
        ("vlb_discrete", {"variance": "fixed"}, "choose one of: posterior, beta, beta_throughout, learned"),
        ("vlb_discrete", {"gammas": torch.tensor([1.0, 2.0, 3.0])}, "strictly descending"),
        ("vlb_discrete", {"gammas": torch.tensor([4.0, 4.0, 3.0])}, "strictly descending"),
        ("vlb_discrete", {"gammas": torch.tensor([9.0, 2.0, 1.0])}, "9.0000..1.0000 leave"),
        ("vlb_discrete", {"terms": 4, "importance": torch.ones(3)}, "must be 999 positive weights"),
        ("vlb_discrete", {"terms": 4, "importance": "snr"}, "choose one of: uniform, gamma"),
        ("ddim_bound", {"eta": 0.0}, "eta must be positive"),
        ("ddim_bound", {"eta": -1.0}, "eta must be positive"),
        ("ddim_bound", {"eta": 3.0, "steps": 20}, "asks at step 1"),
    ],
)
def test_bad_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(name, Shrink(0.3), grey_images(2, 4), conditioning=NONE, **options)
