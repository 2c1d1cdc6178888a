"""What the sources write of sampling, each formula written down here once more, against the option that is it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.denoiser import Prediction, Process
from pipeline.diffusion.formula import Formula
from pipeline.diffusion.likelihood.decoders import decoded_pixels, softmax_level
from pipeline.diffusion.pixels import PixelGrid
from pipeline.diffusion.procedure import Answer, drive
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.sampling.grids import grid, integer_grid
from pipeline.diffusion.sampling.samplers import SAMPLERS
from pipeline.diffusion.scaling import prior_variance
from pipeline.diffusion.schedule import VP, Cosine, LinearBeta, LinearGamma, Schedule, SubVP
from tests.diffusion.sampler_cases import NONE, PROCESS, affine_coefficients, gaussian_pixel, uniform_gamma

F64 = torch.float64


def process_of(law: Schedule, scaling: str = "vp") -> Process:
    return Process(scaling, law.gamma_min, law.gamma_max, prior_variance(scaling, law.gamma_max), law)


def coefficients(name: str, process: Process, gammas: Tensor, mean: float = 0.3, **options: Any) -> Any:
    """(constant, factor of the start, factors of the draws) on one pixel of N(mean, 0.25)."""

    def sample(y: Tensor, noise: Noise) -> Any:
        return SAMPLERS[name].start(process, y, gammas, noise, NONE, **options)

    return affine_coefficients(sample, gaussian_pixel(mean, 0.25))


# --- the family between the reverse SDE and the probability flow ------------------------------------------------------


def test_sde_with_any_sigma_of_t() -> None:
    """dx = [f - 1/2 (g^2 + sigma(t)^2) score] dt + sigma(t) dW, of y: f = 0, g^2 = d s^2/dt; Euler-Maruyama in s."""
    law = VP()
    process, gammas = process_of(law), grid("uniform_t", law, 9)
    t, s = torch.linspace(1, 0, 9, dtype=F64), torch.exp(gammas / 2)
    for text, sigma in (("t", t), ("sqrt(1 - t)", (1 - t).sqrt()), ("min(1, s / 10)", (s / 10).clamp(max=1))):
        mean, variance = 4.0, 0.0  # of y from a fixed start, through x_hat = y / 4 + ... of N(0.3, 0.25)
        for i in range(8):
            ds, v = s[i] - s[i + 1], 0.25 + s[i] ** 2
            score = -1 / v  # times y - mean of the data
            pull = float(0.5 * (2 * s[i] + 2 * s[i] * sigma[i] ** 2) * score * ds)
            mean += pull * (mean - 0.3)
            variance = (1 + pull) ** 2 * variance + float(2 * s[i] * sigma[i] ** 2 * ds)
        share = float(0.25 / (0.25 + s[-1] ** 2))
        constant, factor, draws = coefficients("sde", process, gammas, lam=text)
        assert constant + 4 * factor == pytest.approx(0.3 + share * (mean - 0.3), rel=1e-6), text
        assert float(draws.square().sum()) == pytest.approx(share**2 * variance, rel=1e-6), text
        _, _, listed = coefficients("sde", process, gammas, lam=sigma[:-1].tolist())
        assert float(listed.square().sum()) == pytest.approx(share**2 * variance, rel=1e-9), text


@pytest.mark.parametrize(
    ("lam", "message"),
    [
        ("tt", "'tt' is not allowed in it. A formula has numbers, the names t, gamma, s, pi, e"),
        ("-t", "must be finite and at least 0, and is -1 at t = 1"),
        ("1 / (t - 1)", "must be finite"),
        ("__import__('os')", "is not allowed"),
        ("200 * t", "at most 10, got 200 at step 0"),
        ([0.5], "one for each of the 3 moves, got 1"),
        (1e200, "at most 10"),
        (math.nan, "at least 0"),
    ],
)
def test_bad_lams_are_refused(lam: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(".", r"\.")):
        SAMPLERS["sde"].start(PROCESS, torch.zeros(1, 2, dtype=F64), uniform_gamma(4), Noise([0]), NONE, lam=lam)


@pytest.mark.parametrize(
    "text", ["gamma.real", "(lambda: 1)()", "[1]", "'a'", "True", "1e999", "", "exp(1, 2)", "1j", "\ud800", "(" * 199]
)
def test_a_formula_is_arithmetic_alone(text: str) -> None:
    with pytest.raises(ValueError, match="A formula has numbers"):
        Formula(text, ("gamma",), "weight")


def test_formulas_have_their_values() -> None:
    gamma = torch.tensor([-2.0, 0.5], dtype=F64)
    value = Formula("min(1, 5 * exp(gamma)) - gamma ** 2 / 2 + sigmoid(-gamma) * pi", ("gamma",), "weight")
    expected = [min(1, 5 * math.exp(g)) - g**2 / 2 + math.pi / (1 + math.exp(g)) for g in gamma.tolist()]
    assert value({"gamma": gamma}).tolist() == pytest.approx(expected, rel=1e-14)
    assert Formula("3", ("gamma",), "weight")({"gamma": gamma}).tolist() == [3, 3]


# --- DDIM's last move, integer steps ----------------------------------------------------------------------------------


def test_ddims_last_move_may_add_noise() -> None:
    """p(x_0 | x_1) = N(f(x_1), sigma_1^2): eta's formula has 0 there (Song et al. 2020, eq. 10)."""
    law = LinearBeta()
    process, gammas = process_of(law), grid("leading", law, 10)
    plain = coefficients("ddim", process, gammas)
    for sigma_1, expected in ((0.3, 0.3), ("beta", math.sqrt(1e-4))):  # beta_1 of the table
        constant, factor, draws = coefficients("ddim", process, gammas, sigma_1=sigma_1)
        assert (constant, factor) == plain[:2]
        assert draws.tolist() == pytest.approx([expected], rel=1e-9)
    for bad in (-0.1, 1.5, "alpha", math.nan):
        with pytest.raises(ValueError, match=r"sigma_1 must be within 0\.\.1 or 'beta'"):
            coefficients("ddim", process, gammas, sigma_1=bad)


