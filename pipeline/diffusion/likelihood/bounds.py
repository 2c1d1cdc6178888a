"""Variational bounds: prior, what each step loses, reconstruction.

Of every term, or of a random subset with its standard error.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.choose import choose
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Process
from pipeline.diffusion.likelihood.continuous import Continuous, gaussian_entropy
from pipeline.diffusion.likelihood.decoders import DECODERS, DecoderTask, Grid, expected_softmax, mix_log_variance
from pipeline.diffusion.likelihood.estimate import (
    Likelihood,
    Variance,
    check_input,
    mean_and_variance,
    repeat_rows,
    sum_parts,
)
from pipeline.diffusion.likelihood.series import Strata, Sum, controlled, series_variance
from pipeline.diffusion.procedure import Answer, Procedure, Query
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.rows import row_sum, shaped
from pipeline.diffusion.scaling import SCALINGS, prior_variance, step_variance

Importance = str | Tensor | Sequence[float]  # of the steps of a bound: a name, or positive weights, one a step

FEW_STEPS, REPEATS = 8, 4  # of a bound of fewer steps each is asked so often: neighbours tell no standard error there

# (answer, clean images (m, ...), what the level's row says (m, facts)) -> (m,) nats
Measure = Callable[[Answer, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Setting:
    """The images and what goes with them: index, their grey levels; rows, how many a query may have."""

    x: Tensor
    index: Tensor
    process: Process
    noise: Noise
    conditioning: Conditioning
    pixels: Grid
    rows: int
    repeats: int = 1  # times that each step of a bound is asked

    @property
    def dimensions(self) -> int:
        return self.x[0].numel()


def _measure_levels(setting: _Setting, facts: Tensor, measure: Measure) -> Procedure[tuple[Tensor, Tensor]]:
    """The measure at y_t = x + s_t eps, and |eps|^2, both (n, k).

    facts: (n, k, facts) of each image's own levels, gamma_t first.
    """
    x, (n, k) = setting.x, facts.shape[:2]
    together = max(1, setting.rows // n)
    values, squares = torch.empty_like(facts[..., 0]), torch.empty_like(facts[..., 0])
    for start in range(0, k, together):
        columns = slice(start, start + together)
        level = facts[:, columns].flatten(0, 1)
        m = len(level) // n
        eps = torch.empty(n, m, *x.shape[1:], dtype=torch.float64, device=x.device)
        for column in range(m):  # one by one: what a generator gives depends on how much is asked at once
            setting.noise.normal_(eps[:, column])
        eps, rows = eps.flatten(0, 1), repeat_rows(n, m, x)
        clean, gamma = x[rows], level[:, 0]
        answer = yield Query(clean + shaped(torch.exp(gamma / 2), eps) * eps, gamma, setting.conditioning[rows])
        value = measure(answer, clean, level)
        bad = ~torch.isfinite(value)
        if bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            raise ValueError(
                f"likelihood: not a finite number from the network for image {row // m} of the batch at level "
                f"{start + row % m}, gamma {float(gamma[row]):.4f}"
            )
        values[:, columns] = value.view(n, m)
        squares[:, columns] = row_sum(eps**2).view(n, m)
    return values, squares


def _reconstruction(
    setting: _Setting, gamma: float, decoder: str, draws: int, variance: str, log_variances: tuple[float, float]
) -> Procedure[tuple[Tensor, Variance, int]]:
    """E[-log p(u | y_0)] (n,) nats, the variance of its estimate, and the evaluations an image it took."""
    decode = choose(DECODERS, decoder, "decoder")
    x = setting.x
    s = math.exp(gamma / 2)
    if decoder == "softmax":
        if isinstance(setting.pixels, Continuous):
            value = torch.full_like(x.flatten(1)[:, 0], gaussian_entropy(setting.dimensions, gamma))
        else:
            value = expected_softmax(s, setting.index, setting.pixels)
        return value, Variance.known(torch.zeros_like(value)), 0
    if isinstance(setting.pixels, Continuous):  # beta, whatever the steps have: too narrow a density is dear
        log_variances = (log_variances[1], log_variances[1])
    values: list[Tensor] = []
    for _ in range(draws):
        y = x + s * setting.noise.normal_like(x)
        task = DecoderTask(y, gamma, setting.index, setting.conditioning, setting.pixels, log_variances, variance)
        values.append(-(yield from decode(task)))
    mean, spread = mean_and_variance(torch.stack(values, 1))
    return mean, spread, draws


def prior_term(x: Tensor, gamma: float, variance: float) -> Tensor:
    """(n,) nats: KL( N(x, s^2 I) || N(0, variance I) )."""
    ratio = math.exp(gamma) / variance
    return 0.5 * row_sum(x.double() ** 2 / variance + (ratio - 1 - math.log(ratio)))


def upper_log_variance(process: Process, gamma: float) -> float:
    """log beta of the last move, from gamma to s = 0: sigma^2, in model space."""
    alpha = SCALINGS[process.scaling](torch.tensor(gamma, dtype=torch.float64))
    return gamma + 2 * math.log(float(alpha))


def _finish(setting: _Setting, parts: dict[str, Tensor], variance: Variance, evaluations: int) -> Likelihood:
    x = setting.x
    count = torch.full((len(x),), evaluations, dtype=torch.int64, device=x.device)
    errors = {"noise": variance.value.sqrt()}
    return Likelihood(sum_parts(parts), parts, errors, count, setting.dimensions, freedom=variance.freedom)


def _setting(
    x: Tensor,
    process: Process,
    noise: Noise,
    conditioning: Conditioning,
    pixels: Grid,
    rows: int,
    draws: int,
) -> _Setting:
    check_input(x, noise, rows=rows)
    if draws < 2:
        raise ValueError(f"likelihood: decoder_draws must be at least 2, got {draws}: one gives no standard error")
    return _Setting(x.double(), pixels.index(x), process, noise, conditioning, pixels, rows)


# --- continuous time ----------------------------------------------------------------------------------------------


def _eps_error(answer: Answer, clean: Tensor, facts: Tensor) -> Tensor:
    """|eps - eps_hat|^2."""
    return row_sum(((answer.x_hat - clean) / shaped(torch.exp(facts[:, 0] / 2), clean)) ** 2)


def vlb(
    x: Tensor,
    process: Process,
    noise: Noise,
    conditioning: Conditioning,
    *,
    pixels: Grid,
    levels: int = 64,
    decoder: str = "softmax",
    decoder_draws: int = 4,
    control: bool = True,
    rows: int = 256,
) -> Procedure[Likelihood]:
    """The continuous bound: prior + 1/2 integral of E|eps - eps_hat|^2 d gamma + reconstruction.

    (Kingma et al. 2021, eq. 11 and 17.) Parts: 'prior', 'diffusion', 'reconstruction'.

    pixels: the grid of grey levels, or CONTINUOUS: x are latents, the value is that of their density, decoder
        'softmax' is N(x; y_0, s_0^2) (a constant) and 'gaussian' N(x; x_hat(y_0), beta of the last move).
    levels: network evaluations an image, one at a random place of each of as many equal parts of the range of gamma.
    decoder: 'softmax' (its expectation exactly) or 'gaussian' (`decoder_draws` more evaluations).
    control: take |eps|^2 - D, known in the mean, off the terms in proportion: the same expectation, half the error.
    rows: how many rows a query may have; where there are fewer images, several levels are asked at once.

    Raises:
        ValueError: pixels off the grid, levels or decoder_draws below 2, no finite number from the network.
    """
    setting = _setting(x, process, noise, conditioning, pixels, rows, decoder_draws)
    if levels < 2:
        raise ValueError(f"likelihood vlb: levels must be at least 2, got {levels}: one gives no standard error")
    low, high = process.gamma_min, process.gamma_max
    width = (high - low) / levels
    place = noise.uniform_(torch.empty(len(x), levels, dtype=torch.float64, device=x.device))
    gammas = low + width * (torch.arange(levels, device=x.device) + place)
    errors, squares = yield from _measure_levels(setting, gammas[..., None], _eps_error)
    weights = torch.full_like(errors, width / 2)
    terms = errors * weights
    if control:
        terms = controlled(terms, weights, squares, setting.dimensions)
    log_beta = upper_log_variance(process, low)
    decoding = _reconstruction(setting, low, decoder, decoder_draws, "beta", (log_beta, log_beta))
    reconstruction, variance, evaluations = yield from decoding
    prior = prior_term(setting.x, high, process.prior_variance)
    parts = {"prior": prior, "diffusion": row_sum(terms), "reconstruction": reconstruction}
    return _finish(setting, parts, series_variance(terms) + variance, levels + evaluations)


# --- discrete time ------------------------------------------------------------------------------------------------


def ancestral_steps(gamma_t: Tensor, gamma_s: Tensor, scaling: str) -> Tensor:
    """(steps, 4): gamma_t; 1 - r, by which q(y_s | y_t, x) moves from y_t to x; log beta-tilde; log beta."""
    move = -torch.expm1(gamma_s - gamma_t)
    log_beta = torch.log(step_variance(scaling, gamma_t, gamma_s))
    return torch.stack([gamma_t, move, gamma_s + torch.log(move), log_beta], 1)


def ddim_steps(gamma_t: Tensor, gamma_s: Tensor, eta: float) -> Tensor:
    """As `ancestral_steps`, of variance eta^2 beta-tilde in process and model (Song et al. 2020, eq. 7)."""
    loss = -torch.expm1(gamma_s - gamma_t)
    keep = torch.exp((gamma_s - gamma_t) / 2) * torch.sqrt(1 - eta**2 * loss)
    log_variance = gamma_s + torch.log(eta**2 * loss)
    return torch.stack([gamma_t, 1 - keep, log_variance, log_variance], 1)


def step_divergence(variance: str) -> Measure:
    """KL( q(y_s | y_t, x) || p(y_s | y_t) ), the model's mean having x_hat for x, its variance by name."""

    def measure(answer: Answer, clean: Tensor, facts: Tensor) -> Tensor:
        move, log_q, log_high = (shaped(facts[:, column], clean) for column in (1, 2, 3))
        log_p = mix_log_variance(variance, log_q, log_high, answer.variance)
        gap = (log_q - log_p).expand_as(clean)
        error = (move * (clean - answer.x_hat)) ** 2
        return 0.5 * row_sum(error * torch.exp(-log_p) + torch.expm1(gap) - gap)

    return measure


