"""The adaptive sampler: the order of its pairs, what its tolerance means, and that each image goes its own way."""

import math

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.adaptive import _attempt, _norm, _slope, _State
from pipeline.diffusion.fields import mix
from pipeline.diffusion.ode import PAIRS
from pipeline.diffusion.procedure import Answer, Procedure, drive
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.samplers import SAMPLERS, prior
from tests.diffusion.sampler_cases import HIGH, LOW, NONE, PROCESS, correlated, mixture, slope, uniform_gamma

F64 = torch.float64


def fixed_steps(y: Tensor, steps: int, solver: str) -> Procedure[Tensor]:
    """From HIGH to LOW without control."""
    tau = torch.full((len(y),), HIGH / 2, dtype=F64)
    step = torch.full_like(tau, (LOW - HIGH) / 2 / steps)
    w = y / _norm(tau)[:, None]
    first, _ = yield from _slope(w, tau, 2 * tau, NONE)
    state = _State(torch.arange(len(y)), tau, step, w, first, NONE)
    for _ in range(steps):
        w, ahead, _, _ = yield from _attempt(state, PAIRS[solver], (HIGH, LOW))
        state = _State(state.row, state.tau + step, step, w, ahead, NONE)
    return state.w * _norm(state.tau)[:, None]


@pytest.mark.parametrize("solver", PAIRS)
def test_pairs_have_their_order(solver: str) -> None:
    oracle = correlated()
    y = torch.tensor([[3.0, -8.0, 5.0], [10.0, 2.0, -4.0]], dtype=F64)
    exact = oracle.flow(y, HIGH, LOW)
    errors = [float((drive(fixed_steps(y, steps, solver), oracle) - exact).abs().max()) for steps in (40, 80)]
    assert abs(slope(errors) - PAIRS[solver].order) < 0.15, errors
    assert SAMPLERS["adaptive"].order == PAIRS["dopri5"].order


@pytest.mark.parametrize("solver", PAIRS)
def test_error_follows_the_tolerance(solver: str) -> None:
    """On the exact map of a Gaussian: each tenth of the tolerance takes the error down, and keeps it within 20 times."""
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
    """8 x 8 fields at 1e-3: fewer evaluations than it says, and no more error than Heun's with as many."""
    field, noise = mix(), Noise(range(8))
    y = prior(PROCESS, (8, 1, 8, 8), noise, dtype=F64)
    asked: list[int] = []

    def counted(procedure: Procedure[Tensor]) -> Procedure[Tensor]:
        query = next(procedure)
        try:
            while True:
                asked.append(query.rows)
                query = procedure.send((yield query))
        except StopIteration as stop:
            return stop.value

    def sample(name: str, steps: int, **options: float) -> Tensor:
        asked.clear()
        procedure = SAMPLERS[name].start(PROCESS, y.clone(), uniform_gamma(steps), noise, NONE, **options)
        return drive(counted(procedure), field)

    def error(got: Tensor) -> float:
        return float((got - exact).square().mean().sqrt())

    exact = sample("adaptive", 2, tolerance=1e-9)
    got = sample("adaptive", 2, tolerance=1e-3)
    evaluations = sum(asked) / 8
    assert evaluations < SAMPLERS["adaptive"].evaluations(2, tolerance=1e-3)
    assert error(got) < error(sample("heun", math.ceil(evaluations / 2)))


def test_one_level_is_one_query() -> None:
    y = torch.ones(2, 2, dtype=F64)
    got = drive(SAMPLERS["adaptive"].start(PROCESS, y.clone(), uniform_gamma(1), Noise(range(2)), NONE), mixture())
    assert torch.allclose(got, mixture().denoise(y, torch.full((2,), HIGH, dtype=F64)), rtol=1e-12)
