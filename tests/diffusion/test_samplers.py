"""Samplers as theorems: one map for every model, orders of convergence, moments in closed form, published values."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.diffusion.denoiser import INPUTS, LEVELS, Denoiser, Prediction
from pipeline.diffusion.guidance import Clip
from pipeline.diffusion.oracles.exact import gaussian, oracle_denoiser
from pipeline.diffusion.parameterization import PREDICTIONS, Parameterization
from pipeline.diffusion.procedure import Answer, drive
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.sampling.grids import explicit_grid, grid
from pipeline.diffusion.sampling.moves import ancestral_moves, ddim_moves, levels
from pipeline.diffusion.sampling.samplers import SAMPLERS, prior
from pipeline.diffusion.sampling.second_order import two_step_moves
from pipeline.diffusion.scaling import SCALINGS, prior_variance
from pipeline.diffusion.schedule import SCHEDULES, LearnedGamma, LinearBeta, LinearGamma
from tests.diffusion.sampler_cases import (
    DETERMINISTIC,
    FIXED,
    HIGH,
    LOW,
    NONE,
    PROCESS,
    VARIANTS,
    Process,
    affine_coefficients,
    correlated,
    gaussian_pixel,
    mixture,
    names,
    one_move,
    pairwise,
    slope,
    uniform_gamma,
)

F64 = torch.float64


def start(rows: int = 3, dimensions: int = 2, high: float = HIGH) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, dimensions, generator=generator, dtype=F64) * math.sqrt(1 + math.exp(high))


def run(name: str, denoiser: Any, gammas: Tensor, y: Tensor, process: Process = PROCESS, **options: Any) -> Tensor:
    """With noise of fixed seeds."""
    sampler = SAMPLERS[name]
    return drive(sampler.start(process, y.clone(), gammas, Noise(range(len(y))), NONE, **options), denoiser)


# --- 1. every model, one map ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=names)
def test_points_do_not_depend_on_prediction_or_scaling(name: str, options: dict[str, Any]) -> None:
    """The full square: prediction x scaling, one gamma grid, one start, the same noise."""
    schedule, gammas, y = LinearGamma(LOW, HIGH), uniform_gamma(8), start()
    expected = run(name, mixture(), gammas, y, **options)
    for prediction, scaling in itertools.product(PREDICTIONS, SCALINGS):
        denoiser = oracle_denoiser(mixture(), schedule, Parameterization(prediction, scaling))
        got = run(name, denoiser, gammas, y, **options)
        assert torch.allclose(got, expected, rtol=1e-9, atol=1e-9), (prediction, scaling)


def laws() -> dict[str, Any]:
    return {name: LearnedGamma(hidden=8) if name == "learned" else law() for name, law in SCHEDULES.items()}


def square_holds(schedule: Any, kind: tuple[str, str, str, str], name: str, options: dict[str, Any]) -> bool:
    """Whether a perfect network of this kind (scaling, prediction, level, input) gives the oracle's own points."""
    scaling, prediction, level, network_input = kind
    low, high = max(schedule.gamma_min, -14.0), schedule.gamma_max
    gammas, y = uniform_gamma(5, low, high), start(high=high)
    process = Process(scaling, schedule.gamma_min, schedule.gamma_max, prior_variance(scaling, high), schedule)
    parameterization = Parameterization(prediction, scaling)
    denoiser = oracle_denoiser(mixture(), schedule, parameterization, level=level, network_input=network_input)
    expected = run(name, mixture(), gammas, y, process, **options)
    # the inverse of a level's time law is exact to about 1e-9 in gamma
    return torch.allclose(run(name, denoiser, gammas, y, process, **options), expected, rtol=1e-6, atol=1e-6)


def test_a_pairwise_covering_of_the_square() -> None:
    """Every two of schedule, scaling, prediction, level, input and sampler meet; the whole of it is `slow`."""
    schedules, scalings, predictions = list(laws().items()), list(SCALINGS), list(PREDICTIONS)
    told, inputs = list(LEVELS), list(INPUTS)
    rows = pairwise(*map(len, (schedules, scalings, predictions, told, inputs, VARIANTS)))
    assert len(rows) < 1.5 * len(schedules) * len(VARIANTS)  # the least there could be, nearly
    for a, b, c, d, e, f in rows:
        kind = scalings[b], predictions[c], told[d], inputs[e]
        assert square_holds(schedules[a][1], kind, *VARIANTS[f]), (schedules[a][0], kind, VARIANTS[f])