def _check_gammas(
    gammas: Tensor | Sequence[float] | None, process: Process, steps: int, spacing: str = "gamma"
) -> Tensor:
    """The levels, ascending."""
    low, high = process.gamma_min, process.gamma_max
    choose(dict.fromkeys(("gamma", "t")), spacing, "spacing")
    if spacing == "t":
        if gammas is not None or steps < 1:
            raise ValueError(f"likelihood: spacing 't' goes with steps of at least 1, got {steps}, and no gammas")
        law = process.time_law("spacing 't'")
        return law.gamma(torch.linspace(0, 1, steps + 1, dtype=torch.float64)).detach()
    if gammas is None:
        if steps < 3:
            raise ValueError(f"likelihood: steps must be at least 3, got {steps}")
        return torch.linspace(low, high, steps, dtype=torch.float64)
    ascending = torch.as_tensor(gammas, dtype=torch.float64).flip(0)
    if ascending.ndim != 1 or len(ascending) < 3 or not bool((ascending.diff() > 0).all()):
        raise ValueError("likelihood: gammas must be at least 3 levels, strictly descending from noise to data")
    slack = 1e-9 * (1 + max(abs(low), abs(high)))
    if float(ascending[0]) < low - slack or float(ascending[-1]) > high + slack:
        raise ValueError(
            f"likelihood: gammas {float(ascending[-1]):.4f}..{float(ascending[0]):.4f} leave [{low:.4f}, {high:.4f}], "
            f"the range this network was made for"
        )
    return ascending


