"""A whole evaluation: its table says what was demanded and missed, its file gives back the same."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.conditioner import numbered
from pipeline.evaluation.config import EvaluationConfig
from pipeline.evaluation.features import Labelled
from pipeline.evaluation.measure import Evaluation, evaluate, judge, load, passed, rows, save
from pipeline.evaluation.work import here
from pipeline.model import Sampling
from tests.evaluation.tiny import CLASSES, stripes, tiny_model

TRAIN, HELD_OUT = stripes(240, 1), stripes(60, 2)
CONFIG = EvaluationConfig(
    samples=60,
    sampling=Sampling("ddim", 3),
    estimators={"vlb": {"levels": 4}, "ode": {"tolerance": 0.3}},
    images=12,
    part=25,
    resamples=10,
    min_agreement=0.95,
    max_frechet_ratio=3.0,
)


@pytest.fixture(scope="module")
def found() -> Evaluation:
    ticks: list[tuple[str, int, int]] = []
    made = evaluate(
        here(tiny_model()),
        numbered("labels", CLASSES),
        TRAIN,
        HELD_OUT,
        CONFIG,
        lambda *tick: ticks.append(tick),
    )
    assert ticks == [
        ("bits/dim by vlb", 12, 12),
        ("bits/dim by ode", 12, 12),
        *[("samples", done, 60) for done in (25, 50, 60)],
        ("judging", 0, 60),
        ("judging", 60, 60),
    ]
    return made


def test_an_untrained_model_misses_what_is_demanded(found: Evaluation) -> None:
    table = {row.name: row for row in rows(found, CONFIG)}
    assert table["Samples of the asked class"].ok is False
    assert table["Fréchet distance in floors"].ok is False
    assert not passed(list(table.values()))
    assert "at least 95% demanded" in table["Samples of the asked class"].detail
    assert table["Held-out bits/dim, variational bound"].ok is None
    assert found.asked is not None
    assert torch.equal(found.asked[:4], torch.tensor([0, 1, 2, 0]))
    undemanding = rows(found, replace(CONFIG, min_agreement=None, max_frechet_ratio=None))
    assert [row.name for row in undemanding if row.ok is not None] == ["Near-copies of training images"]


def test_real_images_pass_as_samples_and_training_images_are_caught_as_copies(found: Evaluation) -> None:
    real = stripes(300, 9)
    good = judge(real.images, real.labels, found.scores, CLASSES, TRAIN, HELD_OUT, CONFIG)
    assert passed(rows(good, CONFIG))
    copied = judge(TRAIN.images, TRAIN.labels, found.scores, CLASSES, TRAIN, HELD_OUT, CONFIG)
    assert copied.copies.share.value == 1
    assert [row.name for row in rows(copied, CONFIG) if row.ok is False] == ["Near-copies of training images"]


def test_the_card_has_every_held_out_score(found: Evaluation) -> None:
    card = found.card()
    assert card["metrics"] == found.metrics()
    assert len(card["held_out_bits_per_dim"]["vlb"]) == len(card["held_out_bits_per_dim"]["ode"]) == 12
    mean = np.mean(card["held_out_bits_per_dim"]["vlb"])
    assert found.metrics()["held_out_bits_per_dim_vlb"] == pytest.approx(mean, abs=1e-4)


def test_the_file_gives_back_the_same_for_the_same_facts_only(found: Evaluation, tmp_path: Path) -> None:
    url, key = str(tmp_path / "evaluation"), {"model": "ab12", "images": (1, 2)}
    assert load(url, key) is None
    save(url, found, key)
    again = load(url, key)
    assert again is not None
    assert again.metrics() == found.metrics()
    assert again.scores == found.scores
    assert (again.agreement, again.frechet, again.features) == (found.agreement, found.frechet, found.features)
    assert torch.equal(again.samples, found.samples)
    assert (again.copies.index == found.copies.index).all()
    assert rows(again, CONFIG) == rows(found, CONFIG)
    assert load(url, {"model": "cd34", "images": (1, 2)}) is None


def test_a_set_without_classes_is_measured_without_agreement(found: Evaluation) -> None:
    bare = judge(
        found.samples, None, found.scores, 0, Labelled(TRAIN.images, None), Labelled(HELD_OUT.images, None), CONFIG
    )
    assert bare.agreement is None
    assert "class_agreement" not in bare.metrics()
    demanded = replace(CONFIG, min_agreement=None)
    assert all("asked" not in row.name for row in rows(bare, demanded))
    assert [row.ok for row in rows(bare, CONFIG) if "asked" in row.name] == [False], "a demand that cannot be measured"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"samples": 1}, "evaluation.samples"),
        ({"images": 1}, "evaluation.images"),
        ({"features": "inception"}, "evaluation.features"),
        ({"near_copy_share": 0.0}, "evaluation.near_copy_share"),
        ({"min_agreement": 95.0}, "evaluation.min_agreement"),
        ({"max_frechet_ratio": 0.0}, "evaluation.max_frechet_ratio"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        EvaluationConfig(**values)  # pyright: ignore[reportArgumentType]