def test_grids_at_integer_steps() -> None:
    """Karras et al. 2022, appendix C.3.4: argmin over the steps of |u_j - sigma|."""
    law = Cosine(100)
    u = torch.exp(law.table / 2)
    for name in ("rho", "uniform_gamma", "uniform_t"):
        gammas = grid(name, law, 12)
        expected = law.table[(u[None] - torch.exp(gammas / 2)[:, None]).abs().argmin(1)]
        assert torch.equal(integer_grid(gammas, law), expected.unique().flip(0)), name
    with pytest.raises(ValueError, match="which LinearGamma has not"):
        integer_grid(uniform_gamma(4), LinearGamma())


# --- Langevin ---------------------------------------------------------------------------------------------------------


def test_langevin_at_one_level_samples_its_law() -> None:
    """x + c score + sqrt(2 c) z at one gamma: the plain sample settles at v / (1 - c / (2 v)), v = 0.25 + s^2."""
    gamma, step = -2.0, 0.2
    total, c = 0.25 + math.exp(-2.0), 0.2 * math.exp(-2.0)
    options: dict[str, Any] = {"level": gamma, "step_size": step, "steps_per_level": 50}
    _, factor, draws = coefficients("langevin", PROCESS, uniform_gamma(4), finish="y", **options)
    assert abs(factor) < 1e-3
    assert float(draws.square().sum()) == pytest.approx(total / (1 - c / (2 * total)), rel=1e-5)
    _, _, denoised = coefficients("langevin", PROCESS, uniform_gamma(4), **options)
    assert torch.allclose(denoised, draws * 0.25 / total, rtol=1e-9)
    with pytest.raises(ValueError, match="is outside"):
        coefficients("langevin", PROCESS, uniform_gamma(4), level=6.0)
    with pytest.raises(ValueError, match="unknown finish 'z'"):
        coefficients("langevin", PROCESS, uniform_gamma(4), finish="z")


# --- predictor-corrector ----------------------------------------------------------------------------------------------


def published_deviation(predictor: str, sub_vp: bool, steps: int = 100) -> float:
    """The published loop on data N(0, 0.25), exact score, no corrector: deviation of the last mean, z_1 ~ N(0, 1)."""
    first, last, mean, variance = 0.1, 20.0, 1.0, 1.0  # mean: the variance before the last noise
    for index in range(steps):
        t = 1 + index * (1e-3 - 1) / (steps - 1)
        integral = first * t + t**2 * (last - first) / 2
        alpha2 = math.exp(-integral)
        score = -1 / (alpha2 * 0.25 + ((1 - alpha2) ** 2 if sub_vp else 1 - alpha2))
        place = int(t * (steps - 1) + 1e-9) / (steps - 1)  # index of the table of betas
        beta = (first + (t if sub_vp or predictor == "euler" else place) * (last - first)) / steps
        noise = beta * (1 - math.exp(-2 * integral)) if sub_vp else beta
        factor = {
            "euler": 1 + beta / 2 + noise * score,
            "reverse_diffusion": 1 + beta / 2 + noise * score if sub_vp else 2 - math.sqrt(1 - beta) + beta * score,
            "ancestral": (1 + beta * score) / math.sqrt(1 - beta),
        }[predictor]
        mean, variance = factor**2 * variance, factor**2 * variance + noise
    return math.sqrt(mean)


