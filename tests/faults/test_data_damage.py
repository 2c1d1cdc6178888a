"""Damage at rest: every kind, at many places, is detected and named; on quarantine nothing whole is lost."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.formats.tar import BLOCK, DamagedShard
from pipeline.data.reading import blocks
from pipeline.data.reading.stream import StreamConfig
from pipeline.data.sets import manifest
from pipeline.data.sets.manifest import Manifest
from tests.data.folders import epoch_of, small_set

Place = tuple[int, int]  # a member's header and its whole length with padding


def places(data: bytes) -> list[Place]:
    found: list[Place] = []
    at = 0
    while any(data[at : at + BLOCK]):
        size = int(data[at + 124 : at + 135], 8)
        found.append((at, BLOCK + size + -size % BLOCK))
        at += found[-1][1]
    return found


def flipped(data: bytes, at: int, draw: np.random.Generator) -> bytes:
    return data[:at] + bytes([data[at] ^ int(draw.integers(1, 256))]) + data[at + 1 :]


def zeroed(data: bytes, place: Place, draw: np.random.Generator) -> tuple[bytes, int]:
    at = place[0] + int(draw.integers(place[1]))
    made = data[:at] + bytes(len(data[at : at + 1024])) + data[at + 1024 :]
    first = next((i for i in range(at, len(data)) if made[i] != data[i]), -1)
    return made, first


KINDS: dict[str, Callable[[bytes, Place, np.random.Generator], tuple[bytes, int]]] = {
    "cut at a member's edge": lambda data, place, _: (data[: place[0]], place[0]),
    "cut inside a header": lambda data, place, draw: (
        data[: (at := place[0] + int(draw.integers(1, BLOCK)))],
        at,
    ),
    "cut inside a body": lambda data, place, draw: (
        data[: (at := place[0] + BLOCK + int(draw.integers(1, place[1] - BLOCK)))],
        at,
    ),
    "a header's byte": lambda data, place, draw: (
        flipped(data, at := place[0] + int(draw.integers(BLOCK)), draw),
        at,
    ),
    "a body's byte": lambda data, place, draw: (
        flipped(data, at := place[0] + BLOCK + int(draw.integers(place[1] - BLOCK)), draw),
        at,
    ),
    "a zeroed KiB": zeroed,
}


def ledger(batches: list[Any]) -> tuple[Counter[int], Counter[int]]:
    """Ids of the scheduled samples that were delivered, and of those that others stood in for."""
    delivered: Counter[int] = Counter()
    quarantined: Counter[int] = Counter()
    for batch in batches:
        ids = batch.ids.tolist()
        stands_in = [False] * len(ids) if batch.stands_in is None else batch.stands_in.tolist()
        delivered.update(name for name, other in zip(ids, stands_in, strict=True) if not other)
        quarantined.update(batch.lost)
    return delivered, quarantined


def check(done: Manifest, kind: str, seed: int, contents: dict[int, bytes]) -> int:
    """Damages one shard, and puts it right again; how many samples were quarantined."""
    draw = np.random.default_rng([seed, list(KINDS).index(kind)])
    path = Path(done.url, done.shards["url"][int(draw.integers(len(done.shards)))].as_py())
    good = path.read_bytes()
    bad, first = good, -1
    while bad == good:  # zeros may already be there
        bad, first = KINDS[kind](good, places(good)[int(draw.integers(len(places(good))))], draw)
    path.write_bytes(bad)
    settings = StreamConfig(done.url, batch_size=24, logical_shards=4, window=2)
    try:
        blocks.CACHE.clear()
        with pytest.raises(DamagedShard) as caught:
            epoch_of(settings, done)
        named = caught.value
        assert named.shard == str(path)
        assert first - max(length for _, length in places(good)) < named.offset <= first
        if kind != "a body's byte" and kind != "a zeroed KiB":
            assert named.offset == first
        assert named.expected != named.got
        assert str(path) in str(named)
        assert str(named.offset) in str(named)
        blocks.CACHE.clear()
        batches = epoch_of(replace(settings, on_damage="quarantine"), done)
    finally:
        path.write_bytes(good)
    delivered, quarantined = ledger(batches)
    assert delivered + quarantined == Counter(range(done.split("train").total))
    assert not delivered & quarantined
    for batch in batches:
        for image, name in zip(batch.images.numpy(), batch.ids.tolist(), strict=True):
            assert image.tobytes() == contents[name]
            assert name not in quarantined
    return quarantined.total()


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, dict[int, bytes]]:
    done = small_set(tmp_path_factory.mktemp("damage"))
    blocks.CACHE.clear()
    whole = epoch_of(StreamConfig(done.url, batch_size=24, logical_shards=4), done)
    contents = {
        name: image.tobytes()
        for batch in whole
        for image, name in zip(batch.images.numpy(), batch.ids.tolist(), strict=True)
    }
    assert len(contents) == 96
    return done, contents


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_named_and_quarantined(damaged: tuple[Manifest, dict[int, bytes]], kind: str) -> None:
    assert all(check(damaged[0], kind, seed, damaged[1]) <= 12 for seed in range(1))


@pytest.mark.slow
def test_three_hundred_of_three_hundred(damaged: tuple[Manifest, dict[int, bytes]]) -> None:
    lost = {kind: [check(damaged[0], kind, seed, damaged[1]) for seed in range(50)] for kind in KINDS}
    assert sum(map(len, lost.values())) == 300
    print(f"300 of 300 damaged shards named; samples quarantined of 12: { {k: sum(v) / 50 for k, v in lost.items()} }")


@pytest.mark.parametrize("workers", [2, 4])
def test_stand_ins_do_not_depend_on_the_number_of_workers(
    damaged: tuple[Manifest, dict[int, bytes]], workers: int
) -> None:
    done = damaged[0]
    path = Path(done.url, done.shards["url"][3].as_py())
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 3])
    settings = StreamConfig(done.url, batch_size=24, logical_shards=4, window=2, on_damage="quarantine")
    try:
        made = [
            [(batch.step, batch.logical_shard, batch.ids.tolist(), batch.lost) for batch in epoch_of(settings, done, n)]
            for n in (1, workers)
        ]
    finally:
        path.write_bytes(good)
    assert made[0] == made[1]
    assert any(lost for *_, lost in made[0])


@pytest.mark.slow
def test_a_whole_window_lost_and_a_whole_set_lost(tmp_path: Path) -> None:
    done = small_set(tmp_path, 48)
    paths = [Path(done.url, url) for url in done.shards["url"].to_pylist()]
    paths[0].unlink()
    paths[1].write_bytes(b"")
    settings = StreamConfig(done.url, batch_size=12, logical_shards=1, window=1, on_damage="quarantine")
    delivered, quarantined = ledger(epoch_of(settings, done))
    assert quarantined == Counter(range(24))
    assert delivered == Counter(range(24, 48))
    for path in paths[2:]:
        path.unlink()
    blocks.CACHE.clear()
    with pytest.raises(DamagedShard, match="no such file"):
        epoch_of(settings, done)


def test_damaged_samples_tables_are_named_too(tmp_path: Path) -> None:
    done = small_set(tmp_path, 24)
    path = Path(done.url, done.shards["url"][0].as_py())
    path.write_bytes(path.read_bytes()[:-1])
    Path(done.url, done.sample_tables[0][0]).write_bytes(b"nothing")
    with pytest.raises(DamagedShard, match="its samples' rows"):
        epoch_of(StreamConfig(done.url, batch_size=12, on_damage="quarantine"), done)
    with pytest.raises(ValueError, match=r"samples.parquet is damaged"):
        manifest.samples(done)
