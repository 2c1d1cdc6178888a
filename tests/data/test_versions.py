"""A set that grows, loses images by take-down, drops copies; mixtures of sets."""

import hashlib
import shutil
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.making import shards
from pipeline.data.making.shards import ShardConfig
from pipeline.data.reading import stream
from pipeline.data.reading.order import Mixture
from pipeline.data.reading.stream import StreamConfig
from pipeline.data.sets import manifest, versions
from pipeline.data.sets.manifest import Manifest
from tests.data.folders import epoch_of, small_set, write_images


def config(tmp_path: Path, **values: Any) -> ShardConfig:
    defaults: dict[str, Any] = {"image_size": 8, "channels": 1, "samples_per_shard": 12, "held_out": 0.25}
    places: dict[str, Any] = {"source": str(tmp_path / "images"), "url": str(tmp_path / "set")}
    return ShardConfig(**(places | defaults | values))


def sources(done: Manifest) -> list[str]:
    return manifest.samples(done)["source"].to_pylist()


def read(done: Manifest) -> Counter[int]:
    """Ids of one pass over the training split, by the order's own tables."""
    split = done.split("train")
    order = stream.Requests(StreamConfig(done.url, batch_size=1, logical_shards=1), done)
    return Counter(order.block(0, 0, split.total).ids.tolist())


def test_a_set_grows_and_leaves_its_shards_alone(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 60, 8, 1)
    first = shards.shard_in_process(config(tmp_path))
    files = {p: p.stat().st_mtime_ns for p in Path(first.url, "shards").iterdir()}
    assert shards.shard_in_process(config(tmp_path)).digest == first.digest
    write_images(tmp_path / "more", 40, 8, 1, classes=5, seed=9)
    for path in sorted((tmp_path / "more").rglob("*.png")):
        target = tmp_path / "images" / path.parent.name / f"new-{path.name}"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    (tmp_path / "images" / "class0" / "bad.png").write_bytes(b"no")
    second = shards.shard_in_process(config(tmp_path))
    assert (first.version, second.version) == (1, 2)
    assert second.class_names == ("class0", "class1", "class2", "class3", "class4")
    assert {p: p.stat().st_mtime_ns for p in files} == files
    assert sorted(sources(second)) == sorted(
        str(p.relative_to(tmp_path / "images")) for p in (tmp_path / "images").rglob("*.png") if p.name != "bad.png"
    )
    assert second.card["samples"] == {split: second.split(split).total for split in ("train", "held_out")}
    assert sum(second.card["samples"].values()) == 100
    assert second.card["rejected"] == 1
    assert read(second) == Counter(range(second.split("train").total))
    again = shards.shard_in_process(config(tmp_path))
    assert again.digest == second.digest
    assert manifest.load(first.url, first.digest).shards.equals(first.shards)
    with pytest.raises(ValueError, match="has no version 000000000000, its newest is"):
        manifest.load(first.url, "0" * 64)
    assert not list(Path(first.url).glob("building-*"))
    for row in manifest.samples(second).to_pylist():
        assert second.class_names[row["label"]] == row["source"].partition("/")[0]
    whole = shards.shard_in_process(replace(config(tmp_path), url=str(tmp_path / "whole")))
    for name in ("channel_mean", "channel_std"):
        assert second.card[name] == pytest.approx(whole.card[name], rel=1e-12)


def test_a_source_of_tables_grows_by_files(tmp_path: Path) -> None:
    from tests.data.test_sources import config as table_config
    from tests.data.test_sources import write_table

    write_table(tmp_path / "tables" / "a.parquet", 30)
    first = shards.shard_in_process(table_config(tmp_path / "tables", tmp_path / "set"))
    write_table(tmp_path / "tables" / "b.parquet", 48)
    second = shards.shard_in_process(table_config(tmp_path / "tables", tmp_path / "set"))
    assert (first.split("train").total, second.split("train").total, second.version) == (30, 78, 2)
    assert second.card["exact_duplicates"] == 30


