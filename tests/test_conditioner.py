"""What a model is told: batches and requests become `Conditioning` in one place; tags go through the whole run."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import pipeline
from pipeline import assembly
from pipeline.conditioner import KINDS, Conditioner, ConditionError, numbered
from pipeline.config import RunConfig, parse
from pipeline.data.making.shards import shard_in_process
from pipeline.data.reading.stream import Batch, held_out, train_images
from pipeline.diffusion.conditioning import Conditioning, concatenate
from pipeline.evaluation.config import EvaluationConfig
from pipeline.evaluation.features import Labelled
from pipeline.evaluation.measure import evaluate
from pipeline.evaluation.work import here
from pipeline.model import Sampling, Scoring
from pipeline.serving.config import ServingConfig
from pipeline.serving.plans import plan_generation, plan_likelihood
from pipeline.serving.refusals import RequestError
from pipeline.serving.requests import GenerationRequest, LikelihoodOptions, parse_body
from pipeline.training.events import Finished

NAMES = ("dark", "light", "left")
TAGS = Conditioner("tags", NAMES)
LABELS = Conditioner("labels", NAMES)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_and_a_request_that_say_the_same_become_the_same(kind: str) -> None:
    told = Batch(
        0, 0, torch.zeros(2, 1, 8, 8), torch.tensor([2, 0]), torch.arange(2), torch.tensor([[0, 1, 1], [1, 0, 0]])
    )
    conditioner = Conditioner(kind, NAMES)
    asked = {"labels": [2, 0], "tags": [["light", "left"], ["dark"]]}
    assert conditioner.of(told).same(conditioner.asked(2, {kind: asked[kind]}))
    echo = [conditioner.echo(conditioner.of(told), row) for row in range(2)]
    assert echo == (
        [{"label": 2}, {"label": 0}] if kind == "labels" else [{"tags": ["light", "left"]}, {"tags": ["dark"]}]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_rows_ask_for_nothing(kind: str) -> None:
    conditioner = Conditioner(kind, NAMES)
    told = conditioner.in_turn(range(6))
    rows = torch.tensor([True, False, True, False, False, True])
    dropped, nothing = told.dropped(rows), conditioner.nothing(6)
    for row in range(6):
        assert dropped[row : row + 1].same((nothing if rows[row] else told)[row : row + 1])
    assert told.unconditional().same(nothing)
    assert concatenate([told[:2], told[2:]]).same(told)


def test_one_for_all_or_one_each() -> None:
    assert TAGS.asked(2, {"tags": ["light"]}).same(TAGS.asked(2, {"tags": [["light"], ["light"]]}))
    assert TAGS.asked(2, {"tags": []}).same(TAGS.nothing(2))
    assert TAGS.asked(1, {"tags": [1]}).same(TAGS.asked(1, {"tags": ["light"]}))
    assert LABELS.asked(2, {"labels": 1}).same(LABELS.asked(2, {"labels": [1, 1]}))
    assert TAGS.prompted(1, "LIGHT, left").same(TAGS.asked(1, {"tags": ["light", "left"]}))
    assert numbered("labels", 0).asked(3, {"labels": -1}).same(Conditioning())


@pytest.mark.parametrize(
    ("conditioner", "fields", "text"),
    [
        (TAGS, {"tags": ["blue"]}, "knows no tag 'blue'; it knows dark, light, left"),
        (TAGS, {"tags": [["dark"]]}, "one for each of the 2 images, got 1"),
        (TAGS, {"tags": "dark"}, "must be a list"),
        (TAGS, {"tags": [True]}, "knows no tag True"),
        (TAGS, {"labels": 1}, "it is told tags"),
        (LABELS, {"tags": ["dark"]}, "not told tags; it is told labels"),
        (LABELS, {"labels": 3}, "must lie in 0..2"),
        (LABELS, {"labels": [0]}, "one for each of the 2 images, got 1"),
        (LABELS, {"labels": [0.5, 1.0]}, "whole numbers"),
        (numbered("labels", 0), {"labels": 1}, "no classes; it is told nothing"),
        (numbered("tags", 0), {"tags": ["dark"]}, "told nothing"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_field(conditioner: Conditioner, fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ConditionError, match=text) as caught:
        conditioner.asked(2, fields)
    assert caught.value.field == next(iter(fields))


RUN = """
name: tagged
output: {folder}/run
shard: {{source: {folder}/table.parquet, url: {folder}/set, image_size: 8, channels: 1, resize: exact, held_out: 0.3,
  classes: false, tags_field: tags, samples_per_shard: 32}}