@pytest.mark.parametrize(
    ("predictor", "sde", "value"),
    [
        ("reverse_diffusion", "vp", 0.5061),
        ("ancestral", "vp", 0.4998),
        ("euler", "vp", 0.5030),
        ("reverse_diffusion", "subvp", 0.5050),
        ("euler", "subvp", 0.5050),
    ],
)
def test_predictors_are_the_published_ones(predictor: str, sde: str, value: float) -> None:
    law = SubVP(t_min=1e-3) if sde == "subvp" else VP(t_min=1e-3)
    process, gammas = process_of(law, sde), grid("uniform_t", law, 100)
    _, factor, draws = coefficients(
        "predictor_corrector", process, gammas, 0.0, predictor=predictor, sde=sde, corrector_steps=0
    )
    got = math.sqrt(factor**2 * process.prior_variance + float(draws.square().sum()))
    assert got == pytest.approx(published_deviation(predictor, sde == "subvp"), rel=1e-6)
    assert got == pytest.approx(value, abs=6e-5)


def test_ancestral_on_a_table_is_ddpm_with_variance_beta() -> None:
    """x_mean = (x + beta score) / sqrt(1 - beta) is DDPM's mean; every move but the last, which has the decoder's."""
    law = LinearBeta(20, 1e-3, 0.01)
    process, gammas = process_of(law), law.table.flip(0)
    y, x_hat = torch.full((1, 1), 1.7, dtype=F64), torch.full((1, 1), 0.2, dtype=F64)
    ours = SAMPLERS["predictor_corrector"].start(
        process, y.clone(), gammas, Noise([3]), NONE, sde="vp", predictor="ancestral", corrector_steps=0
    )
    other = SAMPLERS["ancestral"].start(process, y.clone(), gammas, Noise([3]), NONE, variance="beta")
    next(ours), next(other)
    for _ in range(19):
        assert torch.allclose(ours.send(Answer(x_hat)).y, other.send(Answer(x_hat)).y, rtol=1e-9)


def test_the_corrector_takes_alpha_of_the_sde() -> None:
    """e = 2 alpha (snr |z| / |score|)^2 in z, alpha = 1 - beta of the step."""
    law, snr = VP(t_min=1e-3), 0.16
    process, gammas = process_of(law), grid("uniform_t", law, 10)
    alpha = float(torch.rsqrt(1 + torch.exp(gammas[0])))
    sigma2 = 1 - alpha**2
    y = torch.tensor([[1.0, -2.0]], dtype=F64) / alpha
    x_hat, z = torch.tensor([[0.2, 0.1]], dtype=F64), alpha * y
    score, w = -(z - alpha * x_hat) / sigma2, Noise([5]).normal_like(y)
    options: dict[str, Any] = {"sde": "vp", "predictor": "euler", "snr": snr}
    with pytest.raises(ValueError, match=r"corrector needs steps of beta below 1, got 2: use more"):
        SAMPLERS["predictor_corrector"].start(process, y.clone(), gammas, Noise([5]), NONE, **options)
    gammas = grid("uniform_t", law, 100)
    beta = 20.0 / 100
    procedure = SAMPLERS["predictor_corrector"].start(process, y.clone(), gammas, Noise([5]), NONE, **options)
    next(procedure)
    e = 2 * (1 - beta) * (snr * w.norm() / score.norm()) ** 2
    expected = z + e * score + torch.sqrt(2 * e) * w
    assert torch.allclose(procedure.send(Answer(x_hat)).y * alpha, expected, rtol=1e-9)