def test_the_covering_covers() -> None:
    sizes = (4, 3, 2, 5)
    rows = pairwise(*sizes)
    for i, j in itertools.combinations(range(4), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(range(sizes[i]), range(sizes[j])))
    assert len(rows) < 30  # of 120


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("schedule_name", SCHEDULES)
def test_complete_square(schedule_name: str) -> None:
    """schedule x scaling x prediction x level x input x sampler."""
    schedule = laws()[schedule_name]
    for kind in itertools.product(SCALINGS, PREDICTIONS, LEVELS, INPUTS):
        for name, options in VARIANTS:
            assert square_holds(schedule, kind, name, options), (kind, name, options)


@pytest.mark.parametrize("schedule_name", SCHEDULES)
def test_every_schedule_and_level_answers_as_the_oracle(schedule_name: str) -> None:
    schedule = SCHEDULES[schedule_name]()
    gammas, y = grid("uniform_t", schedule, 6), start(high=schedule.gamma_max)
    process = Process("vp", schedule.gamma_min, schedule.gamma_max, prior_variance("vp", schedule.gamma_max))
    expected = run("heun", mixture(), gammas, y, process)
    for level, network_input in itertools.product(LEVELS, INPUTS):
        denoiser = oracle_denoiser(mixture(), schedule, Parameterization("v"), level=level, network_input=network_input)
        assert torch.allclose(run("heun", denoiser, gammas, y, process), expected, rtol=1e-7, atol=1e-7), level


# --- 2. orders of convergence -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("grid_name", ["uniform_gamma", "rho"])
@pytest.mark.parametrize("name", FIXED)
def test_converges_to_the_exact_map_at_the_declared_order(name: str, grid_name: str, schedule_name: str) -> None:
    schedule, oracle = SCHEDULES[schedule_name](), correlated()
    high = schedule.gamma_max
    process = Process("vp", schedule.gamma_min, high, prior_variance("vp", high))
    y = start(2, 3, high)
    end = oracle.flow(y, high, schedule.gamma_min)
    exact = oracle.denoise(end, torch.full((2,), schedule.gamma_min, dtype=F64))
    errors = [
        float((run(name, oracle, grid(grid_name, schedule, steps + 1), y, process) - exact).abs().max())
        for steps in (80, 160)
    ]
    assert abs(slope(errors) - SAMPLERS[name].order) < 0.15, errors


@pytest.mark.parametrize("name", FIXED)
def test_converges_on_curved_flows(name: str) -> None:
    exact = run("adaptive", mixture(), uniform_gamma(2), start(), tolerance=1e-11)
    errors = [float((run(name, mixture(), uniform_gamma(n + 1), start()) - exact).abs().max()) for n in (160, 320)]
    assert abs(slope(errors) - SAMPLERS[name].order) < 0.15, errors


MEAN, VARIANCE = 0.3, 0.2
WEAK: list[tuple[str, dict[str, Any], float]] = [
    ("ancestral", {}, 1.0),
    ("ancestral", {"variance": "beta"}, 1.0),
    ("ddim", {"eta": 0.6}, 0.36),
    ("ddim", {"eta": 1.0}, 1.0),
    ("euler_ancestral", {}, 1.0),
    ("euler_ancestral", {"eta": 0.5}, 0.25),
    ("sde", {}, 1.0),
    ("sde", {"lam": 0.4}, 0.16),
    ("dpmpp_2m_sde", {}, 1.0),
    ("dpmpp_2m_sde", {"eta": 0.3}, 0.3),
]


def reverse_moments(lam2: float, low: float, high: float) -> tuple[float, float]:
    """Factor of the start and variance of x_hat at `low` under the reverse SDE from a fixed start at `high`.

    Of x ~ N(m, v): y - m has the factor rho^((1 + lam^2) / 2) and the variance (v + s^2) (1 - rho^(lam^2)),
    rho = (v + s_low^2) / (v + s_high^2).
    """
    total = VARIANCE + math.exp(low)
    rho, share = total / (VARIANCE + math.exp(high)), VARIANCE / total
    return share * rho ** ((1 + lam2) / 2), share**2 * total * (1 - rho**lam2)


