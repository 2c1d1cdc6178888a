"""Shares, Frechet distances and their intervals against closed forms and an independent implementation."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.statistics import Moments, frechet, frechet_compared, frechet_distance, moments, wilson


@given(n=st.integers(1, 500), data=st.data())
@settings(max_examples=60, deadline=None)
def test_wilson_is_scipy_s(n: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, n))
    ours = wilson(successes, n)
    theirs = scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert ours.value == successes / n
    assert ours.low == pytest.approx(theirs.low, abs=1e-12)
    assert ours.high == pytest.approx(theirs.high, abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses_what_is_no_share(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="share"):
        wilson(successes, n)


def _covariance(rng: np.random.Generator, d: int, rank: int) -> np.ndarray:
    factor = rng.standard_normal((d, rank))
    return factor @ factor.T / rank


@pytest.mark.parametrize("rank", [8, 20])
def test_frechet_is_the_formula_with_a_general_matrix_root(rank: int) -> None:
    rng = np.random.default_rng(rank)
    a = Moments(rng.standard_normal(8), _covariance(rng, 8, rank))
    b = Moments(rng.standard_normal(8), _covariance(rng, 8, rank))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    gap = a.mean - b.mean
    expected = gap @ gap + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(root).real
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-9)


def test_frechet_of_commuting_gaussians() -> None:
    a, b = np.array([1.0, 4.0, 9.0, 0.0]), np.array([4.0, 1.0, 9.0, 0.0])
    found = frechet(Moments(np.zeros(4), np.diag(a)), Moments(np.full(4, 2.0), np.diag(b)))
    assert found == pytest.approx(16 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-12)


def test_frechet_survives_singular_covariances() -> None:
    """More dimensions than rows: the common general matrix root is complex or not finite there."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((10, 64))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-7)
    assert frechet_distance(x, x + 3.0) == pytest.approx(64 * 9, rel=1e-9)


def test_moments_by_weight_are_those_of_repeated_rows() -> None:
    rng = np.random.default_rng(1)
    x, weights = rng.standard_normal((30, 5)), rng.integers(0, 4, 30)
    found, expected = moments(x, weights), np.repeat(x, weights, axis=0)
    np.testing.assert_allclose(found.mean, expected.mean(0), atol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(expected, rowvar=False), atol=1e-12)


def test_moments_refuse_what_has_none() -> None:
    with pytest.raises(ValueError, match="at least 2 rows"):
        moments(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="not finite"):
        moments(np.array([[0.0, 1.0], [np.nan, 1.0]]))


def test_the_interval_covers_the_mean_distance_of_such_sets() -> None:
    """Its target is the expected distance at these numbers of rows; 95% nominal, 80 trials."""
    rng = np.random.default_rng(2)

    def draw(n: int, shift: float) -> np.ndarray:
        return rng.standard_normal((n, 4)) + shift

    target = np.mean([frechet_distance(draw(200, 0.5), draw(150, 0.0)) for _ in range(400)])
    hits = 0
    for trial in range(80):
        found = frechet_compared(draw(200, 0.5), draw(300, 0.1), draw(150, 0.0), 100, trial)
        hits += found.distance.low <= target <= found.distance.high
        for part in (found.distance, found.floor, found.ratio):
            assert part.low <= part.value <= part.high
        assert found.ratio.value == pytest.approx(found.distance.value / found.floor.value)
    assert hits >= 68  # 85%: far below would be a wrong interval


def test_the_reference_s_chance_cancels_in_the_ratio() -> None:
    """Two large sets of one law have a ratio of 1, however small the reference."""
    rng = np.random.default_rng(4)
    a, b, reference = (rng.standard_normal((n, 4)) for n in (4000, 4000, 60))
    found = frechet_compared(a, b, reference, 100, 0)
    assert found.ratio.low < 1 < found.ratio.high
    spread = (found.distance.high - found.distance.low) / found.distance.value
    assert found.ratio.high - found.ratio.low < spread / 3


def test_the_estimate_is_the_same_for_the_same_seed() -> None:
    rng = np.random.default_rng(3)
    a, b, c = (rng.standard_normal((n, 3)) for n in (40, 50, 60))
    assert frechet_compared(a, b, c, 20, 7) == frechet_compared(a, b, c, 20, 7)
    assert frechet_compared(a, b, c, 20, 7) != frechet_compared(a, b, c, 20, 8)
