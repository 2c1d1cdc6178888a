"""The adaptive sampler: the order of its pairs, what its tolerance means, and that each image goes its own way."""

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Prediction
from pipeline.diffusion.oracles.fields import mix
from pipeline.diffusion.procedure import Answer, Procedure, drive
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.runge_kutta import PAIRS
from pipeline.diffusion.sampling.adaptive import _attempt, _norm, _slope, _State
from pipeline.diffusion.sampling.samplers import SAMPLERS, prior
from tests.diffusion.sampler_cases import HIGH, LOW, NONE, PROCESS, correlated, mixture, slope, uniform_gamma

F64 = torch.float64


def one_step(y: Tensor, gamma: float, step: float, solver: str) -> Procedure[Tensor]:
    """y after one step in log s, without control."""
    tau = torch.full((len(y),), gamma / 2, dtype=F64)
    steps = torch.full_like(tau, step)
    w = y / _norm(tau)[:, None]
    slope_, _ = yield from _slope(w, tau, 2 * tau, NONE)
    state = _State(torch.arange(len(y)), tau, steps, w, slope_, NONE)
    w, _, _, _ = yield from _attempt(state, PAIRS[solver], (HIGH, LOW))
    return w * _norm(tau + steps)[:, None]


@pytest.mark.parametrize("solver", PAIRS)
def test_pairs_have_their_order(solver: str) -> None:
    """A step's error against the exact map falls one order faster than the whole way's."""
    oracle, gamma = correlated(), -2.5
    y = torch.tensor([[3.0, -8.0, 5.0], [10.0, 2.0, -4.0]], dtype=F64)
    errors = [
        float((drive(one_step(y, gamma, -h, solver), oracle) - oracle.flow(y, gamma, gamma - 2 * h)).abs().max())
        for h in (0.2, 0.1)
    ]
    assert abs(slope(errors) - 1 - PAIRS[solver].order) < 0.15, errors
    assert SAMPLERS["adaptive"].order == PAIRS["dopri5"].order


@pytest.mark.parametrize("solver", PAIRS)
def test_error_follows_the_tolerance(solver: str) -> None:
    """On the exact map of a Gaussian: a smaller tolerance takes the error down, and keeps it within 20 times."""
    oracle = correlated()
    y = torch.tensor([[3.0, -8.0, 5.0], [10.0, 2.0, -4.0]], dtype=F64)
    exact = oracle.denoise(oracle.flow(y, HIGH, LOW), torch.full((2,), LOW, dtype=F64))
    errors: list[float] = []
    for tolerance in (1e-2, 1e-4, 1e-6):
        options = {"tolerance": tolerance, "solver": solver}
        got = drive(
            SAMPLERS["adaptive"].start(PROCESS, y.clone(), uniform_gamma(2), Noise(range(2)), NONE, **options), oracle
        )
        errors.append(float((got - exact).square().mean().sqrt()))
        assert errors[-1] < 20 * tolerance
    assert errors[0] > errors[1] > errors[2]


def test_each_image_takes_its_own_steps_and_leaves_when_it_has_arrived() -> None:
    """Queries shrink as images arrive; the answer is that of each alone; levels in a query differ."""
    y = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=F64) * 12
    procedure = SAMPLERS["adaptive"].start(PROCESS, y.clone(), uniform_gamma(2), Noise(range(8)), NONE, tolerance=1e-5)
    rows: list[int] = []
    spread = 0.0
    query = next(procedure)
    try:
        while True:
            rows.append(query.rows)
            spread = max(spread, float(query.gamma.max() - query.gamma.min()))
            assert float(query.gamma.min()) >= LOW
            assert float(query.gamma.max()) <= HIGH
            query = procedure.send(Answer(mixture().denoise(query.y, query.gamma)))
    except StopIteration as stop:
        together: Tensor = stop.value
    assert rows[0] == 8
    assert rows[-1] < 8
    assert sorted(rows, reverse=True) == rows
    assert spread > 0.1
    for row in range(8):
        alone = SAMPLERS["adaptive"].start(
            PROCESS, y[row : row + 1].clone(), uniform_gamma(2), Noise([row]), NONE, tolerance=1e-5
        )
        assert torch.allclose(together[row], drive(alone, mixture())[0], rtol=1e-9, atol=1e-12)


def test_evaluations_on_a_field_of_images() -> None:
    """8 x 8 fields: fewer evaluations than the table says, and an error of the tolerance's size."""
    field, noise = mix(), Noise(range(8))
    y = prior(PROCESS, (8, 1, 8, 8), noise, dtype=F64)
    asked: list[int] = []

    def answer(y: Tensor, gamma: Tensor, conditioning: Conditioning, shared: object = None) -> Prediction:
        asked.append(len(y))
        return field(y, gamma, conditioning)

    def sample(tolerance: float) -> Tensor:
        asked.clear()
        options = {"tolerance": tolerance}
        return drive(SAMPLERS["adaptive"].start(PROCESS, y.clone(), uniform_gamma(2), noise, NONE, **options), answer)

    exact = sample(1e-9)
    for tolerance in (1e-2, 1e-3, 1e-4):
        got = sample(tolerance)
        assert sum(asked) / 8 < SAMPLERS["adaptive"].evaluations(2, tolerance=tolerance)
        assert float((got - exact).square().mean().sqrt()) < 10 * tolerance


def test_one_level_is_one_query() -> None:
    y = torch.ones(2, 2, dtype=F64)
    got = drive(SAMPLERS["adaptive"].start(PROCESS, y.clone(), uniform_gamma(1), Noise(range(2)), NONE), mixture())
    assert torch.allclose(got, mixture().denoise(y, torch.full((2,), HIGH, dtype=F64)), rtol=1e-12)
