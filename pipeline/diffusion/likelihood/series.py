"""Sums over noise levels: a control variate that keeps their mean, and the variance of what was drawn."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pipeline.diffusion.likelihood.estimate import Variance
from pipeline.diffusion.rows import row_sum

PROFILE_STD = 0.5  # of data in [-1, 1]: about how the error of eps_hat falls with the noise, s.d.^2 / (s.d.^2 + s^2)
POOLED = 4  # neighbours on each side whose noise is taken to be like a term's
AT_ONCE = 1 << 22  # numbers held at once for the variance of drawing


def _differences(each: Tensor) -> Variance:
    """Of the sum of k > 2 terms from `each` (n, k - 2), their squared second differences, in shares of that sum.

    Overlapping as they are, k equal ones have 18/35 k degrees of freedom, and fewer the more unequal they are; a single
    one has 1.
    """
    total, squares = row_sum(each), row_sum(each**2)
    freedom = torch.where(squares > 0, (54 * total**2 / squares - 19) / 35, math.inf)
    return Variance(total, freedom.clamp(min=1))


def _pooled(each: Tensor, power: Tensor) -> Variance:
    """Of the sum of k terms of variance power (n, k) x v, v varying slowly, from estimates `each` (n, k - 2) of v.

    Each term's v is the mean of the estimates around it, lest a term that outweighs all others has one alone.
    """
    count = each.shape[1]
    place = torch.arange(count + 2, device=each.device).sub(1).clamp(0, count - 1)  # of a term's own estimate
    first, last = (place - POOLED).clamp(min=0), (place + POOLED).clamp(max=count - 1)
    near = torch.arange(count, device=each.device)
    window = ((near >= first[:, None]) & (near <= last[:, None])).to(each.dtype)
    window = window / window.sum(1, keepdim=True)
    weight = torch.stack([row_sum(power * column) for column in window.T], 1)  # of each estimate in the sum
    expected = torch.stack([row_sum(each * row) for row in window[1:-1]], 1) * weight
    total, squares = row_sum(each * weight), row_sum(expected**2)
    freedom = torch.where(squares > 0, (18 * row_sum(expected) ** 2 / squares + 17) / 35, math.inf)
    return Variance(total, freedom.clamp(min=1))


def series_variance(terms: Tensor) -> Variance:
    """Of the sum of k > 1 independent terms (n, k) whose means vary smoothly, by their second differences.

    A second difference of equal variances v has variance 6 v.
    """
    n, k = terms.shape
    if k == 2:
        return Variance(terms.diff(dim=1)[:, 0] ** 2, torch.ones(n, dtype=terms.dtype, device=terms.device))
    return _differences(terms.diff(n=2, dim=1) ** 2 / 6 * (k / (k - 2)))


def _neighbours(ratio: Tensor) -> Tensor:
    """(n, k): the mean of each term's neighbours, of k > 2."""
    return torch.cat([ratio[:, 1:2], (ratio[:, :-2] + ratio[:, 2:]) / 2, ratio[:, -2:-1]], dim=1)


def _around(ratio: Tensor) -> Tensor:
    """(n, k): the size of each term and its neighbours, of k > 2."""
    size = ratio.abs()
    middle = (size[:, :-2] + size[:, 1:-1] + size[:, 2:]) / 3
    return torch.cat([size[:, :2].mean(1, keepdim=True), middle, size[:, -2:].mean(1, keepdim=True)], dim=1)


def controlled(terms: Tensor, weights: Tensor, squares: Tensor, dimensions: int) -> Tensor:
    """Terms (n, k) less a control variate |eps|^2 (n, k), of mean D.

    Unbiased, since a term's coefficient is made of its neighbours alone. weights: (n, k), known factors: at low noise a
    term is close to its weight x |eps|^2 x something smooth.
    """
    if terms.shape[1] < 3:
        return terms
    return terms - weights * _neighbours(terms / (weights * squares)) * (squares - dimensions)


@dataclass(frozen=True)
class Strata:
    """Which steps of a table may stand for a stratum's share of the sum: k strata, each with L or fewer steps.

    steps: int64 (k, L); share: (k, L), with which probability, 0 where there is none; factor: (T,), of each step.
    """

    steps: Tensor
    share: Tensor
    factor: Tensor

    @staticmethod
    def of(p: Tensor, terms: int) -> "Strata":
        """Of `terms` strata of equal probability; p: (T,) of the steps."""
        ends = p.cumsum(0)
        ends[-1] = 1.0
        edges = torch.arange(terms + 1, dtype=p.dtype, device=p.device) / terms
        last = len(p) - 1
        first = torch.searchsorted(ends, edges[:-1], right=True).clamp(max=last)
        width = int((torch.searchsorted(ends, edges[1:]).clamp(max=last) - first).max()) + 1
        steps = first[:, None] + torch.arange(width, device=p.device)
        steps, beyond = steps.clamp(max=last), steps > last
        low = torch.maximum((ends - p)[steps], edges[:-1, None])
        share = (torch.minimum(ends[steps], edges[1:, None]) - low).clamp(min=0).masked_fill(beyond, 0.0)
        return Strata(steps, share / share.sum(1, keepdim=True), 1 / (terms * p))

    @staticmethod
    def every(count: int, repeats: int, like: Tensor) -> "Strata":
        """Each step for itself, `repeats` times."""
        steps = torch.arange(count, device=like.device).repeat_interleave(repeats)[:, None]
        factor = torch.full((count,), 1 / repeats, dtype=like.dtype, device=like.device)
        return Strata(steps, torch.ones_like(steps, dtype=like.dtype), factor)

    @property
    def drawn(self) -> bool:
        return self.steps.shape[1] > 1

    def mean(self, values: Tensor) -> Tensor:
        """(k,): the mean of values (T,) over the steps of each stratum."""
        return row_sum(self.share * values[self.steps])


