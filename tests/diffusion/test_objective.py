"""The regression objectives: draws, densities, weights, forms."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.conditioning import NO_LABEL, Conditioning
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.objectives.loss import (
    DENSITIES,
    WEIGHTS,
    binned,
    draw_noise,
    draw_uniform,
    drop_condition,
    noisy,
)
from pipeline.diffusion.objectives.objective import OBJECTIVES, EDMLoss, Loss, Simple, Weighted
from pipeline.diffusion.parameterization import PREDICTIONS, Parameterization
from pipeline.diffusion.rows import shaped
from pipeline.diffusion.scaling import SCALINGS
from pipeline.diffusion.schedule import EDM, Cosine, Flow, Geometric, LearnedGamma, LinearBeta, LinearGamma
from tests.diffusion.objective_cases import NONE, eps_error, gaussian_denoiser, key, on_grid

X = on_grid(256, std=0.4)
SQUARE = float(X.double().square().mean())
LAWS = {
    "linear_gamma": LinearGamma(-9.0, 5.0),
    "flow": Flow(-9.0, 5.0),
    "edm": EDM(math.exp(-4.5), math.exp(2.5)),
}


def mean_loss(objective: Weighted, denoiser: Denoiser, steps: int, x: Tensor = X) -> tuple[float, float]:
    """Mean over steps and its standard error."""
    with torch.no_grad():
        values = torch.stack([objective.loss(denoiser, x, NONE, key(step)).per_image.mean() for step in range(steps)])
    return float(values.mean()), float(values.std() / math.sqrt(steps))


# --- forms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", ["eps", "x", "v", "flow", "min_snr"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_every_prediction_gives_the_same_loss(scaling: str, weight: str) -> None:
    objective = Weighted(weight)
    losses = [
        objective.loss(gaussian_denoiser(0.3, prediction=p, scaling=scaling), X, NONE, key()).per_image
        for p in PREDICTIONS
    ]
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=3e-5, atol=0)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_weights_are_the_errors_of_what_they_name(prediction: str, scaling: str) -> None:
    """Against differences of whole images, formed from x_hat at levels where float32 bears it."""
    denoiser = gaussian_denoiser(0.3, LinearGamma(-5.0, 5.0), prediction, scaling)
    loss = Weighted().loss(denoiser, X, NONE, key())
    gamma, eps = loss.gamma, draw_noise(X, key()).double()
    x = X.double()
    x_hat = denoiser(noisy(X, gamma, eps.float()), gamma, NONE).x_hat.double()
    alpha, sigma = (shaped(v, x) for v in denoiser.parameterization.alpha_sigma(gamma))
    eps_hat = (x - x_hat) * alpha / sigma + eps
    s2, data_std = torch.exp(gamma), denoiser.parameterization.data_std

    def square(difference: Tensor) -> Tensor:
        return difference.square().flatten(1).mean(1)

    x_square = square(x_hat - x)
    expected = {
        "eps": square(eps_hat - eps),
        "x": x_square,
        "v": square(alpha * (eps_hat - eps) - sigma * (x_hat - x)),
        "flow": square((eps_hat - x_hat) - (eps - x)),
        "edm": (s2 + data_std**2) / (s2 * data_std**2) * x_square,
        "min_snr": torch.clamp(1 / s2, max=5.0) * x_square,
        "p2": square(eps_hat - eps) / (1 + 1 / s2),
        "elbo": 0.5 * 10 * square(eps_hat - eps),
    }
    a, b = (shaped(v, x) for v in denoiser.parameterization.row(gamma))
    expected["output"] = square(a * (x_hat - x) + b * (eps_hat - eps))
    assert set(expected) == set(WEIGHTS) - set(OWN)
    for weight, value in expected.items():
        ours = Weighted(weight).loss(denoiser, X, NONE, key()).per_image
        torch.testing.assert_close(ours, value, rtol=2e-4, atol=0, msg=lambda m, w=weight: f"weight {w}: {m}")


def test_no_cancellation_at_tiny_noise() -> None:
    """At s = 1.3e-3 float32 (y - x_hat) / s is lost in rounding; the loss of an eps network is not."""
    denoiser = gaussian_denoiser(0.3, LinearGamma(-13.3, -13.2))
    loss = Weighted().loss(denoiser, X, NONE, key())
    y = noisy(X, loss.gamma, draw_noise(X, key()))
    z = shaped(denoiser.parameterization.alpha_sigma(loss.gamma)[0], y) * y
    exact = denoiser.network(z, loss.gamma / 8, NONE) - draw_noise(X, key()).double()
    torch.testing.assert_close(loss.per_image, exact.square().flatten(1).mean(1), rtol=1e-5, atol=0)


# --- expected values ------------------------------------------------------------------------------


ROWS = [[-7, 1.0], [0, 3.0], [4, 0.5]]
OWN: dict[str, dict[str, Any]] = {"formula": {"formula": "sqrt(snr) + 2 * sigma ** 2"}, "table": {"table": ROWS}}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("density", ["schedule", "uniform_gamma", "log_normal"])
def test_expected_loss_is_the_quadrature(weight: str, density: str) -> None:
    denoiser = gaussian_denoiser(0.3, Flow(-7.0, 5.0))
    value, error = mean_loss(Weighted(weight, density, **OWN.get(weight, {})), denoiser, 12)
    gamma = torch.linspace(-7.0, 5.0, 4001, dtype=torch.float64)
    law = DENSITIES[density](denoiser.schedule, -1.2, 1.2)
    density_of = torch.zeros_like(gamma)  # by differences of the inverse law: independent of derivative()
    density_of[1:-1] = (law.time(gamma[2:]) - law.time(gamma[:-2])) / (gamma[2:] - gamma[:-2])  # pyright: ignore
    density_of[0], density_of[-1] = density_of[1], density_of[-2]
    s2 = torch.exp(gamma)
    alpha2 = torch.sigmoid(-gamma)
    multiplier = {
        "eps": torch.ones_like(gamma),
        "x": s2,
        "v": 1 / alpha2,
        "flow": (1 + s2.sqrt()) ** 2,
        "output": torch.ones_like(gamma),
        "edm": (s2 + 0.25) / 0.25,
        "min_snr": torch.clamp(5 * s2, max=1),
        "p2": 1 / (1 + 1 / s2),
        "elbo": 0.5 / density_of,
        "formula": torch.exp(-gamma / 2) + 2 * (1 - alpha2),
        "table": torch.where(gamma < 0, 1 + 2 * (gamma + 7) / 7, (3 - 2.5 * gamma / 4).clamp(min=0.5)),
    }[weight]
    expected = torch.trapezoid(multiplier * eps_error(gamma, 0.3, SQUARE) * density_of, gamma)
    assert abs(value - float(expected)) < 5 * error + 2e-4 * float(expected)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("density", ["schedule", "uniform_gamma", "log_normal"])
def test_elbo_weight_is_the_bound_whatever_the_density(law: str, density: str) -> None:
    """1/2 int c^2 / (c^2 + e^gamma) d gamma in closed form, for the exact network."""
    std = math.sqrt(SQUARE)
    value, error = mean_loss(Weighted("elbo", density), gaussian_denoiser(std, LAWS[law]), 12)
    low, high = -9.0, 5.0
    expected = 0.5 * ((high - math.log(SQUARE + math.exp(high))) - (low - math.log(SQUARE + math.exp(low))))
    assert error < 0.05 * expected
    assert abs(value - expected) < 5 * error


def test_simple_is_the_mean_over_the_table() -> None:
    schedule = LinearBeta(50)
    value, error = mean_loss(Simple(), gaussian_denoiser(0.3, schedule), 12)  # pyright: ignore[reportArgumentType]
    expected = float(eps_error(schedule.table, 0.3, SQUARE).mean())
    assert abs(value - expected) < 5 * error + 1e-4


def test_edm_levels_and_its_unit_target() -> None:
    """EDM's loss is the plain error of F; ln sigma has the asked mean and deviation."""
    denoiser = gaussian_denoiser(0.5, EDM(), "edm", "ve")
    loss = EDMLoss().loss(denoiser, X, NONE, key())
    output = Weighted("output", "log_normal").loss(denoiser, X, NONE, key())
    torch.testing.assert_close(loss.per_image, output.per_image, rtol=1e-6, atol=0)
    assert abs(float(loss.gamma.mean()) / 2 + 1.2) < 0.03
    assert abs(float(loss.gamma.std()) / 2 - 1.2) < 0.03


