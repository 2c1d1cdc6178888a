"""The bound over a table's steps against the published formulas, its sampling of steps, and IDDPM's hybrid."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from pipeline.diffusion.likelihood.estimators import ddim_bound, vlb_discrete
from pipeline.diffusion.objectives.discrete import DiscreteVLB, History, Hybrid, Terms, decoder_log_variances, steps_of
from pipeline.diffusion.objectives.loss import Loss, draw_noise, noisy, regress
from pipeline.diffusion.pixels import PixelGrid
from pipeline.diffusion.procedure import drive
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.rows import shaped
from pipeline.diffusion.scaling import SCALINGS
from pipeline.diffusion.schedule import Cosine, LinearBeta, LinearGamma
from tests.diffusion.objective_cases import NONE, eps_error, gaussian_denoiser, key, on_grid

X = on_grid(64, std=0.3)
SQUARE = float(X.double().square().mean())
TABLES = {"linear": LinearBeta(1000), "linear_25": LinearBeta(25), "cosine": Cosine(200)}


def published(schedule: LinearBeta | Cosine) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a_t, abar_t, abar_{t-1} and beta_tilde_t for t = 2..T, from the betas."""
    a = 1 - schedule.betas()
    abar = a.cumprod(0)
    tilde = (1 - a[1:]) * (1 - abar[:-1]) / (1 - abar[1:])
    return a[1:], abar[1:], abar[:-1], tilde


# --- weights of the papers ------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_ddpm_weights(name: str) -> None:
    """lambda_t of the eps-form, (1 - a)^2 / (2 sigma^2 a (1 - abar)), and of the x-form, for sigma^2 = beta-tilde."""
    schedule = TABLES[name]
    a, abar, before, tilde = published(schedule)
    steps = steps_of(schedule.table, "vp")
    eps_form = (1 - a) ** 2 / (2 * tilde * a * (1 - abar))
    torch.testing.assert_close(steps.weight[1:] / 2, eps_form, rtol=1e-8, atol=0)
    x_form = before * (1 - a) ** 2 / (2 * tilde * (1 - abar) ** 2)
    torch.testing.assert_close(steps.weight[1:] / 2 / torch.exp(schedule.table[1:]), x_form, rtol=1e-8, atol=0)
    snr_form = 0.5 * (before / (1 - before) - abar / (1 - abar))
    torch.testing.assert_close(x_form, snr_form, rtol=1e-8, atol=0)
    torch.testing.assert_close(torch.exp(steps.log_ratio[1:]), (1 - a) / tilde, rtol=1e-8, atol=0)


@pytest.mark.parametrize("eta", [0.2, 0.7, 1.0, 1.2])
def test_ddim_weights(eta: float) -> None:
    """(sqrt(abar_s) - c sqrt(abar_t))^2 (1 - abar_t) / (2 sigma^2 abar_t), c as below."""
    schedule = LinearBeta(1000)
    table = schedule.table[100:]  # eta beyond 1 asks too much of the first steps
    _, abar, before, tilde = (values[100:] for values in published(schedule))
    variance = eta**2 * tilde
    c = torch.sqrt((1 - before - variance) / (1 - abar))
    expected = (before.sqrt() - c * abar.sqrt()) ** 2 * (1 - abar) / (2 * variance * abar)
    torch.testing.assert_close(steps_of(table, "vp", eta).weight[1:] / 2, expected, rtol=1e-7, atol=0)