@pytest.mark.parametrize(("name", "options", "lam2"), WEAK, ids=names)
def test_moments_converge_at_the_declared_weak_order(name: str, options: dict[str, Any], lam2: float) -> None:
    """Mean and variance of the result are read off the sampler itself, which is affine on Gaussian data: no draws."""
    low, high = -6.0, 4.0
    process = Process("vp", low, high, prior_variance("vp", high))
    factor, variance = reverse_moments(lam2, low, high)
    errors: list[float] = []
    for steps in (40, 80, 160):
        gammas = uniform_gamma(steps + 1, low, high)

        def sample(y: Tensor, noise: Noise, gammas: Tensor = gammas) -> Any:
            return SAMPLERS[name].start(process, y, gammas, noise, NONE, **options)

        constant, slope_, draws = affine_coefficients(sample, gaussian_pixel(MEAN, VARIANCE))
        assert constant == pytest.approx(MEAN * (1 - slope_), abs=1e-12)  # the mean is a fixed point
        errors.append(max(abs(slope_ - factor), abs(float(draws.square().sum()) - variance)))
    assert abs(slope(errors) - SAMPLERS[name].order) < 0.15, errors


@pytest.mark.parametrize("churn", [1.0, 4.0])
def test_churn_keeps_the_marginals_at_second_order(churn: float) -> None:
    """Raising the noise and falling again both keep the law of y: from the exact start, so does all of it."""
    low, high = -6.0, 4.0
    process = Process("vp", low, high, prior_variance("vp", high))
    exact = VARIANCE**2 / (VARIANCE + math.exp(low))
    errors: list[float] = []
    for steps in (80, 160):
        gammas = uniform_gamma(steps + 1, low, high)

        def sample(y: Tensor, noise: Noise, gammas: Tensor = gammas) -> Any:
            return SAMPLERS["heun"].start(process, y, gammas, noise, NONE, churn=churn)

        _, factor, draws = affine_coefficients(sample, gaussian_pixel(MEAN, VARIANCE))
        assert len(draws) >= steps - 2  # noise was added, but for levels at the top of the range
        errors.append(abs(factor**2 * (VARIANCE + math.exp(high)) + float(draws.square().sum()) - exact))
    assert abs(slope(errors) - 2) < 0.15


def test_langevin_has_its_closed_form_bias() -> None:
    """At one level Langevin steps of e = step_size s^2 settle at variance v_s / (1 - e / (2 v_s)), v_s = v + s^2."""
    g, step = -1.0, 0.2
    total = VARIANCE + math.exp(g)

    def sample(y: Tensor, noise: Noise) -> Any:
        gammas = torch.tensor([g], dtype=F64)
        return SAMPLERS["langevin"].start(PROCESS, y, gammas, noise, NONE, step_size=step, steps_per_level=300)

    _, factor, draws = affine_coefficients(sample, gaussian_pixel(MEAN, VARIANCE))
    settled = total / (1 - step * math.exp(g) / (2 * total))
    assert abs(factor) < 1e-9
    assert float(draws.square().sum()) == pytest.approx((VARIANCE / total) ** 2 * settled, rel=1e-9)


# --- 3. one step in closed form, in the published coordinates ---------------------------------------------------------


def published_tables(steps: int = 1000) -> tuple[Tensor, Tensor]:
    """DDPM's betas and abar, computed here."""
    betas = torch.linspace(1e-4, 0.02, steps, dtype=F64)
    return betas, torch.cumprod(1 - betas, 0)


X_HAT, Y = 0.37, 1.9


def moved(name: str, gammas: Tensor, process: Process = PROCESS, **options: Any) -> tuple[float, float]:
    """Mean and deviation of y after one move from Y where the network answers X_HAT."""
    variance = options.pop("head", None)
    means: list[float] = []
    for rows in (1, 2):

        class Unit(Noise):
            def normal_(self, out: Tensor, value: float = rows - 1.0) -> Tensor:
                return out.fill_(value)

        y = torch.full((1, 1, 1, 1), Y, dtype=F64)
        head = None if variance is None else torch.full_like(y, variance)
        procedure = SAMPLERS[name].start(process, y, gammas, Unit([0]), NONE, **options)
        means.append(float(one_move(procedure, [Answer(torch.full_like(y, X_HAT), head)])))
    return means[0], means[1] - means[0]