def test_take_down_by_the_next_version(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 60, 8, 1)
    first = shards.shard_in_process(config(tmp_path))
    rows = manifest.samples(first).to_pylist()
    original = hashlib.sha256((tmp_path / "images" / rows[3]["source"]).read_bytes()).hexdigest()
    listed = [original, rows[10]["sha256"].hex(), rows[20]["content"].hex().upper(), "f" * 64]
    (tmp_path / "gone.txt").write_text("# take-down\n\n" + "  some/file.png asked on Monday\n".join(listed) + "\n")
    second = shards.shard_in_process(config(tmp_path, removals=str(tmp_path / "gone.txt")))
    assert second.version == 2
    assert second.digest != first.digest
    assert len(second.removed) == 3
    assert sum(second.card["samples"].values()) == 57
    assert sum(second.card["removed"].values()) == 3
    gone = {rows[i]["content"] for i in (3, 10, 20)}
    for name in ("train", "held_out"):
        whole, left = stream.load_split(first, name, None, 1 << 20), stream.load_split(second, name, None, 1 << 20)
        missing = set(whole.ids.tolist()) - set(left.ids.tolist())
        assert set(left.ids.tolist()) < set(whole.ids.tolist()) or not missing
        assert len(left.ids) == second.split(name).total
        for image in left.images.numpy():
            content = hashlib.sha256(b"8 8 1\n" + np.ascontiguousarray(image.transpose(1, 2, 0)).tobytes()).digest()
            assert content not in gone
    seen = read(second)
    assert seen.total() == second.split("train").total
    assert max(seen.values()) == 1
    kept = shards.shard_in_process(config(tmp_path))  # a version stands; its list is not forgotten with the file
    assert kept.digest == second.digest
    (tmp_path / "gone.txt").write_text("hello\n")
    with pytest.raises(ValueError, match="line 1: 'hello' does not begin with a sha256"):
        shards.shard_in_process(config(tmp_path, removals=str(tmp_path / "gone.txt")))


def test_take_down_of_a_running_stream_keeps_the_order(tmp_path: Path) -> None:
    done = small_set(tmp_path, 96)
    plain = StreamConfig(done.url, batch_size=24, logical_shards=4, window=2)
    rows = manifest.samples(done).to_pylist()
    gone = {5, 17, 60}
    (tmp_path / "gone.txt").write_text("\n".join(rows[i]["sha256"].hex() for i in gone))
    settings = replace(plain, removals=str(tmp_path / "gone.txt"))
    lists: list[list[tuple[int, ...]]] = []
    for workers in (1, 2):
        made: list[tuple[int, ...]] = []
        for a, b in zip(epoch_of(plain, done), epoch_of(settings, done, workers), strict=True):
            stands_in = np.zeros(len(a.ids), bool) if b.stands_in is None else b.stands_in.numpy()
            assert stands_in.tolist() == [name in gone for name in a.ids.tolist()]
            assert a.ids[~stands_in].tolist() == b.ids[~stands_in].tolist()
            assert not gone & set(b.ids.tolist())
            assert set(b.lost) == gone & set(a.ids.tolist())
            made.append(tuple(b.ids.tolist()))
        lists.append(made)
    assert lists[0] == lists[1]


