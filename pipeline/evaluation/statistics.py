"""Shares and distances of distributions, each with its interval. float64 throughout."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

Z_95 = 1.959963984540054  # half-width of a 95% interval, in standard errors


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval."""

    value: float
    low: float
    high: float


def wilson(successes: int, n: int) -> Estimate:
    """A share and its score interval (Wilson 1927), sound also at 0 and 1.

    Raises:
        ValueError: n < 1, or successes outside 0..n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a share needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    p, z2 = successes / n, Z_95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Estimate(p, 0.0 if successes == 0 else low, 1.0 if successes == n else high)


@dataclass(frozen=True)
class Moments:
    """mean (d,) and covariance (d, d), normalised by n - 1, of n rows."""

    mean: Floats
    covariance: Floats


def moments(features: Floats, weights: NDArray[np.int64] | None = None) -> Moments:
    """Of rows (n, d), n >= 2; weights (n,): how often each row counts.

    Raises:
        ValueError: fewer than 2 rows, or a value that is not finite.
    """
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"moments need at least 2 rows of features, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("features hold a value that is not finite")
    w = np.ones(len(x)) if weights is None else weights.astype(np.float64)
    total = w.sum()
    mean = w @ x / total
    centred = (x - mean) * np.sqrt(w)[:, None]
    return Moments(mean, centred.T @ centred / (total - 1))


def _root(covariance: Floats) -> Floats:
    """The symmetric square root; rounding below 0 is cut."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def frechet(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 |C_a^1/2 C_b^1/2|_*, the squared 2-Wasserstein distance of two Gaussians.

    (Dowson & Landau 1982; Heusel et al. 2017.) The nuclear norm is tr (C_a C_b)^1/2 without a general matrix root: no
    imaginary part, nothing added to singular covariances.
    """
    cross = np.linalg.svd(_root(a.covariance) @ _root(b.covariance), compute_uv=False).sum()
    gap = a.mean - b.mean
    return float(max(0.0, gap @ gap + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross))


def frechet_distance(a: Floats, b: Floats) -> float:
    """Frechet distance of two sets of features, (n, d) and (m, d)."""
    return frechet(moments(a), moments(b))


@dataclass(frozen=True)
class Compared:
    """Frechet distances to one reference set: of a, of a floor, and a's in floors."""

    distance: Estimate
    floor: Estimate
    ratio: Estimate


def frechet_compared(a: Floats, floor: Floats, reference: Floats, resamples: int, seed: int) -> Compared:
    """Distances of two sets to a third, each with a 95% interval by the bootstrap of all sets.

    The distance of finite sets is biased upward, and a resample's once more by about as much: the interval is that of
    the resamples, shifted by their mean excess, and so one for the distance at these numbers of rows. In the ratio the
    reference is the same resample above and below, so that its chance largely cancels.
    """
    rng = np.random.default_rng(seed)
    draws = np.empty((resamples, 2))
    for index in range(resamples):
        ours, base, target = (
            moments(x, rng.multinomial(len(x), np.full(len(x), 1 / len(x)))) for x in (a, floor, reference)
        )
        draws[index] = frechet(ours, target), frechet(base, target)
    values = frechet_distance(a, reference), frechet_distance(floor, reference)
    ratio = values[0] / values[1] if values[1] > 0 else math.inf
    ratios = draws[:, 0] / np.maximum(draws[:, 1], np.finfo(np.float64).tiny)
    return Compared(_shifted(values[0], draws[:, 0]), _shifted(values[1], draws[:, 1]), _shifted(ratio, ratios))


def _shifted(value: float, draws: Floats) -> Estimate:
    low, high = np.quantile(draws - (draws.mean() - value), (0.025, 0.975))
    return Estimate(value, max(0.0, float(low)), float(high))
