"""Folders of real images for tests, sets made of them, and their epochs."""

from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pipeline.data.making.shards import ShardConfig, shard_in_process
from pipeline.data.reading.stream import Batch, StreamConfig, thread_stream
from pipeline.data.sets.manifest import Manifest


def write_images(folder: Path, count: int, size: int, channels: int = 3, classes: int = 3, seed: int = 0) -> None:
    """`count` PNGs of smooth noise in `classes` sub-folders (0: none)."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        small = rng.integers(0, 256, (max(2, size // 4), max(2, size // 4), channels), dtype=np.uint8)
        pixels = cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC)
        place = folder / f"class{i % classes}" if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(place / f"{i:05d}.png"), pixels)


def small_set(folder: Path, count: int = 96, size: int = 8, **config: Any) -> Manifest:
    """A set of that many grey images, 12 a shard, all for training unless `config` says otherwise."""
    write_images(folder / "images", count, size, config.get("channels", 1))
    values: dict[str, Any] = {"image_size": size, "channels": 1, "samples_per_shard": 12, "held_out": 0.0} | config
    return shard_in_process(ShardConfig(str(folder / "images"), str(folder / "set"), **values))


def epoch_of(config: StreamConfig, done: Manifest, workers: int = 1, start: int = 0) -> list[Batch]:
    """One epoch's batches from a step on, all workers', in steps and parts; the epoch must be whole steps."""
    total = done.split("train").total
    assert total % config.batch_size == 0
    steps = total // config.batch_size
    made: list[Batch] = []
    for rank in range(workers):
        parts = range(rank, config.logical_shards, workers)
        with thread_stream(config, done, parts, start) as source:
            made += islice(source, steps * len(parts))
    return sorted(made, key=lambda batch: (batch.step, batch.logical_shard))