def test_copies_are_dropped(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 40, 8, 1)
    shutil.copytree(tmp_path / "images" / "class0", tmp_path / "images" / "class9")
    kept = shards.shard_in_process(config(tmp_path))
    copies = len(list((tmp_path / "images" / "class9").iterdir()))
    assert kept.card["exact_duplicates"] == copies
    assert sum(kept.card["samples"].values()) == 40 + copies
    dropped = shards.shard_in_process(config(tmp_path, url=str(tmp_path / "other"), duplicates="drop"))
    assert sum(dropped.card["samples"].values()) == 40
    assert dropped.removed["reason"].to_pylist() == ["an exact duplicate"] * copies
    contents = [row["content"] for row in manifest.samples(dropped).to_pylist()]
    split = dropped.split("train")
    held = dropped.split("held_out")
    assert split.total + held.total == len(set(contents)) == 40
    shutil.copytree(tmp_path / "images" / "class1", tmp_path / "images" / "class8")
    grown = shards.shard_in_process(config(tmp_path, url=str(tmp_path / "other"), duplicates="drop"))
    assert sum(grown.card["samples"].values()) == 40


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 100.0), min_size=1, max_size=8), start=st.integers(0, 5000), seed=st.integers(0, 9)
)
def test_a_mixture_takes_each_set_in_turn(weights: list[float], start: int, seed: int) -> None:
    mixture = Mixture(weights, "d", seed)
    assert mixture.shares.sum() == Mixture.SLOTS
    assert (np.abs(mixture.shares - np.array(weights) / sum(weights) * 1000) <= max(2, len(weights))).all()
    whole = mixture.picks(3, 0, start + 2500)
    assert mixture.picks(3, start, start + 2500).tolist() == whole[start:].tolist()
    for part in range(len(weights)):
        own = whole[whole[:, 0] == part, 1]
        assert sorted(own.tolist()) == list(range(len(own))) or len(weights) > 1
        runs = [np.sort(whole[k : k + 1000][whole[k : k + 1000, 0] == part, 1]) for k in (0, 1000)]
        assert np.concatenate(runs).tolist() == list(range(2 * int(mixture.shares[part])))


def test_mixtures_of_sets(tmp_path: Path) -> None:
    a, b = small_set(tmp_path / "a", 48), small_set(tmp_path / "b", 24, encoding="raw")
    mixed = shards.shard_in_process(ShardConfig("", str(tmp_path / "mixed"), mixture={a.url: 3.0, b.url: 1.0}))
    assert mixed.class_names == a.class_names
    assert mixed.card["samples"]["train"] == mixed.split("train").total == 72
    settings = StreamConfig(mixed.url, batch_size=20, logical_shards=2)
    ids: list[list[int]] = []
    for workers in (1, 2):
        batches = []
        for rank in range(workers):
            parts = range(rank, 2, workers)
            with stream.thread_stream(settings, mixed, parts) as source:
                batches += list(islice(source, 100 * len(parts)))
        batches.sort(key=lambda batch: (batch.step, batch.logical_shard))
        ids.append([name for batch in batches for name in batch.ids.tolist()])
    assert ids[0] == ids[1]
    counts = Counter(ids[0])
    assert sum(counts[i] for i in range(48)) == 1500
    assert max(counts[i] for i in range(48)) - min(counts[i] for i in range(48)) <= 2
    assert max(counts[i] for i in range(48, 72)) - min(counts[i] for i in range(48, 72)) <= 2
    with stream.thread_stream(settings, mixed, [0, 1], 37) as source:
        assert [n for batch in islice(source, 10) for n in batch.ids.tolist()] == ids[0][37 * 20 : 42 * 20]
    whole = stream.train_images(mixed)
    assert whole.ids.tolist() == list(range(72))
    grown = manifest.load(mixed.url)
    assert grown.digest == mixed.digest
    assert [part.digest for _, part in grown.mixture] == [a.digest, b.digest]
    for weights, reason in (
        ({}, "at least one set"),
        ({a.url: 0.0}, "must be positive"),
        ({a.url: 1.0, mixed.url: 1.0}, "is a mixture itself"),
    ):
        with pytest.raises(ValueError, match=reason):
            versions.mix(str(tmp_path / "x"), weights)
    other = small_set(tmp_path / "c", 12, 4)
    with pytest.raises(ValueError, match=r"has shape \(1, 4, 4\)"):
        versions.mix(str(tmp_path / "x"), {a.url: 1.0, other.url: 1.0})
