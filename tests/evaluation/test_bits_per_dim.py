"""Scores of many images: sums, errors and independence of how the work is cut."""

import math

import numpy as np
import pytest
import torch

from pipeline.conditioner import numbered
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.likelihood.estimate import Likelihood
from pipeline.evaluation.bits_per_dim import joined, score
from pipeline.evaluation.work import SampleWork, cuts, finish, here, sample_work, score_work
from pipeline.model import Sampling, Scoring
from tests.evaluation.tiny import stripes, tiny_model

THREE = numbered("labels", 3)


HOW = Scoring("vlb", {"levels": 8})


def _likelihood(bits: list[float], errors: list[float]) -> Likelihood:
    scale = 64 * math.log(2)
    nats = torch.tensor(bits, dtype=torch.float64) * scale
    noise = torch.tensor(errors, dtype=torch.float64) * scale
    count = torch.full((len(bits),), 8)
    return Likelihood(nats, {"prior": nats / 4, "diffusion": nats * 3 / 4}, {"noise": noise}, count, 64)


def test_mean_and_errors_are_the_textbook_s() -> None:
    rng = np.random.default_rng(0)
    bits, errors = rng.uniform(2, 5, 50), rng.uniform(0.01, 0.1, 50)
    found = joined("vlb", [_likelihood(list(bits[i : i + 20]), list(errors[i : i + 20])) for i in (0, 20, 40)])
    assert found.bits_per_dim == pytest.approx(tuple(bits))
    assert found.mean == pytest.approx(bits.mean())
    assert found.standard_error == pytest.approx(bits.std(ddof=1) / math.sqrt(50))
    assert found.estimator_error == pytest.approx(math.sqrt((errors**2).sum()) / 50)
    assert sum(found.parts.values()) == pytest.approx(found.mean)
    assert found.evaluations == 8


def test_what_is_not_finite_is_named() -> None:
    with pytest.raises(ValueError, match="held-out image 1 by 'vlb' is inf"):
        joined("vlb", [_likelihood([1.0, math.inf], [0.1, 0.1])])
    with pytest.raises(ValueError, match="at least 2"):
        joined("vlb", [_likelihood([1.0], [0.1])])


@pytest.mark.parametrize(
    "how",
    [
        HOW,
        Scoring("vlb_discrete", {"terms": 5, "importance": "uniform"}),
        Scoring("ddim_bound", {"terms": 5, "eta": 0.5}),
        Scoring("ode", {"tolerance": 0.1}),
    ],
    ids=lambda how: how.estimator,
)
def test_scores_have_the_same_bits_however_the_work_is_cut(how: Scoring) -> None:
    """In the evaluation's pieces of 1, 7 and 64, and by `Model.bits_per_dim` of one image, of 7 and of all."""
    model, real = tiny_model(), stripes(23, 0)
    assert real.labels is not None
    whole = score(here(model), real.images, Conditioning(real.labels), how, part=64)
    for part in (1, 7):
        assert score(here(model), real.images, Conditioning(real.labels), how, part=part) == whole
    labels = real.labels.tolist()
    for n in (1, 7, 23):
        single = model.bits_per_dim(real.images[:n], how, labels=labels[:n])
        assert tuple(single.bits_per_dim.tolist()) == whole.bits_per_dim[:n]
        assert tuple(single.bits_per_dim_standard_error.tolist()) == whole.estimator_errors[:n]


def test_progress_and_degrees_of_freedom_come_through() -> None:
    model, real = tiny_model(), stripes(23, 0)
    ticks: list[int] = []
    score(here(model), real.images, Conditioning(real.labels), HOW, part=10, progress=ticks.append)
    assert ticks == [10, 20, 23]
    found = score_work(real.images, Conditioning(real.labels), HOW, 23, 0)[0].run(model)
    assert found.freedom is not None
    assert bool((found.freedom >= 1).all())


def test_the_labels_reach_the_network() -> None:
    model, real = tiny_model(), stripes(6, 0)
    assert real.labels is not None
    right = score(here(model), real.images, Conditioning(real.labels), HOW)
    wrong = score(here(model), real.images, Conditioning((real.labels + 1) % 3), HOW)
    assert right.mean != wrong.mean


def label_of(piece: SampleWork) -> list[int]:
    assert piece.conditioning.label is not None
    return piece.conditioning.label.tolist()


def test_samples_are_the_same_in_any_order_of_the_pieces() -> None:
    model = tiny_model()
    work = sample_work(10, THREE.in_turn(range(10)), Sampling("ddim", 4), 4, 0)
    assert [label_of(piece) for piece in work] == [[0, 1, 2, 0], [1, 2, 0, 1], [2, 0]]
    inorder = finish(here(model), work)
    backwards = finish(lambda pieces: ((i, pieces[i].run(model)) for i in reversed(range(len(pieces)))), work)
    for a, b in zip(inorder, backwards, strict=True):
        assert isinstance(a, torch.Tensor)
        assert isinstance(b, torch.Tensor)
        assert a.dtype == torch.uint8
        assert torch.equal(a, b)


def test_work_left_undone_is_noticed() -> None:
    work = sample_work(10, THREE.in_turn(range(10)), Sampling("ddim", 4), 4, 0)
    with pytest.raises(RuntimeError, match="3 of 3 pieces"):
        finish(lambda pieces: iter(()), work)


def test_cuts_cover_everything_once() -> None:
    assert [list(range(10)[piece]) for piece in cuts(10, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert cuts(0, 4) == []
