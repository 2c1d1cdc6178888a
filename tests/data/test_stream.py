"""The stream: exactly once, the same list through any resume and resize, nothing unverified."""

import hashlib
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.config import ON_DAMAGE
from pipeline.data.formats.tar import DamagedShard
from pipeline.data.reading import blocks, stream
from pipeline.data.reading.blocks import DAMAGE_POLICIES
from pipeline.data.reading.stream import Batch, StreamConfig
from pipeline.data.sets import manifest
from pipeline.data.sets.manifest import Manifest


def config(done: Manifest, **values: Any) -> StreamConfig:
    defaults: dict[str, Any] = {"batch_size": 12, "logical_shards": 6, "window": 2, "read_ahead_bytes": 1 << 15}
    return StreamConfig(done.url, **(defaults | values))


def batches(settings: StreamConfig, done: Manifest, parts: Sequence[int], start: int, steps: int) -> list[Batch]:
    with stream.thread_stream(settings, done, parts, start) as source:
        return list(islice(source, steps * len(parts)))


def global_ids(settings: StreamConfig, done: Manifest, worlds: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The ids of each global batch when the run goes through (workers, steps) stretches."""
    made: list[list[int]] = []
    step = 0
    for workers, steps in worlds:
        rows: dict[tuple[int, int], list[int]] = {}
        for rank in range(workers):
            for batch in batches(settings, done, range(rank, settings.logical_shards, workers), step, steps):
                rows[batch.step, batch.logical_shard] = batch.ids.tolist()
        made += [
            [i for part in range(settings.logical_shards) for i in rows[k, part]] for k in range(step, step + steps)
        ]
        step += steps
    return made


def pixels_by_id(done: Manifest) -> dict[int, bytes]:
    """The stored pixel digest of every training sample, from the table, by sample id."""
    split = done.split("train")
    place = {url: int(split.starts[i]) for i, url in enumerate(split.urls.to_pylist())}
    found: dict[int, bytes] = {}
    for row in manifest.samples(done).to_pylist():
        if row["shard"] in place:
            found[place[row["shard"]]] = row["content"]
            place[row["shard"]] += 1
    return found


@pytest.mark.parametrize("encoding", ["png", "raw"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_labels_and_ids_belong_together_and_come_once(
    made: Callable[..., Manifest], encoding: str, channels: int
) -> None:
    done = made(90, 8, channels, encoding=encoding, held_out=0.0)
    contents = pixels_by_id(done)
    labels = [row["label"] for row in manifest.samples(done).to_pylist()]
    seen: list[int] = []
    for batch in batches(config(done, batch_size=18, logical_shards=3), done, [0, 1, 2], 0, 5):
        assert batch.images.shape == (6, channels, 8, 8)
        assert batch.images.dtype == torch.uint8
        layout = torch.contiguous_format if encoding == "raw" else torch.channels_last
        assert batch.images.is_contiguous(memory_format=layout)
        assert batch.labels is not None
        for image, label, name in zip(batch.images.numpy(), batch.labels.tolist(), batch.ids.tolist(), strict=True):
            hwc = np.ascontiguousarray(image.transpose(1, 2, 0))
            assert hashlib.sha256(b"8 8 %d\n" % channels + hwc.tobytes()).digest() == contents[name]
            assert label == labels[name]
            seen.append(name)
    assert sorted(seen) == list(range(90))


@pytest.mark.parametrize("seed", range(20))
def test_resize_and_resume_give_the_same_list(made: Callable[..., Manifest], seed: int) -> None:
    done = made(50, 4, 1, held_out=0.0, samples_per_shard=7)
    settings = config(done, seed=seed)
    rng = np.random.default_rng(seed)
    stretches = [(workers, int(rng.integers(1, 5))) for workers in (2, 3, 1, 2)]
    steps = sum(n for _, n in stretches)
    reference = global_ids(settings, done, [(1, steps)])
    assert global_ids(settings, done, stretches) == reference
    epoch = [name for step in reference for name in step][:48]
    assert len(set(epoch)) == 48


def test_ten_resumes_at_the_awkward_steps(made: Callable[..., Manifest]) -> None:
    done = made(48, 4, 1, held_out=0.0, samples_per_shard=7)  # four steps an epoch
    settings = config(done)
    reference = global_ids(settings, done, [(1, 12)])
    assert global_ids(settings, done, [(1, n) for n in (0, 1, 2, 1, 1, 3, 0, 2, 1, 1)]) == reference
    for epoch in range(3):
        ids = [name for step in reference[4 * epoch : 4 * epoch + 4] for name in step]
        assert sorted(ids) == list(range(48))


def test_the_state_is_one_integer(made: Callable[..., Manifest]) -> None:
    done = made(48, 4, 1)
    settings = config(done, flip=0.5, read_ahead_bytes=2 * 3 * 2 * 16 * 2)
    whole = batches(settings, done, [0, 2, 4], 0, 9)
    with stream.thread_stream(settings, done, [0, 2, 4]) as source:
        head = list(islice(source, 4 * 3))
        step = source.step
    tail = batches(settings, done, [0, 2, 4], step, 5)
    assert step == 4
    for a, b in zip(whole, head + tail, strict=True):
        assert (a.step, a.logical_shard) == (b.step, b.logical_shard)
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.images, b.images)


def test_flips_are_keyed_by_position(made: Callable[..., Manifest]) -> None:
    done = made(64, 4, 3, held_out=0.0)
    plain = batches(config(done, batch_size=8, logical_shards=2), done, [0, 1], 0, 50)
    flipped = batches(config(done, batch_size=8, logical_shards=2, flip=0.5), done, [0, 1], 0, 50)
    kinds: list[bool] = []
    for a, b in zip(plain, flipped, strict=True):
        for left, right in zip(a.images, b.images, strict=True):
            same, mirrored = torch.equal(left, right), torch.equal(left.flip(-1), right)
            assert same or mirrored
            kinds.append(mirrored)
    assert 140 < sum(kinds) < 260
    first_epoch, second_epoch = kinds[:64], kinds[64:128]
    assert first_epoch != second_epoch


def test_block_size_does_not_change_what_is_read(made: Callable[..., Manifest]) -> None:
    done = made(64, 4, 1)
    sizes = [2 * 2 * 3 * 16 * n for n in (1, 3, 1000)]
    lists = [[b.ids.tolist() for b in batches(config(done, read_ahead_bytes=n), done, [1, 4], 3, 20)] for n in sizes]
    assert lists[0] == lists[1] == lists[2]
    with pytest.raises(ValueError, match="need at least 128"):
        batches(config(done, read_ahead_bytes=100), done, [1, 4], 0, 1)


def test_sets_without_classes_give_no_labels(made: Callable[..., Manifest]) -> None:
    done = made(30, 4, 1, classes=0)
    assert all(batch.labels is None for batch in batches(config(done), done, [0], 0, 3))
    assert stream.held_out(done).labels is None


def test_splits_are_loaded_whole_and_bounded(made: Callable[..., Manifest]) -> None:
    done = made(80, 8, 3, held_out=0.4)
    held, train = stream.held_out(done), stream.train_images(done)
    assert len(held.ids) == done.card["samples"]["held_out"]
    assert train.ids.tolist() == list(range(done.card["samples"]["train"]))
    contents = pixels_by_id(done)
    for image, name in zip(train.images.numpy(), train.ids.tolist(), strict=True):
        assert (
            hashlib.sha256(b"8 8 3\n" + np.ascontiguousarray(image.transpose(1, 2, 0)).tobytes()).digest()
            == contents[name]
        )
    assert torch.equal(stream.held_out(done, limit=5).images, held.images[:5])
    with pytest.raises(ValueError, match="give a limit"):
        stream.held_out(done, max_bytes=1000)
    whole = made(20, 8, 3, held_out=0.0, name="none")
    with pytest.raises(ValueError, match="has no held_out images"):
        stream.held_out(whole)


def test_damage_is_named(made: Callable[..., Manifest]) -> None:
    done = made(40, 8, 1, held_out=0.0)
    path = Path(done.url, done.shards["url"][0].as_py())
    good = path.read_bytes()
    for bad in (good[:-512], good + b"x", good[:700] + bytes([good[700] ^ 1]) + good[701:], b""):
        path.write_bytes(bad)
        blocks.CACHE.clear()
        with pytest.raises(DamagedShard, match=str(path)) as caught:
            batches(config(done), done, range(6), 0, 10)
        assert caught.value.expected != caught.value.got
    path.unlink()
    with pytest.raises(DamagedShard, match="no such file"):
        batches(config(done), done, range(6), 0, 10)


def test_the_cache_is_bounded_and_reads_each_shard_once(
    made: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = made(128, 8, 1, held_out=0.0)
    reads: list[str] = []
    real = blocks.fetch

    def counted(of: blocks.SetRef, ref: blocks.ShardRef, reading: blocks.Reading) -> blocks.VerifiedShard:
        reads.append(ref.url)
        return real(of, ref, reading)

    monkeypatch.setattr(blocks, "fetch", counted)
    settings = config(done, batch_size=16, logical_shards=1, readers=4, read_ahead_bytes=2 * 16 * 64)
    with stream.thread_stream(settings, done, [0]) as source:
        for _ in range(8):
            next(source)
        assert source.steps_a_block == 1
    reads_in_an_epoch = reads[:8]
    assert len(set(reads_in_an_epoch)) == 8
    kept = sum(len(shard.data) for shard in blocks.CACHE.kept.values())
    assert kept == blocks.CACHE.bytes
    split = done.split("train")
    blocks.CACHE.clear()
    small = int(split.sizes.max())
    with stream.thread_stream(config(done, cache_bytes=small), done, range(6)) as source:
        for _ in range(60):
            next(source)
            assert blocks.CACHE.bytes <= small


def test_close_leaves_no_thread(made: Callable[..., Manifest]) -> None:
    done = made(30, 4, 1)
    before = threading.active_count()
    source = stream.thread_stream(config(done, readers=3), done, [0])
    next(source)
    assert threading.active_count() > before
    source.close()
    source.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(source)


def test_refusals(made: Callable[..., Manifest]) -> None:
    done = made(30, 4, 1)
    for parts, start in (([], 0), ([0, 0], 0), ([6], 0), ([-1], 0), ([0], -1)):
        with pytest.raises(ValueError):
            stream.thread_stream(config(done), done, parts, start)
    wrong: list[dict[str, Any]] = [
        {"batch_size": 10, "logical_shards": 4},
        {"flip": 1.5},
        {"window": 0},
        {"readers": 0},
        {"cache_bytes": -1},
    ]
    for values in wrong:
        with pytest.raises(ValueError, match=list(values)[-1]):
            StreamConfig("x", **values)


def test_a_reader_process_loads_no_torch() -> None:
    code = (
        "import sys, pipeline.data.reading.blocks\n"
        "print([m for m in ('torch', 'boto3', 'webdataset', 'ray', 'mlflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_named_policy_of_damage_is_there() -> None:
    assert set(ON_DAMAGE) == set(DAMAGE_POLICIES)