def test_decoder_variances_are_iddpms() -> None:
    low, high = decoder_log_variances(LinearBeta(1000).table, "vp")
    assert round(low, 4) == -9.8167
    assert round(high, 4) == -9.2103


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("variance", ["posterior", "beta", "learned"])
def test_terms_are_the_kl_between_gaussians(variance: str, scaling: str) -> None:
    """Each step's KL by torch.distributions, in coordinates z of the scaling, the posterior written with alphas."""
    schedule = LinearBeta(40)
    denoiser = gaussian_denoiser(0.2, schedule, scaling=scaling, learned_variance=True)
    index = torch.arange(len(X)) % 39 + 1
    gamma, eps = schedule.table[index], draw_noise(X, key())
    ours = Terms(variance).bits(denoiser, X, index, regress(denoiser, X, gamma, eps, NONE))

    alpha_of = SCALINGS[scaling]
    g_t, g_s = (shaped(g, X.double()) for g in (gamma, schedule.table[index - 1]))
    a_t, a_s = alpha_of(g_t), alpha_of(g_s)
    var_t, var_s = a_t**2 * torch.exp(g_t), a_s**2 * torch.exp(g_s)
    beta = var_t - (a_t / a_s) ** 2 * var_s
    tilde = beta * var_s / var_t
    y = noisy(X, gamma, eps)
    prediction = denoiser(y, gamma, NONE)
    z = a_t * y.double()

    def mean(x: Tensor) -> Tensor:
        return (a_t / a_s) * var_s / var_t * z + a_s * beta / var_t * x

    assert prediction.variance is not None
    mix = (prediction.variance.double() + 1) / 2
    learned = mix * beta.log() + (1 - mix) * tilde.log()
    log_variance = {"posterior": tilde.log(), "beta": beta.log(), "learned": learned}
    q = Normal(mean(X.double()), tilde.sqrt())
    p = Normal(mean(prediction.x_hat.double()), (log_variance[variance] / 2).exp().expand_as(z))
    expected = kl_divergence(q, p).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(ours, expected, rtol=2e-4, atol=1e-7)


def test_gaussian_decoder_is_a_probability() -> None:
    """Over all 256 levels of one pixel the masses of the decoder sum to 1, for fixed and learnt variance."""
    schedule = LinearBeta(1000)
    levels = ((2 * torch.arange(256) + 1) / 256 - 1).view(-1, 1, 1, 1).float()
    for learned in (False, True):
        denoiser = gaussian_denoiser(0.2, schedule, learned_variance=learned)
        eps = torch.zeros_like(levels)
        regression = regress(denoiser, levels, schedule.table[:1].expand(256), eps, NONE)
        mean = torch.full_like(levels, 0.1)  # the same x_hat, 0.1, whatever the level scored
        shifted = (mean - levels).double() / -math.exp(float(schedule.table[0]) / 2)
        head = None if regression.variance is None else torch.full_like(levels, 0.3)
        same = type(regression)(shifted, regression.error, regression.output, head)
        variance = "learned" if learned else "beta"
        bits = Terms(variance).bits(denoiser, levels, torch.zeros(256, dtype=torch.int64), same)
        assert float(torch.exp(-bits.detach() * math.log(2)).sum()) == pytest.approx(1, abs=1e-6)


# --- the whole bound ------------------------------------------------------------------------------


def every_step(objective: DiscreteVLB, denoiser: nn.Module, repeats: int) -> tuple[float, float]:
    with torch.no_grad():
        values = torch.stack(
            [objective.loss(denoiser, X, NONE, key(step)).per_image.mean() for step in range(repeats)]  # pyright: ignore
        )
    return float(values.mean()), float(values.std() / math.sqrt(repeats))


@pytest.mark.parametrize(
    ("variance", "decoder", "eta"),
    [
        ("posterior", "softmax", 1.0),
        ("beta", "gaussian", 1.0),
        ("learned", "gaussian", 1.0),
        ("posterior", "softmax", 0.6),
    ],
)
def test_the_mean_is_what_the_evaluator_finds_over_every_step(variance: str, decoder: str, eta: float) -> None:
    schedule = LinearBeta(40)
    denoiser = gaussian_denoiser(0.2, schedule, learned_variance=variance == "learned")
    value, error = every_step(DiscreteVLB(variance, eta, decoder), denoiser, 300)
    gammas = schedule.table.flip(0)
    noise = Noise(range(len(X)))
    if eta != 1:
        procedure = ddim_bound(X, denoiser.process, noise, NONE, pixels=PixelGrid(), eta=eta, gammas=gammas)
    else:
        procedure = vlb_discrete(
            X, denoiser.process, noise, NONE, pixels=PixelGrid(), gammas=gammas, variance=variance, decoder=decoder
        )
    likelihood = drive(procedure, denoiser)
    expected = float(likelihood.bits_per_dim.mean())
    expected_error = float(likelihood.bits_per_dim_standard_error.square().sum().sqrt()) / len(X)
    assert abs(value - expected) < 5 * math.hypot(error, expected_error)
    assert math.hypot(error, expected_error) < 0.03 * expected


