"""Prediction types: rows, their inverse, and which pairs are refused."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.denoiser import INPUTS, LEVELS
from pipeline.diffusion.parameterization import PREDICTIONS, Parameterization
from pipeline.diffusion.scaling import SCALINGS
from pipeline.diffusion.schedule import SCHEDULES, Flow, LearnedGamma, LinearGamma, Schedule

F64 = torch.float64
PAIRS = list(itertools.product(PREDICTIONS, SCALINGS))


def draws(count: int = 2000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gamma, x, eps) all over their ranges."""
    generator = torch.Generator().manual_seed(0)
    gamma = torch.rand(count, generator=generator, dtype=F64) * 40 - 20
    x = torch.rand(count, generator=generator, dtype=F64) * 2 - 1
    return gamma, x, torch.randn(count, generator=generator, dtype=F64)


@pytest.mark.parametrize(("prediction", "scaling"), PAIRS)
@pytest.mark.parametrize("data_std", [0.05, 0.5, 2.0])
def test_decoding_undoes_the_row(prediction: str, scaling: str, data_std: float) -> None:
    """x_hat = c_skip y + c_out F gives back x from F = a x + b eps at y = x + s eps, at any level."""
    row = Parameterization(prediction, scaling, data_std)
    gamma, x, eps = draws()
    a, b = row.row(gamma)
    c_skip, c_out = row.decode(gamma)
    y = x + torch.exp(gamma / 2) * eps
    x_hat = c_skip * y + c_out * (a * x + b * eps)
    # what rounding of y and F leaves, seen through the coefficients
    rounding = c_skip.abs() * y.abs() + c_out.abs() * ((a * x).abs() + (b * eps).abs())
    assert bool(((x_hat - x).abs() <= 1e-14 * (1 + rounding)).all())


@pytest.mark.parametrize("scaling", SCALINGS)
def test_rows_are_the_published_targets(scaling: str) -> None:
    gamma, x, eps = draws()
    s, sd = torch.exp(gamma / 2), 0.5
    alpha, sigma = Parameterization("x", scaling).alpha_sigma(gamma)
    z = alpha * x + sigma * eps
    targets = {
        "x": x,
        "eps": eps,
        "v": alpha * eps - sigma * x,
        "score": -(z - alpha * x) / sigma**2,  # grad log N(z; alpha x, sigma^2)
        "flow": eps - x,
        # Karras et al. 2022, table 1: x = c_skip y + c_out F
        "edm": (x - sd**2 / (s**2 + sd**2) * (z / alpha)) / (s * sd / torch.sqrt(s**2 + sd**2)),
    }
    assert set(targets) == set(PREDICTIONS)
    for prediction, target in targets.items():
        a, b = Parameterization(prediction, scaling, sd).row(gamma)
        assert torch.allclose(a * x + b * eps, target, rtol=1e-6, atol=1e-6), prediction


def test_edm_preconditioning() -> None:
    """c_skip = sd^2 / (s^2 + sd^2), c_out = s sd / sqrt(s^2 + sd^2), in any scaling."""
    s = torch.tensor([0.002, 0.5, 80.0], dtype=F64)
    for scaling in SCALINGS:
        c_skip, c_out = Parameterization("edm", scaling, 0.5).decode(2 * torch.log(s))
        assert torch.allclose(c_skip, 0.25 / (s**2 + 0.25), rtol=1e-9)
        assert torch.allclose(c_out.abs(), s * 0.5 / torch.sqrt(s**2 + 0.25), rtol=1e-9)