@pytest.mark.parametrize("t", [1, 2, 10, 500, 999])
def test_ancestral_step_is_ddpms(t: int) -> None:
    """Posterior mean and both variances by DDPM's formulas in z, and IDDPM's interpolation between their logarithms."""
    betas, abar = published_tables()
    gammas = torch.stack([torch.log((1 - abar[i]) / abar[i]) for i in (t, t - 1)])
    process = Process("vp", -30.0, 30.0, 1.0)
    beta, a_t, a_s = betas[t], abar[t], abar[t - 1]
    mean = (a_s.sqrt() * beta * X_HAT + (1 - beta).sqrt() * (1 - a_s) * a_t.sqrt() * Y) / (1 - a_t)
    beta_tilde = beta * (1 - a_s) / (1 - a_t)
    for variance, expected in (("posterior", beta_tilde), ("beta", beta)):
        got_mean, got_deviation = moved("ancestral", gammas, process, variance=variance)
        assert got_mean == pytest.approx(float(mean / a_s.sqrt()), rel=1e-9)
        assert got_deviation == pytest.approx(float((expected / a_s).sqrt()), rel=1e-9)
    for v in (-1.0, 0.3, 1.0, 1.4):
        fraction = (v + 1) / 2
        log_variance = fraction * torch.log(beta) + (1 - fraction) * torch.log(beta_tilde)
        got_mean, got_deviation = moved("ancestral", gammas, process, variance="learned", head=v)
        assert got_mean == pytest.approx(float(mean / a_s.sqrt()), rel=1e-9)
        assert got_deviation == pytest.approx(float((log_variance.exp() / a_s).sqrt()), rel=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.004])
@pytest.mark.parametrize(("t", "s"), [(999, 979), (500, 100), (20, 0)])
def test_ddim_step_is_the_published_one(t: int, s: int, eta: float) -> None:
    """Song et al. 2020, eq. 12 and 16, in z."""
    _, abar = published_tables()
    a_t, a_s = abar[t], abar[s]
    eps = (a_t.sqrt() * Y - a_t.sqrt() * X_HAT) / (1 - a_t).sqrt()
    sigma = eta * ((1 - a_s) / (1 - a_t) * (1 - a_t / a_s)).sqrt()
    mean = a_s.sqrt() * X_HAT + (1 - a_s - sigma**2).sqrt() * eps
    gammas = torch.stack([torch.log((1 - a) / a) for a in (a_t, a_s)])
    got_mean, got_deviation = moved("ddim", gammas, Process("vp", -30.0, 30.0, 1.0), eta=eta)
    assert got_mean == pytest.approx(float(mean / a_s.sqrt()), rel=1e-9)
    assert got_deviation == pytest.approx(float(sigma / a_s.sqrt()), rel=1e-9, abs=1e-15)


def test_other_steps_in_closed_form() -> None:
    g_t, g_s = 1.0, -0.5
    gammas, s_t, s_s = torch.tensor([g_t, g_s], dtype=F64), math.exp(g_t / 2), math.exp(g_s / 2)
    slope_ = (Y - X_HAT) / s_t
    expected = {
        "euler": (Y + (s_s - s_t) * slope_, 0.0),
        "euler_ancestral": (
            Y + (s_s**2 / s_t - s_t) * slope_,  # s_down = s_s^2 / s_t
            math.sqrt(s_s**2 * (s_t**2 - s_s**2) / s_t**2),
        ),
        "sde": (Y + 2 * (s_s - s_t) * slope_, math.sqrt(2 * s_t * (s_t - s_s))),
        "dpmpp_2m": (s_s / s_t * Y + (1 - s_s / s_t) * X_HAT, 0.0),
        "dpmpp_2m_sde": ((s_s / s_t) ** 2 * Y + (1 - (s_s / s_t) ** 2) * X_HAT, s_s * math.sqrt(1 - (s_s / s_t) ** 2)),
    }
    for name, (mean, deviation) in expected.items():
        got = moved(name, gammas)
        assert got[0] == pytest.approx(mean, rel=1e-9), name
        assert got[1] == pytest.approx(deviation, rel=1e-9, abs=1e-15), name


