"""Held-out scores: the same for any number of ranks; the curve's errors are those of the bound."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import assembly
from pipeline.config import RunConfig, from_plain
from pipeline.data.sets.manifest import Manifest
from pipeline.diffusion.denoiser import Denoiser
from pipeline.model import build
from pipeline.training.step import Place
from pipeline.training.task import HeldOut

LEVELS = 4


@pytest.fixture
def config(tmp_path: Path, made: Callable[..., Manifest]) -> RunConfig:
    data = made(300, channels=1, held_out=0.5)
    network = {"name": "unet", "base_width": 8, "multipliers": [1, 2], "blocks": 1, "attention_at": [4]}
    values: dict[str, Any] = {
        "name": "small",
        "output": str(tmp_path / "out"),
        "shard": {"source": "x", "url": data.url, "image_size": 8},
        "stream": {"url": data.url, "batch_size": 8, "logical_shards": 4},
        "model": {"size": 8, "channels": 1, "classes": 3, "network": network},
        "training": {"evaluate_images": 150, "evaluate_levels": LEVELS},
    }
    return from_plain(values)


def trained(config: RunConfig) -> Denoiser:
    torch.manual_seed(0)
    denoiser = build(config.model)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return denoiser


def test_ranks_do_not_change_a_score(config: RunConfig) -> None:
    denoiser, manifest = trained(config), assembly.data(config)

    def scores(world: int) -> HeldOut:
        parts = [assembly.Held(config, manifest).scores(denoiser, Place(rank, world)) for rank in range(world)]
        return HeldOut(*(torch.stack(columns).sum(0) for columns in zip(*map(fields, parts), strict=True)))

    def fields(part: HeldOut) -> tuple[torch.Tensor, ...]:
        return part.bits_per_dim, part.gamma, part.error

    alone = scores(1)
    assert alone.bits_per_dim.shape[0] > 2 * assembly.SCORED_AT_ONCE, "every rank of 3 has a group"
    for world in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(fields(alone), fields(scores(world)), strict=True))
    low, high = denoiser.process.gamma_min, denoiser.process.gamma_max
    place = (alone.gamma - low) / (high - low) * LEVELS
    assert torch.equal(place.floor(), torch.arange(LEVELS).expand_as(place).double()), "one in each part of the range"
    assert bool((alone.error > 0).all())
