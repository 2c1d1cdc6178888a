"""The page stands alone, is well formed, and escapes what it is told."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from pipeline.evaluation import charts, pictures
from pipeline.evaluation.bits_per_dim import Scores
from pipeline.evaluation.charts import Curve
from pipeline.evaluation.config import EvaluationConfig
from pipeline.evaluation.features import Labelled
from pipeline.evaluation.measure import Evaluation, judge, rows
from pipeline.evaluation.report import Link, Report, Stage, html, plain
from tests.evaluation.page import empty_boxes
from tests.evaluation.tiny import stripes

CONFIG = EvaluationConfig(samples=60, resamples=10, min_agreement=0.95, max_frechet_ratio=3.0, features="pixels")
TRAIN, HELD_OUT = stripes(240, 1), stripes(60, 2)


@pytest.fixture(scope="module")
def found() -> Evaluation:
    bits = tuple(np.random.default_rng(0).uniform(3, 6, 60).tolist())
    scores = {name: Scores(name, bits, (0.01,) * 60, {"prior": 4.5}, 32) for name in ("vlb", "ode")}
    real = stripes(60, 7)
    return judge(real.images, real.labels, scores, 3, TRAIN, HELD_OUT, CONFIG)


class Page(HTMLParser):
    """Balanced tags, and everything that would be loaded from elsewhere."""

    VOID = frozenset({"meta", "img", "br", "use", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.loads += [f"{tag} {value}" for name, value in attrs if name in ("src", "href") and value]
        assert tag != "script"

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _report(found: Evaluation, title: str = "stripes") -> Report:
    return Report(
        title=title,
        subtitle="three classes",
        evaluation=found,
        config=CONFIG,
        train=TRAIN,
        held_out=HELD_OUT,
        class_names=("one", "two", "<three>"),
        losses=[Curve("loss", [1000, 2000, 3000], [0.5, 0.4, 0.3])],
        likelihoods=[Curve("bits/dim", [1000, 3000], [6.0, 5.0], [0.1, 0.1]), Curve("nothing yet", [], [])],
        lineage=[Link("Shards", [("digest", "ab12")]), Link("Run", [("id", "cd34")])],
        stages=[Stage("train", 80, 2 << 30), Stage("serve", 20)],
        commands=[("Open it", "mlflow ui --backend-store-uri 'sqlite:///a&b.db'")],
    )


def test_the_page_stands_alone_and_is_well_formed(found: Evaluation) -> None:
    text = html(_report(found, "<b>stripes</b> & more"))
    page = Page()
    page.feed(text)
    assert page.open == []
    outside = [load for load in page.loads if not load.startswith(("img data:image/png", "use #"))]
    assert outside == []
    assert not re.search(r"url\((?!#)", text)
    assert "<b>stripes</b>" not in text
    assert "<three>" not in text
    seen = "".join(page.text)
    for row in rows(found, CONFIG):
        assert row.name in seen
        assert row.value in seen
    for words in ("ab12", "cd34", "sqlite:///a&b.db", "2.00 GiB", "100 s", "meets all 3 demands"):
        assert words in seen


def test_a_missed_demand_is_told(found: Evaluation) -> None:
    wrong = judge(stripes(60, 5).images.flip(2), found.asked, found.scores, 3, TRAIN, HELD_OUT, CONFIG)
    text = html(_report(wrong))
    assert "misses: Samples of the asked class" in text
    assert ("MISSED", "Samples of the asked class") in [line[:2] for line in plain(rows(wrong, CONFIG))]


def test_a_page_without_classes_curves_and_lineage(found: Evaluation) -> None:
    bare = judge(found.samples, None, {}, 0, Labelled(TRAIN.images, None), Labelled(HELD_OUT.images, None), CONFIG)
    page = Page()
    page.feed(html(Report("bare", "", bare, CONFIG, Labelled(TRAIN.images, None), Labelled(HELD_OUT.images, None))))
    assert page.open == []
    assert empty_boxes(html(_report(bare))) == []


def test_every_box_has_content(found: Evaluation) -> None:
    whole = _report(found)
    assert empty_boxes(html(whole)) == []
    for broken in (
        replace(whole, lineage=[Link("Endpoint", [("answers with digest", "")])]),
        replace(whole, commands=[("", "ls")]),
        replace(whole, title=" "),
    ):
        assert len(empty_boxes(html(broken))) == 1
    assert "Training loss" not in html(replace(whole, losses=[Curve("loss", [], [])]))


def test_what_was_demanded_and_not_measured_is_a_miss(found: Evaluation) -> None:
    """One class: nothing to tell apart, with a demand and without one."""
    labels = torch.zeros(len(TRAIN.images), dtype=torch.int64)
    train, held = Labelled(TRAIN.images, labels), Labelled(HELD_OUT.images, labels[: len(HELD_OUT.images)])
    asked = torch.zeros(len(found.samples), dtype=torch.int64)
    lone = judge(found.samples, asked, {}, 1, train, held, replace(CONFIG, features="auto"))
    assert lone.agreement is None
    assert "pixels" in lone.features
    table = {row.name: row for row in rows(lone, CONFIG)}
    assert table["Samples of the asked class"].ok is False
    assert table["Samples of the asked class"].value == "not measured"
    assert "Samples of the asked class" not in {row.name for row in rows(lone, replace(CONFIG, min_agreement=None))}


def test_charts_are_the_same_for_the_same_numbers() -> None:
    curves = [Curve("a", [1, 2], [3.0, 4.0])]
    assert charts.lines(curves, "x", "y") == charts.lines(curves, "x", "y")


def test_a_grid_holds_every_image_in_its_place() -> None:
    images = stripes(5, 0).images
    picture = pictures.grid(images, 3)
    assert picture.shape == (1, 2 * 8 + 1, 3 * 8 + 2)
    assert torch.equal(picture[:, 9:17, 9:17], images[4])
    from pipeline.data.formats.codecs import decode

    decoded = torch.from_numpy(decode(pictures.png(picture, 2), 1)).permute(2, 0, 1)
    assert torch.equal(decoded[:, ::2, ::2], picture)


def test_classes_are_rows_in_order() -> None:
    real = stripes(9, 0)
    assert real.labels is not None
    chosen, columns = pictures.by_class(real.images, real.labels, 3, 2)
    assert columns == 2
    assert torch.equal(chosen, real.images[[0, 3, 1, 4, 2, 5]])