def test_reverse_diffusion_and_corrector_steps_in_closed_form() -> None:
    g_t, g_s, snr = 1.0, -0.5, 0.16
    gammas, v_t, v_s = torch.tensor([g_t, g_s], dtype=F64), math.exp(g_t), math.exp(g_s)
    mean, deviation = moved("predictor_corrector", gammas, corrector_steps=0)
    assert mean == pytest.approx(Y + (v_t - v_s) * (X_HAT - Y) / v_t, rel=1e-9)
    assert deviation == pytest.approx(math.sqrt(v_t - v_s), rel=1e-9)
    # a corrector step: e = 2 (snr |z| / |score|)^2, each image by its own norms
    y = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=F64)
    x_hat = torch.tensor([[0.2, 0.1], [0.0, -0.4]], dtype=F64)
    z = Noise([5, 6]).normal_like(y)
    score = (x_hat - y) / v_t
    e = 2 * (snr * z.norm(dim=1, keepdim=True) / score.norm(dim=1, keepdim=True)) ** 2
    procedure = SAMPLERS["predictor_corrector"].start(PROCESS, y.clone(), gammas, Noise([5, 6]), NONE, snr=snr)
    assert torch.allclose(one_move(procedure, [Answer(x_hat)]), y + e * score + torch.sqrt(2 * e) * z, rtol=1e-12)


def test_ddim_at_eta_one_is_ancestral_on_any_subsequence() -> None:
    schedule = LinearBeta()
    for gammas in (schedule.table.flip(0), explicit_grid(schedule, [0, 3, 17, 18, 400, 999])):
        one, other = ddim_moves(gammas.tolist(), 1.0), ancestral_moves(gammas.tolist())
        for a, b in zip(one, other, strict=True):
            assert a == pytest.approx(b, rel=1e-9)


# --- 4. a drawn check -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if sampler.stochastic])
def test_drawn_samples_have_the_moments(name: str) -> None:
    """|z| < 5 for mean and variance of 4,096 drawn images of 64 pixels, against the closed form of the same steps."""
    low, high, steps = -6.0, 4.0, 12
    process, gammas = Process("ve", low, high, math.exp(high)), uniform_gamma(12, low, high)
    variance = 0.2
    oracle = gaussian([0.0] * 64, [variance] * 64)
    noise = Noise(range(64))
    samples = drive(
        SAMPLERS[name].start(process, prior(process, (64, 64), noise, dtype=F64), gammas, noise, NONE), oracle
    ).flatten()
    if (
        name == "predictor_corrector"
    ):  # its corrector is not affine; in 64 dimensions e is 2 snr^2 (v + s^2)^2 / s^2... nearly
        expected = float(samples.square().mean())
        assert abs(expected - variance) < 0.1
    else:

        def sample(y: Tensor, impulses: Noise) -> Any:
            return SAMPLERS[name].start(process, y, gammas, impulses, NONE)

        _, factor, draws = affine_coefficients(sample, gaussian_pixel(0.0, variance))
        expected = factor**2 * process.prior_variance + float(draws.square().sum())
    count = len(samples)
    assert steps == len(gammas)
    assert abs(float(samples.mean())) < 5 * math.sqrt(expected / count)
    assert abs(float(samples.square().mean()) - expected) < 5 * expected * math.sqrt(2 / count)


# --- 5. published values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "steps", "value"),
    [
        *(("heun", n, v) for n, v in zip((10, 18, 40, 100), (0.609798, 0.527625, 0.504877, 0.500720), strict=True)),
        *(("euler", n, v) for n, v in zip((10, 18, 40, 100), (0.365213, 0.423031, 0.464851, 0.485838), strict=True)),
        ("dpmpp_2m", 18, 0.531140),
    ],
)
def test_edm_and_k_diffusion_values_on_the_gaussian_oracle(name: str, steps: int, value: float) -> None:
    """x ~ N(0, 0.5^2), rho = 7 from 80 to 0.002, x_T = 80: EDM's and k-diffusion's own code gave these."""
    schedule = SCHEDULES["edm"]()
    denoiser = oracle_denoiser(
        gaussian([0.0], [0.25]),
        schedule,
        Parameterization("edm", "ve"),
        level="log_sigma",
        network_input="unit_variance",
    )
    got = run(name, denoiser, grid("rho", schedule, steps), torch.full((1, 1), 80.0, dtype=F64), denoiser.process)
    assert float(got) == pytest.approx(value, abs=6e-7)