# --- importance sampling --------------------------------------------------------------------------


def test_history_is_the_last_ten_losses() -> None:
    """Against lists, with batches that name a step many times."""
    generator = torch.Generator().manual_seed(0)
    history, lists = History.empty(7), [list[float]() for _ in range(7)]
    for _ in range(12):
        index = torch.randint(0, 7, (23,), generator=generator)
        loss = torch.rand(23, generator=generator, dtype=torch.float64)
        history = history.record(index, loss)
        for i, value in zip(index.tolist(), loss.tolist(), strict=True):
            lists[i].append(value)
    assert history.count.tolist() == [len(values) for values in lists]
    for i, values in enumerate(lists):
        assert sorted(history.losses[i].tolist()) == sorted(values[-10:])
    root = torch.tensor([math.sqrt(sum(v**2 for v in values[-10:]) / 10) for values in lists], dtype=torch.float64)
    torch.testing.assert_close(history.probabilities(0.01), 0.99 * root / root.sum() + 0.01 / 7)


def test_steps_are_uniform_until_every_one_has_ten() -> None:
    history = History.empty(3).record(torch.tensor([0] * 30 + [1] * 30 + [2] * 9), torch.arange(69.0))
    assert history.probabilities(0.001).tolist() == [1 / 3] * 3
    assert history.record(torch.tensor([2]), torch.ones(1)).probabilities(0.001).std() > 0


def warmed(denoiser: nn.Module, *, stratified: bool = True) -> DiscreteVLB:
    objective = DiscreteVLB(decoder="softmax", importance=True, stratified=stratified)
    step = 0
    while objective.memory.history is None or int(objective.memory.history.count.min()) < 10:
        with torch.no_grad():
            loss = objective.loss(denoiser, X, NONE, key(10_000 + step))  # pyright: ignore[reportArgumentType]
        assert loss.observed is not None
        objective.update(loss.observed)
        step += 1
    return objective


def test_importance_sampling_is_unbiased_and_has_less_variance() -> None:
    """Measured: 0.05 of the variance of uniform steps, with independent draws."""
    schedule = LinearBeta(30)
    denoiser = gaussian_denoiser(0.2, schedule)
    important = warmed(denoiser, stratified=False)
    value, error = every_step(important, denoiser, 300)
    _, uniform_error = every_step(DiscreteVLB(decoder="softmax", stratified=False), denoiser, 300)
    loss = important.loss(denoiser, X, NONE, key())
    steps = steps_of(schedule.table, "vp")
    terms = 0.5 * steps.weight[1:] * eps_error(schedule.table[1:], 0.2, SQUARE)
    decoder = Terms(decoder="softmax")
    index = torch.zeros(len(X), dtype=torch.int64)
    regression = regress(denoiser, X, schedule.table[index], draw_noise(X, key()), NONE)
    expected = float(terms.sum()) / math.log(2) + float(decoder.bits(denoiser, X, index, regression).mean().detach())
    expected += float(loss.parts["prior"].mean())
    assert abs(value - expected) < 5 * error
    assert error**2 < 0.2 * uniform_error**2


def test_memory_survives_a_checkpoint() -> None:
    denoiser = gaussian_denoiser(0.2, LinearBeta(30))
    objective = warmed(denoiser)
    state = {name: value.clone() for name, value in objective.state_dict().items()}
    other = DiscreteVLB(decoder="softmax", importance=True)
    other.load_state_dict(state)
    one, two = (o.loss(denoiser, X, NONE, key(5)) for o in (objective, other))
    assert torch.equal(one.per_image, two.per_image)
    fresh = DiscreteVLB(decoder="softmax", importance=True).loss(denoiser, X, NONE, key(5))
    assert not torch.equal(one.gamma, fresh.gamma)
    with pytest.raises(ValueError, match="losses"):
        other.load_state_dict({"count": state["count"]})
    with pytest.raises(ValueError, match="30 steps"):
        other.loss(gaussian_denoiser(0.2, LinearBeta(31)), X, NONE, key())


