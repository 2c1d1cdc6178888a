"""Prediction types: rows, their inverse, and which pairs are refused."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.diffusion.parameterization import PREDICTIONS, Parameterization
from pipeline.diffusion.schedule import SCALINGS, SCHEDULES, Flow, LinearGamma, Schedule

F64 = torch.float64
PAIRS = list(itertools.product(PREDICTIONS, SCALINGS))


@pytest.mark.parametrize(("prediction", "scaling"), PAIRS)
@given(gamma=st.floats(-20, 20), x=st.floats(-1, 1), eps=st.floats(-5, 5), data_std=st.floats(0.05, 2))
def test_decoding_undoes_the_row(
    prediction: str, scaling: str, gamma: float, x: float, eps: float, data_std: float
) -> None:
    """x_hat = c_skip y + c_out F gives back x from F = a x + b eps at y = x + s eps, at any level."""
    row = Parameterization(prediction, scaling, data_std)
    level = torch.tensor([gamma], dtype=F64)
    a, b = row.row(level)
    c_skip, c_out = row.decode(level)
    y = x + math.exp(gamma / 2) * eps
    x_hat = float(c_skip * y + c_out * (a * x + b * eps))
    # what rounding of y and F leaves, seen through the coefficients
    rounding = float(c_skip.abs() * abs(y) + c_out.abs() * (a.abs() * abs(x) + b.abs() * abs(eps)))
    assert x_hat == pytest.approx(x, abs=1e-13 * (1 + rounding))


@given(gamma=st.floats(-15, 15), x=st.floats(-1, 1), eps=st.floats(-5, 5))
def test_rows_are_the_published_targets(gamma: float, x: float, eps: float) -> None:
    level = torch.tensor([gamma], dtype=F64)
    s = math.exp(gamma / 2)
    for scaling in SCALINGS:
        alpha, sigma = (float(v) for v in Parameterization("x", scaling).alpha_sigma(level))
        assert sigma == pytest.approx(alpha * s)
        z, sd = alpha * x + sigma * eps, 0.5
        targets = {
            "x": x,
            "eps": eps,
            "v": alpha * eps - sigma * x,
            "score": -(z - alpha * x) / sigma**2,  # grad log N(z; alpha x, sigma^2)
            "flow": eps - x,
            # Karras et al. 2022, table 1: D = c_skip y + c_out F
            "edm": (x - sd**2 / (s**2 + sd**2) * (z / alpha)) / (s * sd / math.sqrt(s**2 + sd**2)),
        }
        for prediction, target in targets.items():
            a, b = Parameterization(prediction, scaling, sd).row(level)
            got = float(a * x + b * eps)
            assert got == pytest.approx(target, rel=1e-6, abs=1e-6 * (1 + abs(float(a)) + abs(float(b)))), prediction


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
        (Parameterization("eps", "vb"), "unknown scaling 'vb'.*did you mean 'v"),
    ],
)
def test_unknown_names_are_refused(row: Parameterization, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row.check(Flow())