@pytest.mark.parametrize(("steps", "value"), [(10, 0.3741), (20, 0.4337), (50, 0.4724), (100, 0.4860)])
def test_ddim_leading_values(steps: int, value: float) -> None:
    """Deviation of samples of x ~ N(0, 0.5^2), linear betas, eta 0, z_T ~ N(0, 1): diffusers' own code gave these."""
    schedule = LinearBeta()
    denoiser = oracle_denoiser(gaussian([0.0], [0.25]), schedule, Parameterization("eps"), level="step_index")
    gammas = grid("leading", schedule, steps)
    first = float(gammas[0])
    one = torch.full((1, 1), math.sqrt(prior_variance("vp", first)), dtype=F64)  # z = 1 at the first level
    assert float(run("ddim", denoiser, gammas, one, denoiser.process)) == pytest.approx(value, abs=6e-5)


# --- 6. cost ----------------------------------------------------------------------------------------------------------


class Count(TorchDispatchMode):
    """Counts reads by the host and random draws."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.host, self.random = 0, 0
        for name in ("tolist", "cpu", "numpy"):  # not seen by the dispatcher, on a CPU
            monkeypatch.setattr(torch.Tensor, name, self._counted(getattr(torch.Tensor, name)))

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Tensor, *args: Any) -> Any:
            self.host += 1
            return method(tensor, *args)

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        called = str(func)
        self.host += any(word in called for word in ("_local_scalar_dense", "nonzero", "item"))
        self.random += any(word in called for word in ("normal", "rand", "uniform", "bernoulli"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=names)
def test_no_wait_for_the_device_and_no_unused_noise(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one `.item()` in a step of any grid sampler; a draw only for a move that adds noise."""
    steps, rows = 7, 3
    y, x_hat = start(rows), torch.zeros(rows, 2, dtype=F64)
    procedure = SAMPLERS[name].start(PROCESS, y, uniform_gamma(steps), Noise(range(rows)), NONE, **options)
    queries = 0
    with Count(monkeypatch) as count:
        try:
            next(procedure)
            while True:
                queries += 1
                procedure.send(Answer(x_hat))
        except StopIteration:
            pass
    if name == "adaptive":
        assert count.host == (queries - 1) / 6  # the counter counts: who has arrived is asked once a step
        assert count.random == 0
        return
    assert count.host == 0
    assert queries == SAMPLERS[name].evaluations(steps, **options)
    draws = {
        "langevin": steps * 5,
        "predictor_corrector": steps * options.get("corrector_steps", 1)
        + (0 if options.get("predictor") == "euler" and "sde" not in options else steps - 1),
        # the first level is the top of the range, where churn has no room
        "heun": steps - 2 + ("churn_last" in options) if "churn" in options else 0,
        "ddim": (steps - 1 if options.get("eta") else 0) + ("sigma_1" in options),
    }.get(name, steps - 1 if SAMPLERS[name].stochastic else 0)
    assert count.random == draws * rows


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "heun", "ancestral", "sde", "predictor_corrector"])
def test_the_driver_looks_at_the_device_once_for_all_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With decoding and the watch for NaN: as many reads by the host for 24 steps as for 6."""

    class Net(torch.nn.Module):
        def forward(self, z: Tensor, level: Tensor, conditioning: Any) -> Tensor:
            return torch.tanh(z)

    denoiser = Denoiser(Net(), LinearGamma(-9.0, 3.0), Parameterization("v"))

    def reads(steps: int) -> int:
        gammas = grid("uniform_gamma", denoiser.schedule, steps)
        procedure = SAMPLERS[name].start(denoiser.process, torch.randn(3, 4), gammas, Noise(range(3)), NONE)
        with monkeypatch.context() as patch, Count(patch) as count:
            drive(procedure, denoiser)
        return count.host

    for steps in (6, 24):
        reads(steps)  # coefficients, of numbers on the host, are computed once a level and kept
        assert reads(steps) == 1


def test_shared_levels_do_not_change_the_answer() -> None:
    """The fast path where a batch shares its level: equal to the row-wise one up to rounding of float32."""
    schedule = LinearBeta()
    network = torch.nn.Conv2d(3, 3, 3, padding=1)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, z: Tensor, level: Tensor, conditioning: Any) -> Tensor:
            return self.inner(z) * torch.cos(level / 300).view(-1, 1, 1, 1)

    for prediction, scaling in itertools.product(PREDICTIONS, SCALINGS):
        denoiser = Denoiser(Net(), schedule, Parameterization(prediction, scaling), level="step_index")
        for g in (schedule.gamma_min, -3.0, 2.0, schedule.gamma_max):
            y = torch.randn(4, 3, 8, 8) * math.sqrt(1 + math.exp(g))
            rows = torch.full((4,), g, dtype=F64)
            with torch.no_grad():
                slow, fast = denoiser(y, rows, NONE).x_hat, denoiser(y, rows, NONE, g).x_hat
            assert torch.allclose(slow, fast, rtol=1e-4, atol=1e-5 * float(slow.abs().max())), (prediction, scaling, g)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    """Bit-equal in batches of 1, 7 and 64 where the network is called on chunks of one size."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 12, generator=generator) / 4

    def network(y: Tensor, gamma: Tensor, conditioning: Any, shared: object = None) -> Prediction:
        s = torch.exp(gamma / 2).float().view(-1, 1)
        return Prediction(torch.tanh((y / torch.sqrt(1 + s**2)) @ weight))

    process, results = Process("vp", -6.0, 4.0, 1 + math.exp(4.0)), []
    for size in (1, 7, 64):
        parts: list[Tensor] = []
        for first in range(0, 64 if size == 64 else 14, size):
            seeds = range(first, first + size)
            noise = Noise(seeds)
            y = prior(process, (size, 12), noise)
            parts.append(
                drive(SAMPLERS[name].start(process, y, uniform_gamma(6, -6, 4), noise, NONE), network, chunk=8)
            )
        results.append(torch.cat(parts)[:14])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# --- 7. options and bad input -----------------------------------------------------------------------------------------