def test_memory_does_not_depend_on_the_workers() -> None:
    """The shards' observations joined in shard order give one history, however the shards were spread."""
    denoiser = gaussian_denoiser(0.2, LinearBeta(30))

    def run(order: list[int]) -> dict[str, Tensor]:
        objective = DiscreteVLB(importance=True)
        for step in range(40):
            losses: dict[int, Loss] = {}
            for shard in order:
                with torch.no_grad():
                    losses[shard] = objective.loss(denoiser, X[shard * 16 :][:16], NONE, key(step, shard, 4))
            objective.update(torch.cat([o for shard in range(4) if (o := losses[shard].observed) is not None]))
        return objective.state_dict()

    one, two = run([0, 1, 2, 3]), run([2, 0, 3, 1])
    assert int(one["count"].sum()) == 40 * 64
    assert all(torch.equal(one[name], two[name]) for name in one)


# --- hybrid ---------------------------------------------------------------------------------------


def test_hybrid_trains_the_mean_by_simple_and_the_variance_by_the_bound() -> None:
    schedule = LinearBeta(30)
    denoiser = gaussian_denoiser(0.2, schedule, learned_variance=True)

    def gradients(loss: Tensor) -> tuple[Tensor, Tensor]:
        scale, head = (dict(denoiser.network.named_parameters())[name] for name in ("scale", "head"))
        found = torch.autograd.grad(loss, [scale, head], allow_unused=True)
        return tuple(torch.zeros(1) if g is None else g for g in found)  # pyright: ignore[reportReturnType]

    loss = Hybrid(vlb_weight=0.01).loss(denoiser, X, NONE, key())
    mean, head = gradients(loss.per_image.mean())
    index = (loss.gamma[:, None] == schedule.table).long().argmax(1)
    regression = regress(denoiser, X, loss.gamma, draw_noise(X, key()), NONE)
    simple, _ = gradients(regression.error.mean())
    regression = regress(denoiser, X, loss.gamma, draw_noise(X, key()), NONE)
    bound_mean, bound_head = gradients(30 * Terms("learned").bits(denoiser, X, index, regression).mean())
    torch.testing.assert_close(mean, simple)
    torch.testing.assert_close(head, 0.01 * bound_head)
    assert float(bound_mean.abs()) > 0  # which the stop-gradient kept from the mean
    torch.testing.assert_close(loss.per_image.detach(), loss.parts["simple"] + 0.01 * loss.parts["steps"])


# --- what a user may get wrong --------------------------------------------------------------------


def test_errors_name_what_to_do() -> None:
    with pytest.raises(ValueError, match="step index 1 "):
        DiscreteVLB(eta=3.0).loss(gaussian_denoiser(0.2, LinearBeta(30)), X, NONE, key())
    for eta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="eta"):
            DiscreteVLB(eta=eta)
    with pytest.raises(ValueError, match="posterior"):
        DiscreteVLB("beta", eta=0.5)
    with pytest.raises(ValueError, match=r"objective\.variance"):
        DiscreteVLB("beta_tilde")
    with pytest.raises(ValueError, match="uniform"):
        DiscreteVLB(uniform=0)
    with pytest.raises(ValueError, match="discrete steps"):
        DiscreteVLB().loss(gaussian_denoiser(0.2, LinearGamma(-9.0, 5.0)), X, NONE, key())
    with pytest.raises(ValueError, match="variance head"):
        DiscreteVLB("learned").loss(gaussian_denoiser(0.2, LinearBeta(30)), X, NONE, key())
    with pytest.raises(ValueError, match="learned_variance"):
        Hybrid().loss(gaussian_denoiser(0.2, LinearBeta(30)), X, NONE, key())