stream: {{url: {folder}/set, batch_size: 32, logical_shards: 1, readers: 1}}
model: {{size: 8, channels: 1, condition: tags, classes: 3, prediction: v,
  network: {{name: mlp, width: 32, blocks: 1}}}}
objective: {{name: weighted, weight: v}}
training: {{images: 3200, warmup_images: 64, learning_rate: 3.0e-3, label_dropout: 0.1, evaluate_every_images: 3200,
  evaluate_images: 8, sample_every_images: 3200, sample_images: 6, checkpoint_every_images: 3200,
  ema_half_life_images: 500}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Trained on 120 images whose brightness is one tag or the other, with a third tag on the half of them."""
    folder = tmp_path_factory.mktemp("tagged")
    random, rows = np.random.default_rng(0), []
    for i in range(120):
        pixels = random.normal(190 if i % 2 else 60, 20, (8, 8))
        pixels[:, :4] += 40 * (i % 4 < 2)
        sink = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(sink, "PNG")
        rows.append((sink.getvalue(), [NAMES[i % 2]] + ["left"] * (i % 4 < 2)))
    pq.write_table(pa.table({"image": [r[0] for r in rows], "tags": [r[1] for r in rows]}), folder / "table.parquet")
    config = parse(RUN.format(folder=folder), [], "run.yaml")
    shard_in_process(config.shard)
    assert isinstance(list(assembly.train_here(config))[-1], Finished)
    return config


def test_tags_are_trained_sampled_scored_and_asked_for(run: RunConfig) -> None:
    manifest = assembly.data(run)
    model = pipeline.load(assembly.export(run, manifest))
    names = model.conditioner.names
    assert set(names) == set(NAMES)
    dark, light = (model.sample(64, Sampling("ddim", 20), tags=[tag]).float().mean() for tag in ("dark", "light"))
    assert light - dark > 60, "the tags are heard"
    guided = model.sample(64, Sampling("ddim", 20, guidance=2.0), tags=["light"]).float().mean()
    assert guided > dark
    held = held_out(manifest)
    told = model.conditioner.of(held)
    asked = [model.conditioner.echo(told, row)["tags"] for row in range(told.rows)]
    right = model.bits_per_dim(held.images, "vlb", tags=asked, levels=8).bits_per_dim
    wrong = model.bits_per_dim(
        held.images, "vlb", tags=[["dark"] if "light" in a else ["light"] for a in asked], levels=8
    )
    assert bool((right < wrong.bits_per_dim).double().mean() > 0.9), "an image's own tags explain it"
    seen = train_images(manifest)
    train, real = (Labelled(part.images, part.labels, part.tags) for part in (seen, held))
    how = EvaluationConfig(samples=8, sampling=Sampling("ddim", 4), estimators={"vlb": {"levels": 4}}, resamples=10)
    found = evaluate(here(model), model.conditioner, train, real, how)
    assert found.agreement is None
    assert found.scores["vlb"].mean > 0


def test_a_request_may_ask_for_tags(run: RunConfig) -> None:
    model = pipeline.load(assembly.export(run, assembly.data(run)))

    def plan(**fields: Any) -> Conditioning:
        request = parse_body(GenerationRequest, {"sampler": "ddim", **fields})
        return plan_generation(request, model, ServingConfig(), 0).conditioning

    asked = plan(n=2, tags=["light", "left"], guidance=2.0)
    assert asked.same(model.asked(2, tags=["light", "left"]))
    assert plan(prompt="light,left", n=2).same(asked)
    for fields, field in (({"tags": ["blue"]}, "tags"), ({"labels": 1}, "labels"), ({"prompt": "blue"}, "prompt")):
        with pytest.raises(RequestError) as refused:
            plan(**fields)
        assert refused.value.param == field
    with pytest.raises(RequestError, match="guidance needs tags"):
        plan(guidance=2.0)
    sink = io.BytesIO()
    Image.fromarray(np.full((8, 8), 190, np.uint8)).save(sink, "PNG")
    options = parse_body(LikelihoodOptions, {"tags": ["light"], "options": {"levels": 4}})
    scored = plan_likelihood(options, [sink.getvalue()], model, ServingConfig(), 0)
    assert scored.how == Scoring("vlb", {"levels": 4})
    assert scored.conditioning.same(model.asked(1, tags=["light"]))