def test_what_has_no_predictor_is_refused() -> None:
    law = SubVP()
    process, y = process_of(law, "subvp"), torch.zeros(1, 2, dtype=F64)
    for options, message in (
        ({"sde": "subvp", "predictor": "ancestral"}, "unknown predictor of the subvp SDE 'ancestral'"),
        ({"sde": "edm"}, "unknown sde 'edm'"),
        ({"sde": "vp"}, "needs steps of beta below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            SAMPLERS["predictor_corrector"].start(process, y, grid("uniform_t", law, 8), Noise([0]), NONE, **options)


# --- EDM's churn ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [False, True])
def test_churn_is_edms_algorithm_2(last: bool) -> None:
    """Written down from the paper, with S_churn 40: the mean's factor and the variance on N(0, 0.25)."""
    gammas = torch.linspace(math.log(80.0), math.log(0.02), 18, dtype=F64) * 2
    t = [*torch.exp(gammas / 2).tolist(), 0.0]
    rise = min(40 / 18, math.sqrt(2) - 1)

    def slope(sigma: float) -> float:
        return (1 - 0.25 / (0.25 + sigma**2)) / sigma  # d of N(0, 0.25), a factor of x

    factor, variance = 1.0, 0.0
    for i in range(18):
        raised = t[i] * (1 + (rise if i < 17 or last else 0.0))
        raised = min(raised, t[0])  # ours: never beyond the model's range
        variance += max(raised**2 - t[i] ** 2, 0)
        d = slope(raised)
        ahead = 1 + (t[i + 1] - raised) * d
        step = ahead if i == 17 else 1 + (t[i + 1] - raised) * (d + slope(t[i + 1]) * ahead) / 2
        factor, variance = factor * step, variance * step**2
    process = Process("ve", float(gammas[-1]), float(gammas[0]), 6400.0)
    _, got, draws = coefficients("heun", process, gammas, 0.0, churn=40.0, churn_last=last)
    assert got == pytest.approx(factor, rel=1e-9)
    assert float(draws.square().sum()) == pytest.approx(variance, rel=1e-9)


def test_churn_goes_to_integer_steps() -> None:
    law = LinearBeta()
    asked: list[float] = []

    def network(y: Tensor, gamma: Tensor, conditioning: Any, shared: object = None) -> Prediction:
        asked.append(float(gamma[0]))
        return Prediction(y * 0)

    process = Process("vp", law.gamma_min, law.gamma_max, 1.0, law, nodes=law.table)
    gammas = integer_grid(grid("rho", law, 10), law)
    y = torch.zeros(1, 2, dtype=F64)
    drive(SAMPLERS["heun"].start(process, y, gammas, Noise([0]), NONE, churn=2.0, churn_last=True), network)
    table = set(law.table.tolist())
    assert len(asked) == 19
    assert all(level in table for level in asked)


# --- VDM's p(x | z_0) -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [0.0013, 0.02, 0.3])
def test_pixels_drawn_from_the_decoder_have_its_law(s: float) -> None:
    """Kingma et al. 2021, section 3.2: frequencies of drawn levels against the softmax over all levels."""
    pixels, draws = PixelGrid(levels=16, first=-15 / 16, bin=1 / 8), 4000
    y = torch.tensor([-1.4, -0.2, 0.11, 0.94], dtype=F64)
    centres = pixels.first + pixels.bin * torch.arange(16, dtype=F64)
    p = torch.softmax(-0.5 * ((y[:, None] - centres) / s) ** 2, 1)
    noise = Noise([7])
    drawn = decoded_pixels(y.expand(1, draws, 4).clone(), s, pixels, noise)
    index = pixels.index(drawn)[0]
    found = torch.stack([torch.bincount(index[:, k], minlength=16) for k in range(4)]) / draws
    assert bool(((found - p).abs() <= 5 * (p * (1 - p) / draws).sqrt() + 3 / draws).all())
    mode = pixels.index(decoded_pixels(y[None], s, pixels, None))[0]
    assert torch.equal(mode, p.argmax(1))
    assert torch.allclose(softmax_level(y, s, mode, pixels)[0].exp(), p.max(1).values, rtol=1e-9)


def test_ancestral_ends_in_pixels_of_z_0() -> None:
    process, gammas, y = PROCESS, uniform_gamma(6), torch.randn(1, 8, dtype=F64)
    asked: list[float] = []

    def network(y: Tensor, gamma: Tensor, conditioning: Any, shared: object = None) -> Prediction:
        asked.append(float(gamma[0]))
        return Prediction(torch.full_like(y, 0.3))

    for finish in ("draw", "mode"):
        asked.clear()
        x = drive(SAMPLERS["ancestral"].start(process, y.clone(), gammas, Noise([1]), NONE, finish=finish), network)
        assert len(asked) == SAMPLERS["ancestral"].evaluations(6, finish=finish) == 5  # z_0 is not asked
        PixelGrid().index(x)  # grey levels, or it raises
        assert float((x - 0.3).abs().max()) < 6 * math.exp(-9 / 2)
    with pytest.raises(ValueError, match="at least 2 levels"):
        SAMPLERS["ancestral"].start(process, y, gammas[:1], Noise([1]), NONE, finish="draw")
    with pytest.raises(ValueError, match="unknown finish 'y'"):
        SAMPLERS["ancestral"].start(process, y, gammas, Noise([1]), NONE, finish="y")