def _probabilities(importance: Importance, gaps: Tensor) -> Tensor:
    """float64 (steps,), positive, sum 1."""
    if isinstance(importance, str):
        weights = choose({"uniform": torch.ones_like(gaps), "gamma": gaps}, importance, "importance")
    else:
        weights = torch.as_tensor(importance, dtype=torch.float64).to(gaps.device)
        if weights.shape != gaps.shape or not bool((weights > 0).all()) or not bool(torch.isfinite(weights).all()):
            raise ValueError(f"likelihood: importance must be {len(gaps)} positive weights, one a step")
    return weights / weights.sum()


def _pick_terms(setting: _Setting, gaps: Tensor, terms: int | None, importance: Importance) -> tuple[Tensor, Strata]:
    """Which steps each image is asked, (n, k), and out of which."""
    n = len(setting.x)
    if terms is None:
        every = Strata.every(len(gaps), setting.repeats, gaps)
        return every.steps[:, 0].expand(n, -1), every
    if terms < 2:
        raise ValueError(f"likelihood: terms must be at least 2, got {terms}: one gives no standard error")
    p = _probabilities(importance, gaps)
    place = setting.noise.uniform_(torch.empty(n, terms, dtype=torch.float64, device=gaps.device))
    stratum = (torch.arange(terms, device=gaps.device) + place) / terms
    chosen = torch.searchsorted(p.cumsum(0), stratum, right=True).clamp(max=len(gaps) - 1)
    return chosen, Strata.of(p, terms)


