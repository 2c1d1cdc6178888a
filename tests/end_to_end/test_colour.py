"""The whole run in colour: shard, train, evaluate, register, serve, sample, export, and a training that starts from it.

With three classes, one and none; at 32 and 64 pixels.
"""

import asyncio
import base64
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

import pipeline
from jobs import evaluate, register, sample, train
from pipeline.config import RunConfig, from_plain
from pipeline.data.formats.codecs import decode, encode_png
from pipeline.data.making.shards import shard_in_process
from pipeline.data.reading.stream import held_out, train_images
from pipeline.data.sets.manifest import Manifest
from pipeline.evaluation.features import Labelled
from pipeline.evaluation.measure import rows
from pipeline.evaluation.report import Report, html
from pipeline.model import Model
from pipeline.serving.config import ServingConfig
from pipeline.serving.service import Identity, Service
from pipeline.web.app import make_app
from tests.end_to_end.colour_set import KINDS, write_colours
from tests.tracking.database import database

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own use of its libraries


def run_config(folder: Path, side: int, classes: int, name: str) -> RunConfig:
    """A tiny U-Net that diffusers can express, a few steps, the default estimators."""
    shards = str(folder / "shards")
    return from_plain(
        {
            "name": name,
            "output": str(folder / "run"),
            "shard": {
                **{"source": str(folder / "images"), "url": shards, "image_size": side, "channels": 3},
                **{"held_out": 0.3, "samples_per_shard": 32, "classes": bool(classes)},
            },
            "stream": {"url": shards, "batch_size": 8, "logical_shards": 1, "readers": 1},
            "model": {
                **{"size": side, "channels": 3, "classes": classes},
                "network": {
                    **{"name": "unet", "base_width": 8, "multipliers": [1, 2, 2], "blocks": 1, "attention_at": []},
                    **{"norm_groups": 2, "dropout": 0.0},
                },
            },
            "training": {
                **{"images": 80, "warmup_images": 16, "label_dropout": 0.2 if classes else 0.0},
                **{"evaluate_images": 4, "sample_images": 4, "checkpoint_every_images": 0},
            },
            "evaluation": {
                **{"samples": 6, "images": 2, "part": 6, "resamples": 4},
                "sampling": {"sampler": "ddim", "steps": 2},
                "estimators": {"vlb": {"levels": 4}, "ode": {"tolerance": 0.5}},
            },
            "cluster": {"workers": 1},
            "tracking": {"uri": database()},
        }
    )


def through(folder: Path, side: int, classes: int, kinds: tuple[str, ...]) -> tuple[RunConfig, Manifest, Model]:
    """Shard, train, evaluate and register; the registered model."""
    count = write_colours(folder / "images", side, 96 // len(kinds), kinds)
    config = run_config(folder, side, classes, f"colour-{side}-{classes}")
    manifest = shard_in_process(config.shard)
    assert sum(manifest.card["samples"].values()) == count
    assert train.run(config, local=True).complete
    found = evaluate.run(config, local=True)
    assert set(found.scores) == {"vlb", "ode"}
    assert found.samples.shape == (6, 3, side, side)
    assert (found.agreement is not None) == (classes > 1)
    real, held = train_images(manifest), held_out(manifest)
    report = Report(
        "colour", "", found, config.evaluation, Labelled(real.images, real.labels), Labelled(held.images, held.labels)
    )
    for row in rows(found, config.evaluation):
        assert row.value in html(report)
    version = register.run(config, found)
    model = pipeline.load(version.url, tracking_uri=config.tracking.uri)
    assert model.card["class_names"] == (list(kinds) if classes else [])
    return config, manifest, model


def test_three_classes_from_images_to_answers(tmp_path: Path) -> None:
    config, manifest, model = through(tmp_path, 32, 3, KINDS)
    made = sample.run(config, images=6, local=True)
    assert made.split("train").total == 6
    register.export(config, "diffusers", str(tmp_path / "diffusers"))
    for number, init in enumerate((f"models:/{config.registered_model}@champion", str(tmp_path / "diffusers"))):
        again = replace(config, output=str(tmp_path / f"again-{number}"), init=init)
        if number:  # the folder holds the unconditional network
            again = replace(again, model=replace(again.model, classes=0))
            again = replace(again, training=replace(again.training, label_dropout=0.0))
        again = replace(again, training=replace(again.training, images=16))
        assert train.run(again, local=True).complete
    answers(model, manifest)


def answers(model: Model, manifest: Manifest) -> None:
    """The endpoint's application in this process: samples, variations and likelihoods as the model itself has them."""
    service = Service(model, ServingConfig(model="colour", steps=3), Identity("colour", "1", model.digest, ()))
    held = held_out(manifest, 2)
    assert held.labels is not None
    encoded = [base64.b64encode(encode_png(each.permute(1, 2, 0).numpy())).decode() for each in held.images]

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(make_app(service, service.config))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            labels = held.labels.tolist() if held.labels is not None else None
            return [
                await client.post("/v1/images/generations", json={"n": 2, "labels": [0, 2], "seed": 1}),
                await client.post("/v1/likelihood", json={"images": encoded, "labels": labels, "seed": 1}),
            ]

    try:
        generated, scored = asyncio.run(ask())
    finally:
        assert service.close(drain=False, timeout_s=20)
    assert generated.status_code == scored.status_code == 200, generated.text + scored.text
    pixels = torch.stack(
        [torch.from_numpy(decode(base64.b64decode(item["b64_json"]), 3)) for item in generated.json()["data"]]
    )
    assert pixels.shape == (2, *manifest.image.shape[1:], 3)
    expected = model.bits_per_dim(held.images, labels=held.labels.tolist(), seed=1).bits_per_dim
    found = torch.tensor([item["bits_per_dim"] for item in scored.json()["data"]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_one_class_at_64_pixels(tmp_path: Path) -> None:
    through(tmp_path, 64, 1, ("flower",))


def test_no_classes_at_32_pixels(tmp_path: Path) -> None:
    config, _, _ = through(tmp_path, 32, 0, KINDS)
    demanding = replace(config, evaluation=replace(config.evaluation, min_agreement=0.9))
    with pytest.raises(ValueError, match=r"min_agreement demands 0.9, and with no classes"):
        evaluate.run(demanding, local=True)
    lone = replace(config, evaluation=replace(config.evaluation, estimators={"vbl": {}}))
    with pytest.raises(ValueError, match=r"estimator 'vbl' \(did you mean 'vlb'"):
        evaluate.run(lone, local=True)
