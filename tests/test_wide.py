"""Images that are not square: shard, train, sample, score and serve 12 x 16 of them; a square stays what it was."""

import asyncio
import base64
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pipeline
from pipeline import assembly, backbones, interchange
from pipeline.backbones import Architecture, DiTConfig, MLPConfig, UNetConfig, VDMConfig
from pipeline.config import parse
from pipeline.data.config import ShardConfig
from pipeline.data.formats.fit import POLICIES, fit
from pipeline.data.making.shards import shard_in_process
from pipeline.data.reading.stream import held_out, train_images
from pipeline.data.sets.manifest import ImageSpec
from pipeline.diffusion.conditioning import Conditioning
from pipeline.evaluation.features import Labelled, classifier_features
from pipeline.model import ModelConfig, build
from pipeline.serving.config import ServingConfig
from pipeline.serving.plans import plan_encoding, plan_generation, plan_likelihood
from pipeline.serving.refusals import RequestError
from pipeline.serving.requests import EncodingRequest, GenerationRequest, LikelihoodOptions, parse_body
from pipeline.serving.service import Identity, Service
from pipeline.size import settled, shown, sides
from pipeline.training.events import Finished

SIZE = (12, 16)  # height, width
UNET = UNetConfig(base_width=8, multipliers=(1, 2), blocks=1, attention_at=(6,), norm_groups=2, last_gain=1.0)
NETWORKS = {
    "unet": UNET,
    "dit": DiTConfig(width=32, layers=1, heads=2, patch=4),
    "vdm": VDMConfig(width=8, layers=1, norm_groups=2),
    "mlp": MLPConfig(width=16, blocks=1, level_width=8),
}
RUN = """
name: wide
output: {folder}/run
shard: {{source: {folder}/images, url: {folder}/set, image_size: [12, 16], channels: 3, held_out: 0.3}}
stream: {{url: {folder}/set, batch_size: 8, logical_shards: 1, readers: 1}}
model: {{size: [12, 16], channels: 3, classes: 2, network: {{name: unet, base_width: 8, multipliers: [1, 2], blocks: 1,
  attention_at: [6], norm_groups: 2, dropout: 0.0}}}}
training: {{images: 32, warmup_images: 8, label_dropout: 0.2, evaluate_images: 4, sample_images: 4,
  evaluate_every_images: 32, sample_every_images: 32, checkpoint_every_images: 0}}
"""


@pytest.mark.parametrize("given", [64, (64, 64), [64, 64]])
def test_a_square_is_one_number(given: Any) -> None:
    config = ModelConfig(size=given)
    assert json.dumps(asdict(config)) == json.dumps(asdict(ModelConfig(size=64)))
    assert config == ModelConfig(size=64)
    assert json.loads(json.dumps(asdict(ImageSpec(given, 3, "png"))))["size"] == 64
    assert ShardConfig("a", "b", image_size=given).policy == ShardConfig("a", "b", image_size=64).policy
    assert sides(settled(given)) == (64, 64)


def test_height_comes_first_and_a_request_says_width_first() -> None:
    assert ModelConfig(size=SIZE).image_shape == ImageSpec(SIZE, 3, "png").shape == (3, 12, 16)
    assert shown(SIZE) == "16x12"
    back = json.loads(json.dumps(asdict(ModelConfig(size=SIZE))))
    assert ModelConfig(**back) == ModelConfig(size=SIZE)
    policy = ShardConfig("a", "b", image_size=SIZE).policy
    assert json.loads(json.dumps(policy)) == policy


@pytest.mark.parametrize("bad", [0, (8,), (8, 8, 8), (8, -8), "64", 8.0, True, None])
def test_what_is_no_size_is_refused(bad: Any) -> None:
    for made in (lambda: ModelConfig(size=bad), lambda: ShardConfig("a", "b", image_size=bad)):
        with pytest.raises(ValueError, match=re.escape(f"size is {bad!r}; a whole number of at least 1 is needed")):
            made()


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_take_both_sides(name: str) -> None:
    network = Architecture(NETWORKS[name], 3, SIZE, 0, 3).build().eval()
    z = torch.randn(2, 3, *SIZE)
    assert network(z, torch.zeros(2), Conditioning()).shape == z.shape


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        (UNET, (12, 15), "image size 15x12 (width x height) cannot be halved 1 times"),
        (UNET, (13, 16), "image size 16x13 (width x height) cannot be halved 1 times"),
        (
            UNetConfig(attention_at=(8,), multipliers=(1, 1)),
            (12, 16),
            "works at [12, 6] pixels a side, the shorter one",
        ),
        (NETWORKS["dit"], (12, 18), "image size 18x12 (width x height) does not divide into patches of 4"),
    ],
)
def test_sides_that_do_not_divide_are_refused(config: Any, size: Sequence[int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        backbones.build(config, 3, (size[0], size[1]), 0, 3)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "exact"])
def test_images_are_made_to_fit(policy: str) -> None:
    flat = np.full((40, 30, 3), 77, np.uint8)
    assert (fit(flat, SIZE, policy) == 77).all()
    assert fit(flat, SIZE, policy).shape == (*SIZE, 3)
    assert np.array_equal(fit(fit(flat, SIZE, policy), SIZE, "exact"), fit(flat, SIZE, policy))
    with pytest.raises(ValueError, match="30 x 40 pixels where resize: exact wants 16 x 12"):
        fit(flat, SIZE, "exact")