def _discrete(
    setting: _Setting,
    gammas: Tensor,
    steps: Tensor,
    terms: int | None,
    importance: Importance,
    decoder: str,
    decoder_draws: int,
    control: bool,
    variance: str,
) -> Procedure[Likelihood]:
    """gammas ascending, steps (len - 1, 4) of them; the last move, from gammas[0] to the image, is the decoder's."""
    gaps, steps = gammas.diff().to(setting.x.device), steps.to(setting.x.device)
    chosen, strata = _pick_terms(setting, gaps, terms, importance)
    measuring = _measure_levels(setting, steps[chosen], step_divergence(variance))
    values, squares = yield from measuring
    values, levels = values * strata.factor[chosen], gammas[1:].to(gaps.device)
    weights = strata.factor * 0.5 * torch.expm1(gaps)
    found = Sum(values, squares, chosen, strata, weights, levels, setting.dimensions, control)
    first, last = float(gammas[0]), float(gammas[-1])
    log_beta = upper_log_variance(setting.process, first)
    # beta-tilde of the last move is 0: the one before it stands in (Nichol & Dhariwal 2021)
    log_tilde = log_beta + math.log(-math.expm1(-float(gaps[0])))
    decoding = _reconstruction(setting, first, decoder, decoder_draws, variance, (log_tilde, log_beta))
    reconstruction, spread, evaluations = yield from decoding
    prior = prior_term(setting.x, last, prior_variance(setting.process.scaling, last))
    values = found.estimates()
    parts = {"prior": prior, "steps": row_sum(values), "reconstruction": reconstruction}
    repeated = terms is None and setting.repeats > 1
    sampled = _repeated(values, setting.repeats) if repeated else found.variance()
    return _finish(setting, parts, sampled + spread, values.shape[1] + evaluations)


def _repeated(values: Tensor, repeats: int) -> Variance:
    """Of the sum over steps of the means of each one's repeats; values (n, steps x repeats), divided by `repeats`."""
    steps = (repeats * values).view(len(values), -1, repeats).unbind(1)
    total = Variance.known(torch.zeros_like(values[:, 0]))
    for step in steps:
        total = total + mean_and_variance(step)[1]
    return total


