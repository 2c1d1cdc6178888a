"""The Ray feed: batch for batch the in-process stream, bounded, clean, retried."""

import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import RayTaskError, TaskCancelledError

from pipeline.cluster import feed
from pipeline.data.formats.tar import DamagedShard
from pipeline.data.making.shards import ShardConfig, shard_in_process
from pipeline.data.reading import stream
from pipeline.data.reading.stream import StreamConfig
from pipeline.data.sets.manifest import Manifest
from tests.cluster import reader_tasks
from tests.data.folders import write_images


def config(done: Manifest, **values: Any) -> StreamConfig:
    defaults: dict[str, Any] = {"batch_size": 24, "logical_shards": 4, "window": 2, "flip": 0.5}
    chosen: dict[str, Any] = {**defaults, "read_ahead_bytes": 1 << 16, **values}
    return StreamConfig(done.url, **chosen)


def test_the_same_batches_as_in_process(small_set: Manifest, ray_cluster: None) -> None:
    settings = config(small_set)
    with (
        feed.ray_stream(settings, small_set, [1, 3], 5) as far,
        stream.thread_stream(settings, small_set, [1, 3], 5) as near,
    ):
        for a, b in islice(zip(far, near, strict=True), 60):
            assert a.images.is_contiguous()
            assert (a.step, a.logical_shard) == (b.step, b.logical_shard)
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.ids, b.ids)
            assert a.labels is not None
            assert b.labels is not None
            assert torch.equal(a.labels, b.labels)
        assert far.step == near.step


def test_read_ahead_is_bounded_and_blocks_are_dropped(small_set: Manifest, ray_cluster: None) -> None:
    settings = config(small_set, batch_size=512, read_ahead_bytes=6 * 128 * 64 * 2)
    block_bytes = 128 * 64
    with feed.ray_stream(settings, small_set, [0, 1], 0) as source:
        assert source.steps_a_block * block_bytes * source.most_blocks <= settings.read_ahead_bytes
        most = 0
        for _ in range(60):
            next(source)
            most = max(most, len(source.under_way))
        assert 2 <= most <= source.most_blocks


def test_errors_arrive_as_they_are(ray_cluster: None, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 100, 8, seed=1)  # bytes that no reader has verified and kept
    done = shard_in_process(ShardConfig(str(tmp_path / "images"), str(tmp_path / "set"), image_size=8, channels=1))
    path = Path(done.url, done.shards["url"][0].as_py())
    good = path.read_bytes()
    path.write_bytes(good[:-512])
    with (
        feed.ray_stream(config(done), done, [0, 1, 2, 3]) as source,
        pytest.raises(DamagedShard, match=str(path)) as caught,
    ):
        next(source)
    assert caught.value.offset == len(good) - 512


def test_close_cancels_what_is_under_way(small_set: Manifest, ray_cluster: None) -> None:
    source = feed.ray_stream(config(small_set), small_set, [0, 1])
    source.readers.task = ray.remote(reader_tasks.slow).options(num_cpus=0.25)  # pyright: ignore[reportAttributeAccessIssue]
    handles = [source.readers.submit(next(source._requests(0))) for _ in range(6)]
    source.under_way.extend(handles)
    deadline = time.monotonic() + 30
    while not list(Path(small_set.url).glob("started-*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    began = time.monotonic()
    source.close()
    assert time.monotonic() - began < 20
    for handle in handles:
        with pytest.raises((TaskCancelledError, RayTaskError)):
            ray.get(handle, timeout=5)


def test_a_killed_reader_is_replaced(small_set: Manifest, ray_cluster: None) -> None:
    settings = config(small_set)
    with (
        feed.ray_stream(settings, small_set, [0], 0) as source,
        stream.thread_stream(settings, small_set, [0], 0) as near,
    ):
        source.readers.task = ray.remote(reader_tasks.deadly_once).options(num_cpus=0.25, max_retries=3)  # pyright: ignore[reportAttributeAccessIssue]
        got = [batch.ids.tolist() for batch in islice(source, 10)]
        assert got == [batch.ids.tolist() for batch in islice(near, 10)]
    assert Path(small_set.url, "died").exists()