def write(folder: Path) -> None:
    """24 images of two classes, some higher than wide."""
    random = np.random.default_rng(0)
    for i in range(24):
        place = folder / "images" / ("dark", "light")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        shape = (12, 16, 3) if i % 3 else (40, 30, 3)
        pixels = random.normal(190 if i % 2 else 60, 20, shape).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")


def test_wide_images_from_the_folder_to_the_endpoint(tmp_path: Path) -> None:
    write(tmp_path)
    config = parse(RUN.format(folder=tmp_path), [], "run.yaml")
    shard_in_process(config.shard)
    manifest = assembly.data(config)
    assert manifest.image.shape == (3, *SIZE)
    assert isinstance(list(assembly.train_here(config))[-1], Finished)
    model = pipeline.load(assembly.export(config, manifest))
    assert model.space.shape == (3, *SIZE)
    images = model.sample(2, "ddim", steps=2, labels=[0, 1])
    assert images.shape == (2, 3, *SIZE)
    held = held_out(manifest)
    assert model.bits_per_dim(held.images, "vlb", levels=2).bits_per_dim.isfinite().all()
    train = train_images(manifest)
    parts = [Labelled(part.images, part.labels) for part in (train, held)]
    assert classifier_features(parts[0], parts[1], 2, 0).extract(images).shape == (2, 64)
    with pytest.raises(ValueError, match="size is 16x12; diffusers' sample_size is one number"):
        interchange.export(model, tmp_path / "diffusers")
    assert not (tmp_path / "diffusers").exists()
    serve(model, images)


def serve(model: Any, images: torch.Tensor) -> None:
    """In process: a picture's size, a request's, a score, a latent."""
    how = ServingConfig(model="wide")
    png = base64.b64decode
    service = Service(model, how, Identity("wide", "1", model.digest))
    try:
        about = asyncio.run(service.describe())
        assert (about["height"], about["width"]) == SIZE
    finally:
        service.close(drain=False, timeout_s=20)
    asked = parse_body(GenerationRequest, {"size": "16x12", "sampler": "ddim", "steps": 2})
    made = model.space.decode(_driven(plan_generation(asked, model, how, 0).build(model), model))
    assert made.shape == (1, 3, *SIZE)
    with pytest.raises(RequestError, match="images of 16x12 pixels, got '12x16'"):
        plan_generation(parse_body(GenerationRequest, {"size": "12x16"}), model, how, 0)
    encoded = service._pngs(model.space.encode(images))  # pyright: ignore[reportPrivateUsage]
    scored = plan_likelihood(
        parse_body(LikelihoodOptions, {"options": {"levels": 2}}), [png(encoded[0])], model, how, 0
    )
    assert torch.equal(scored.pixels, images[:1])
    latent = base64.b64encode(np.zeros((3, *SIZE), "<f4").tobytes()).decode()
    wanted = parse_body(EncodingRequest, {"latents": [latent], "sampler": "ddim", "steps": 2})
    assert plan_encoding(wanted, model, how).n == 1
    turned = service._pngs(model.space.encode(images).transpose(2, 3))  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(RequestError, match="takes images of 16 x 12 pixels, got 12 x 16"):
        plan_likelihood(parse_body(LikelihoodOptions, {}), [png(turned[0])], model, how, 0)


def _driven(procedure: Any, model: Any) -> torch.Tensor:
    from pipeline.diffusion.procedure import drive

    return drive(procedure, model.networks)


def test_weights_do_not_depend_on_how_a_square_is_spelt() -> None:
    made = []
    for size in (8, (8, 8)):
        torch.manual_seed(0)
        made.append(build(ModelConfig(size=size, network={"name": "dit", "width": 32, "layers": 1, "heads": 2})))
    first, second = (each.state_dict() for each in made)
    assert all(torch.equal(first[name], second[name]) for name in first)