def vlb_discrete(
    x: Tensor,
    process: Process,
    noise: Noise,
    conditioning: Conditioning,
    *,
    pixels: Grid,
    gammas: Tensor | Sequence[float] | None = None,
    steps: int = 1000,
    spacing: str = "gamma",
    variance: str = "posterior",
    terms: int | None = None,
    importance: Importance = "gamma",
    decoder: str = "softmax",
    decoder_draws: int = 4,
    control: bool = True,
    rows: int = 256,
) -> Procedure[Likelihood]:
    """The T-step bound: prior, a consistency term for each step, reconstruction (Ho et al. 2020, eq. 5).

    Parts: 'prior', 'steps', 'reconstruction'. With variance 'posterior' a step's term is
    expm1(gamma_t - gamma_s) / 2 x E|eps - eps_hat|^2 (Kingma et al. 2021, eq. 14).

    pixels: as in `vlb`.
    gammas: the levels, strictly descending as a sampler's grid; without it `steps` levels uniform in gamma.
    spacing: 't' for VDM's own bound of T = `steps` steps, i/T to (i - 1)/T in t for i = 1..T, from T = 1 on, whatever
        the law; each of fewer than 8 is asked 4 times.
    variance: 'posterior' (beta-tilde); 'beta', DDPM's fixed-large, whose Gaussian decoder has beta-tilde of the first
        step as the authors' code has; 'beta_throughout', with beta_1 there; or 'learned' (IDDPM's interpolation by the
        network's variance head).
    terms: evaluations an image, each at a step drawn by `importance` ('uniform', 'gamma': by the step's width, or
        positive weights, one a step, from noise-free to noise); None for every step.
    decoder: 'softmax' or 'gaussian' (DDPM's, of the model's variance, with `decoder_draws` more evaluations).
    control, rows: as in `vlb`. Published figures are of clipped x_hat, without which an eps-predicting network pays
         for its error times s where there is most noise.

    Raises:
        ValueError: pixels off the grid, gammas not descending or outside the network's range, too few of a count, no
            variance head where it is asked for, no finite number from the network.
    """
    setting = _setting(x, process, noise, conditioning, pixels, rows, decoder_draws)
    levels = _check_gammas(gammas, process, steps, spacing)
    if spacing == "t" and steps < FEW_STEPS:
        setting = replace(setting, repeats=REPEATS)
    table = ancestral_steps(levels[1:], levels[:-1], process.scaling)
    return (yield from _discrete(setting, levels, table, terms, importance, decoder, decoder_draws, control, variance))


def ddim_bound(
    x: Tensor,
    process: Process,
    noise: Noise,
    conditioning: Conditioning,
    *,
    pixels: Grid,
    eta: float = 1.0,
    gammas: Tensor | Sequence[float] | None = None,
    steps: int = 1000,
    terms: int | None = None,
    importance: Importance = "gamma",
    decoder: str = "softmax",
    decoder_draws: int = 4,
    control: bool = True,
    rows: int = 256,
) -> Procedure[Likelihood]:
    """The bound of DDIM's process of variance eta^2 beta-tilde at each step; at eta = 1 that of `vlb_discrete`.

    (Song et al. 2020, appendix B, with the mean's coefficient unsimplified.) Other arguments as in `vlb_discrete`.

    Raises:
        ValueError: as `vlb_discrete`; eta not positive (the bound is infinite), or so large that a step's variance
            exceeds the level it goes to (the step is named).
    """
    setting = _setting(x, process, noise, conditioning, pixels, rows, decoder_draws)
    levels = _check_gammas(gammas, process, steps)
    if not (0 < eta < math.inf):
        raise ValueError(f"likelihood ddim_bound: eta must be positive, got {eta:g}: without noise it is infinite")
    excess = eta**2 * -torch.expm1(-levels.diff()) > 1
    if bool(excess.any()):
        step = int(excess.nonzero()[0, 0]) + 1
        raise ValueError(
            f"likelihood ddim_bound: eta {eta:g} asks at step {step}, gamma {float(levels[step]):.4f} to "
            f"{float(levels[step - 1]):.4f}, for more variance than the level it goes to has: use a smaller eta"
        )
    table = ddim_steps(levels[1:], levels[:-1], eta)
    return (
        yield from _discrete(setting, levels, table, terms, importance, decoder, decoder_draws, control, "posterior")
    )