@pytest.mark.parametrize(("prediction", "scaling"), PAIRS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_pair_decodes_on_every_schedule(prediction: str, scaling: str, schedule: str) -> None:
    Parameterization(prediction, scaling).check(SCHEDULES[schedule]())


class Beyond:
    """A law that reaches levels where alpha vanishes in float64."""

    def __init__(self, low: float, high: float) -> None:
        self.gamma_min, self.gamma_max = low, high


@pytest.mark.parametrize(
    ("prediction", "scaling", "low", "high", "message"),
    [
        ("eps", "vp", -5.0, 2000.0, r"'eps' under scaling 'vp' cannot be decoded at gamma = \d+"),
        ("score", "flow", -5.0, 3000.0, r"'score' under scaling 'flow' cannot be decoded at gamma = \d+"),
        ("flow", "ve", -5.0, 2000.0, "cannot be decoded at gamma"),
    ],
)
def test_pairs_that_cannot_be_decoded_are_refused_by_name(
    prediction: str, scaling: str, low: float, high: float, message: str
) -> None:
    """Zero terminal SNR: alpha = 0 leaves nothing of x in z, and eps says nothing of it."""
    schedule: Schedule = Beyond(low, high)  # pyright: ignore[reportAssignmentType]
    with pytest.raises(ValueError, match=message):
        Parameterization(prediction, scaling).check(schedule)


def test_a_row_whose_determinant_changes_sign_is_refused() -> None:
    """A prediction of a x + b eps with a fixed b / a loses x where sigma / alpha passes it."""
    table = dict(PREDICTIONS)
    PREDICTIONS["sum"] = lambda alpha, sigma, data_std: (torch.ones_like(alpha), torch.ones_like(alpha))
    try:
        with pytest.raises(ValueError, match=r"'sum' under scaling 'vp' cannot be decoded at gamma = 0\.0"):
            Parameterization("sum", "vp").check(LinearGamma(-5, 5.0001))
        Parameterization("sum", "vp").check(LinearGamma(0.1, 5))
    finally:
        PREDICTIONS.clear()
        PREDICTIONS.update(table)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Parameterization("epsilon"), "unknown prediction 'epsilon'.*choose one of: x, eps, v"),
        (Parameterization("eps", "flo"), "unknown scaling 'flo'.*did you mean 'flow'"),
    ],
)
def test_unknown_names_are_refused(row: Parameterization, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row.check(Flow())


# --- bits -------------------------------------------------------------------------------------------------------------


def same_bits_anywhere(function: Callable[[Tensor], Tensor], values: Tensor) -> bool:
    """Whether each value gives the same bits alone, in batches of 7 and 64, and at any place of the whole."""
    whole = function(values)
    return all(
        torch.equal(
            torch.cat([function(values[i : i + n].clone()) for i in range(start, len(values), n)]), whole[start:]
        )
        for n in (1, 7, 64)
        for start in (0, 3)
    )


GAMMAS = torch.linspace(-12, 4.9, 131, dtype=torch.float64)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_coefficients_have_the_same_bits_anywhere_in_a_batch(scaling: str) -> None:
    assert same_bits_anywhere(SCALINGS[scaling], GAMMAS)
    for prediction in PREDICTIONS:
        p = Parameterization(prediction, scaling)
        assert same_bits_anywhere(lambda g, p=p: torch.stack([*p.row(g), *p.decode(g)], -1), GAMMAS), prediction
    for told in INPUTS.values():
        assert same_bits_anywhere(lambda g, told=told: told(Parameterization("v", scaling), g), GAMMAS)


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_and_times_have_the_same_bits_anywhere_in_a_batch(name: str) -> None:
    law = LearnedGamma(hidden=8) if name == "learned" else SCHEDULES[name]()
    gammas = torch.linspace(law.gamma_min, law.gamma_max, 67, dtype=torch.float64)
    assert same_bits_anywhere(lambda t: law.gamma(t).detach(), torch.linspace(0, 1, 131, dtype=torch.float64))
    for told in LEVELS.values():
        assert same_bits_anywhere(lambda g, told=told: told(law, g).detach(), gammas)


def test_the_check_of_bits_sees_what_depends_on_the_place() -> None:
    """torch.sigmoid, for one: what is left over after whole vectors goes through another routine."""
    assert not same_bits_anywhere(torch.sigmoid, torch.linspace(-12, 4.9, 1031, dtype=torch.float64))