@dataclass(frozen=True)
class Sum:
    """A sum over steps of which one a stratum was measured.

    terms: (n, k), as measured x factor; squares: (n, k), |eps|^2; chosen: int64 (n, k), their steps, ascending.
    weights: (T,), the known factor of each step x the strata's; gammas: (T,).
    """

    terms: Tensor
    squares: Tensor
    chosen: Tensor
    strata: Strata
    weights: Tensor
    gammas: Tensor
    dimensions: int
    control: bool

    @cached_property
    def sizes(self) -> Tensor:
        """(T,): about what a step's term comes to; of the table, as a function's last bit may depend on the place."""
        return self.weights * self.dimensions * torch.sigmoid(2 * math.log(PROFILE_STD) - self.gammas)

    @property
    def around(self) -> Tensor:
        """(n, k): the coefficient of the control variate weight x |eps|^2."""
        if not self.control or self.terms.shape[1] < 3:
            return torch.zeros_like(self.terms)
        return _neighbours(self.terms / (self.weights[self.chosen] * self.squares))

    def estimates(self) -> Tensor:
        """Terms (n, k) whose sum is unbiased: less weight x |eps|^2, whose mean over step and noise is known."""
        if not self.control:
            return self.terms
        weights = self.weights[self.chosen]
        values = controlled(self.terms, weights, self.squares, self.dimensions)
        if not self.strata.drawn:
            return values
        return values - self.around * self.dimensions * (weights - self.strata.mean(self.weights))

    def variance(self) -> Variance:
        """Of the sum of `estimates`.

        What is smooth in gamma is the ratio of a term to its weight, not the terms: weights jump where a table's steps
        do, and in a stratum of steps drawn alike they range over decades. So the noise is taken from second differences
        of the ratios, and what the draw of steps adds is summed over the steps that might have been drawn.
        """
        n, k = self.terms.shape
        ratio = self.terms / self.sizes[self.chosen]
        if self.control and k > 2:
            ratio = ratio * (self.dimensions / self.squares)
        power = self.strata.mean(self.sizes**2)
        if k == 2:
            noise = ratio.diff(dim=1)[:, 0] ** 2 / 2 * power.sum()
            variance = Variance(noise, torch.ones(n, dtype=noise.dtype, device=noise.device))
        else:
            left, middle, right = (self.gammas[self.chosen[:, i : k - 2 + i]] for i in range(3))
            gap = right - left
            share = torch.where(gap > 0, (middle - left) / gap, 0.5)
            off = ratio[:, 1:-1] - _between(ratio[:, :-2], ratio[:, 2:], share)
            level = _around(ratio) if self.control else _around(ratio) ** 2  # about as the noise goes
            each = off**2 / (1 + share**2 + (1 - share) ** 2) / level[:, 1:-1]
            variance = _pooled(each.nan_to_num(0), power * level)
        if not self.strata.drawn:
            return variance
        drawing = self._of_drawing(ratio)
        points = min(k - 1, 2 * POOLED)  # which it is known from, where one stratum outweighs the others
        return variance + Variance(drawing, torch.full_like(drawing, points))

    def _of_drawing(self, ratio: Tensor) -> Tensor:
        """(n,): the variance of the sum of the terms' means over the steps that each stratum might have drawn."""
        smooth = _interpolated(self.gammas[self.chosen], ratio, self.gammas) * self.sizes
        known, around = self.weights * self.dimensions, self.around
        n, width = len(ratio), self.strata.steps.shape[1]
        each = torch.empty_like(ratio)
        together = max(1, AT_ONCE // (n * width))
        for start in range(0, ratio.shape[1], together):
            rows = slice(start, start + together)
            steps, share = self.strata.steps[rows], self.strata.share[rows]
            mean = smooth[:, steps] - around[:, rows, None] * known[steps]
            centre = row_sum((share * mean).flatten(0, 1)).view(n, -1, 1)
            each[:, rows] = row_sum((share * (mean - centre) ** 2).flatten(0, 1)).view(n, -1)
        return row_sum(each)


def _between(low: Tensor, high: Tensor, share: Tensor) -> Tensor:
    """As torch.lerp, whose bits may depend on the place in the tensor."""
    return low + share * (high - low)


def _interpolated(gammas: Tensor, values: Tensor, at: Tensor) -> Tensor:
    """(n, T): on lines through values (n, k) at gammas (n, k), ascending; constant at more noise, at less up to 1.

    1 is what x_hat = y has. Nothing was seen there, and it must not be taken for better than it may be.
    """
    right = torch.searchsorted(gammas.contiguous(), at.expand(len(gammas), -1).contiguous())
    right = right.clamp(1, gammas.shape[1] - 1)
    low, high = gammas.gather(1, right - 1), gammas.gather(1, right)
    share = torch.where(high > low, (at - low) / (high - low), 0.5).clamp(0, 1)
    inside = _between(values.gather(1, right - 1), values.gather(1, right), share)
    first, start = gammas[:, :1], values[:, :1]
    beyond = ((first - at) / (first - at[0])).nan_to_num(0).clamp(0, 1)
    return torch.where(at < first, _between(start, start.clamp(min=1), beyond), inside)