# --- draws ----------------------------------------------------------------------------------------


def test_stratified_levels_of_all_shards_are_one_even_comb() -> None:
    for shards, b in [(1, 48), (3, 16), (7, 5)]:
        u = torch.cat([draw_uniform(b, key(4, shard, shards), stratified=True) for shard in range(shards)])
        gaps = torch.sort(u).values.diff()
        torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / (shards * b)), rtol=0, atol=1e-12)
    offsets = torch.stack([draw_uniform(4, key(step), stratified=True)[0] for step in range(400)])
    assert abs(float(offsets.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / 400)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_shard_draws_the_same_alone_or_among_others(name: str) -> None:
    """Nothing but the key counts: not the order of shards, not other draws, not the global generator."""
    learned = name == "hybrid"
    schedule = LinearBeta(30) if name in ("hybrid", "discrete_vlb") else LinearGamma(-9.0, 5.0)
    denoiser = gaussian_denoiser(0.3, schedule, learned_variance=learned)
    objective = OBJECTIVES[name]()

    def run(shard: int, seed: int) -> Loss:
        torch.manual_seed(seed)
        return objective.loss(denoiser, X[shard * 8 : shard * 8 + 8], NONE, key(3, shard, 4))

    one = {shard: run(shard, 1) for shard in (0, 1, 2, 3)}
    two = {shard: run(shard, 2) for shard in (2, 0, 3, 1)}
    for shard in range(4):
        assert torch.equal(one[shard].per_image, two[shard].per_image)
        assert torch.equal(one[shard].gamma, two[shard].gamma)
    assert not torch.equal(draw_noise(X, key(3, 0, 4)), draw_noise(X, key(3, 1, 4)))
    assert not torch.equal(draw_noise(X, key(3, 0, 4)), draw_noise(X, key(4, 0, 4)))


def test_stratified_levels_reduce_the_variance() -> None:
    """Measured: 0.02 of the variance of independent levels in the batch mean of L_simple at batch 64."""
    denoiser = gaussian_denoiser(0.3)
    x = on_grid(64, 0.4, size=16)

    def variance(stratified: bool) -> float:
        with torch.no_grad():
            objective = Weighted(stratified=stratified)
            values = [objective.loss(denoiser, x, NONE, key(step)).per_image.mean() for step in range(200)]
        return float(torch.stack(values).var())

    assert variance(True) < 0.05 * variance(False)


def test_label_dropout() -> None:
    labels = Conditioning(torch.arange(10).repeat(1000))
    dropped = drop_condition(labels, 0.2, key(1)).label
    assert dropped is not None
    gone = dropped == NO_LABEL
    assert abs(float(gone.double().mean()) - 0.2) < 5 * math.sqrt(0.16 / 10_000)
    assert labels.label is not None
    assert torch.equal(dropped[~gone], labels.label[~gone])
    assert torch.equal(dropped, drop_condition(labels, 0.2, key(1)).label)  # pyright: ignore[reportArgumentType]
    assert not torch.equal(dropped, drop_condition(labels, 0.2, key(2)).label)  # pyright: ignore[reportArgumentType]
    assert drop_condition(NONE, 0.2, key()) is NONE
    with pytest.raises(ValueError, match="label_dropout"):
        drop_condition(labels, 1.5, key())


# --- the loss as a value --------------------------------------------------------------------------


def test_bins_of_levels() -> None:
    gamma = torch.tensor([-9.0, -8.0, -5.6, -5.4, 4.9, 5.0], dtype=torch.float64)
    values = torch.arange(1.0, 7.0, dtype=torch.float64)
    sums = binned(values, gamma, -9.0, 5.0, 4)
    assert sums.tolist() == [[6.0, 3.0], [4.0, 1.0], [0.0, 0.0], [11.0, 2.0]]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_backward_reaches_every_parameter(name: str) -> None:
    learned = name == "hybrid"
    schedule = LinearBeta(30) if name in ("hybrid", "discrete_vlb") else LinearGamma(-9.0, 5.0)
    denoiser = gaussian_denoiser(0.3, schedule, learned_variance=learned)
    loss = OBJECTIVES[name]().loss(denoiser, X[:8], NONE, key())
    assert loss.per_image.shape == loss.gamma.shape == (8,)
    assert loss.per_image.dtype == loss.gamma.dtype == torch.float64
    assert not loss.gamma.requires_grad
    assert all(part.shape == (8,) and not part.requires_grad for part in loss.parts.values())
    loss.per_image.mean().backward()
    for parameter_name, parameter in denoiser.named_parameters():
        if parameter_name != "network.head" or learned:
            assert parameter.grad is not None, parameter_name
            assert bool(torch.isfinite(parameter.grad).all())


# --- what a user may get wrong --------------------------------------------------------------------


def test_errors_name_what_to_do() -> None:
    with pytest.raises(ValueError, match="min_snr"):
        Weighted("minsnr")
    with pytest.raises(ValueError, match=r"objective\.density"):
        Weighted(density="lognormal")
    with pytest.raises(ValueError, match="p_std"):
        Weighted(p_std=0)
    with pytest.raises(ValueError, match="table"):
        Weighted(density="table").loss(gaussian_denoiser(0.3), X, NONE, key())
    with pytest.raises(ValueError, match="discrete_vlb"):
        Weighted("elbo", "table").loss(gaussian_denoiser(0.3, LinearBeta(30)), X, NONE, key())
    with pytest.raises(ValueError, match="learned schedule"):
        Simple().loss(gaussian_denoiser(0.3, LearnedGamma(hidden=4)), X, NONE, key())
    with pytest.raises(ValueError, match="hybrid"):
        Simple().loss(gaussian_denoiser(0.3, learned_variance=True), X, NONE, key())


def test_cosine_and_geometric_laws_train_too() -> None:
    for schedule, scaling in [(Cosine(1000, gamma_limit=25), "vp"), (Geometric(), "ve")]:
        denoiser = Denoiser(
            gaussian_denoiser(0.3, scaling=scaling).network,
            schedule,
            Parameterization("eps", scaling),
            level="log_sigma",
        )
        value, error = mean_loss(Simple(), denoiser, 8)  # pyright: ignore[reportArgumentType]
        nodes = schedule.table if isinstance(schedule, Cosine) else schedule.gamma(torch.linspace(0, 1, 2001).double())
        assert abs(value - float(eps_error(nodes, 0.3, SQUARE).mean())) < 5 * error + 1e-3