def test_clip_limits_every_answer() -> None:
    """A network that answers 3 everywhere, clipped to 1, samples as one that answers 1."""

    def network(value: float) -> Any:
        return lambda y, gamma, conditioning, shared=None: Prediction(torch.full_like(y, value))

    for name, options in VARIANTS:
        y, gammas = start(), uniform_gamma(5)
        clipped = run(name, network(3.0), gammas, y, clip=1.0, **options)
        assert torch.equal(clipped, run(name, network(1.0), gammas, y, **options)), name


def test_dynamic_clip_scales_by_the_images_percentile() -> None:
    x_hat = torch.tensor([[0.1, -0.4, 3.0, -2.0], [0.1, 0.2, -0.3, 0.4]], dtype=F64)
    got = Clip(1.0, percentile=1.0)(x_hat)
    assert torch.allclose(got, torch.stack([x_hat[0] / 3, x_hat[1]]))
    two_thirds = Clip(1.0, percentile=2 / 3)(x_hat)  # the third of four sizes, 2
    assert torch.allclose(two_thirds[0], x_hat[0].clamp(-2, 2) / 2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_grids_outside_the_trained_range_are_refused(name: str) -> None:
    for gammas in (uniform_gamma(4, LOW, HIGH + 0.1), uniform_gamma(4, LOW - 0.1, HIGH)):
        with pytest.raises(ValueError, match=r"is outside .*-9\.0000, 5\.0000"):
            SAMPLERS[name].start(PROCESS, start(), gammas, Noise(range(3)), NONE)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("gammas", "message"),
    [
        ([1.0, 2.0, 0.0], "strictly descending, got 1, then 2 at step 1"),
        ([1.0, 1.0], "strictly descending"),
        ([], "at least one level"),
        ([[1.0, 0.0]], "at least one level"),
        ([1.0, math.nan], "is outside"),
    ],
)
def test_bad_grids_are_refused(name: str, gammas: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAMPLERS[name].start(PROCESS, start(), torch.tensor(gammas, dtype=F64), Noise(range(3)), NONE)


def test_float32_is_refused_below_what_it_can_carry() -> None:
    process = Process("vp", -20.0, 5.0, 1.0)
    with pytest.raises(ValueError, match="start in float64"):
        SAMPLERS["ddim"].start(process, start().float(), uniform_gamma(4, -19), Noise(range(3)), NONE)
    with pytest.raises(ValueError, match=r"beyond y in torch\.float32"):
        SAMPLERS["adaptive"].start(PROCESS, start().float(), uniform_gamma(2), Noise(range(3)), NONE, tolerance=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddim", {"eta": -0.1}, "eta at step 0 must be at least 0"),
        ("ddim", {"eta": 1e6}, r"eta 1e\+06 is too large at step 0 .*at most"),
        ("ddim", {"eta": [0.0, 0.0, 9.0]}, "eta 9 is too large at step 2"),
        ("ddim", {"eta": [0.0, 1.0]}, "one for each of the 3 moves, got 2"),
        ("euler_ancestral", {"eta": -1.0}, "eta must be at least 0"),
        ("dpmpp_2m_sde", {"eta": math.nan}, "eta must be at least 0 and finite"),
        ("sde", {"lam": -1.0}, "lam must be at least 0"),
        ("heun", {"churn": -1.0}, "churn must be at least 0"),
        ("ancestral", {"variance": "betas"}, "variance must be 'posterior', 'beta' or 'learned'"),
        ("langevin", {"step_size": 2.5}, "step_size must be above 0 and below 2"),
        ("langevin", {"steps_per_level": 0}, "steps_per_level must be at least 1"),
        ("predictor_corrector", {"snr": 0.0}, "snr must be above 0"),
        ("predictor_corrector", {"corrector_steps": -1}, "corrector_steps must be at least 0"),
        ("predictor_corrector", {"predictor": "eulr"}, "did you mean 'euler'"),
        ("adaptive", {"tolerance": 0.0}, "tolerance must be above 0"),
        ("adaptive", {"solver": "rk4"}, "unknown solver 'rk4'"),
        ("ddim", {"clip": -1.0}, "clip must be above 0"),
        ("ddim", {"lam": 1.0}, "no option 'lam'; it has: eta, sigma_1, clip"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAMPLERS[name].start(PROCESS, start(), uniform_gamma(4), Noise(range(3)), NONE, **options)


def test_beta_needs_the_models_scaling() -> None:
    with pytest.raises(ValueError, match="give process="):
        SAMPLERS["ancestral"].procedure(start(), uniform_gamma(4), Noise(range(3)), NONE, variance="beta")


def test_learned_variance_needs_a_head() -> None:
    with pytest.raises(ValueError, match="needs a network with learned variance"):
        run("ancestral", mixture(), uniform_gamma(4), start(), variance="learned")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", SAMPLERS)
def test_an_answer_that_is_not_finite_is_named(name: str, bad: float) -> None:
    """The network breaks for image 1 from its third call on."""
    calls: list[float] = []
    oracle = mixture()

    def network(y: Tensor, gamma: Tensor, conditioning: Any, shared: object = None) -> Prediction:
        calls.append(float(gamma[min(1, len(gamma) - 1)]))
        x_hat = oracle.denoise(y, gamma)
        if len(calls) >= 3:
            x_hat[1, 0] = bad
        return Prediction(x_hat)

    message = "image 1, after" if name == "adaptive" else r"query 2 of \d+ \(gamma .*image 1"
    with pytest.raises(ValueError, match=message) as error:
        run(name, network, uniform_gamma(6), start())
    assert name == "adaptive" or f"gamma {calls[2]:.4f}" in str(error.value)


def test_adaptive_gives_up_where_it_must() -> None:
    with pytest.raises(ValueError, match=r"image 0 is at gamma .* after 13 evaluations"):
        run("adaptive", mixture(), uniform_gamma(2), start(), max_evaluations=13)


def test_prior_has_the_models_variance() -> None:
    for scaling in SCALINGS:
        process = Process(scaling, -9.0, 3.0, prior_variance(scaling, 3.0))
        y = prior(process, (64, 500), Noise(range(64)), dtype=F64)
        assert float(y.square().mean()) == pytest.approx(process.prior_variance, rel=5 * math.sqrt(2 / y.numel()))
        lower = prior(process, (64, 500), Noise(range(64)), gamma=1.0, dtype=F64)
        ratio = prior_variance(scaling, 1.0) / process.prior_variance
        assert torch.allclose(lower, y * math.sqrt(ratio), rtol=1e-12)
        alpha = float(SCALINGS[scaling](torch.tensor(1.0, dtype=F64)))
        assert prior_variance(scaling, 1.0) == pytest.approx(math.e if scaling == "ve" else alpha**-2)


def test_table_is_complete() -> None:
    assert set(DETERMINISTIC) == {"ddim", "euler", "heun", "dpmpp_2m", "adaptive"}
    for name, sampler in SAMPLERS.items():
        assert sampler.evaluations(10) >= 10, name
        assert "clip" in sampler.options, name
        assert "process" not in sampler.options, name
    assert two_step_moves(levels(uniform_gamma(3), start()))[0].c == 0
