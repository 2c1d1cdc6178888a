"""A hostile object store: one answer in five is broken, and every sample arrives once, whole, and nearly as fast."""

import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from pipeline.data.making.shards import ShardConfig, shard_in_process
from pipeline.data.reading import blocks
from pipeline.data.reading.stream import StreamConfig, thread_stream
from pipeline.data.sets import manifest
from pipeline.data.sets.manifest import Manifest
from tests.data.folders import epoch_of, write_images
from tests.faults.data_store import FAULTS, Proxy, environment, moto, real_s3

SAMPLES = 10_000


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with real_s3(tmp_path_factory.mktemp("store")) as endpoint:
        yield endpoint


def make(endpoint: str, folder: Path, samples: int, each: int) -> str:
    """A set of that many images on the store; its URL."""
    write_images(folder / "images", samples, 8, 1)
    url = f"s3://lab/set-{samples}"
    with environment(endpoint):
        boto3.Session().client("s3").create_bucket(Bucket="lab")  # the default session keeps older keys
        shard_in_process(
            ShardConfig(str(folder / "images"), url, image_size=8, channels=1, samples_per_shard=each, held_out=0.0)
        )
    return url


def epoch(endpoint: str, url: str) -> tuple[Manifest, dict[int, bytes], int, float]:
    """One epoch through an endpoint: pixels by id, how many samples came, seconds."""
    blocks.CACHE.clear()
    with environment(endpoint):
        done = manifest.load(url)
        config = StreamConfig(
            url, batch_size=100, logical_shards=2, window=4, readers=4, read_ahead_bytes=2 << 20, disk_cache_bytes=0
        )
        began = time.monotonic()
        batches = epoch_of(config, done)
        seconds = time.monotonic() - began
    rows = [(name, image) for batch in batches for name, image in zip(batch.ids.tolist(), batch.images, strict=True)]
    return done, {name: image.numpy().tobytes() for name, image in rows}, len(rows), seconds


def campaign(endpoint: str, url: str, samples: int, seeds: range) -> tuple[list[float], dict[str, int]]:
    """Ratios of throughput, faulty to clean, and how many faults of each kind were injected."""
    ratios: list[float] = []
    injected: dict[str, int] = dict.fromkeys(FAULTS, 0)
    for seed in seeds:
        with Proxy(endpoint) as clean:
            _, want, count, clean_s = epoch(clean.endpoint, url)
        assert count == len(want) == samples
        with Proxy(endpoint, 0.2, seed) as hostile:
            _, got, count, hostile_s = epoch(hostile.endpoint, url)
        assert count == samples  # none twice
        assert got == want  # none lost, no wrong byte
        asked = hostile.requests.total()
        assert 0.1 * asked < hostile.injected.total() < 0.3 * asked
        ratios.append(clean_s / hostile_s)
        for kind, number in hostile.injected.items():
            injected[kind] += number
    return ratios, injected


def test_every_kind_of_fault_is_outlived(tmp_path: Path) -> None:
    """The small case, before moto, which starts at once."""
    with moto() as store:
        url = make(store, tmp_path, 600, 10)
        ratios, injected = campaign(store, url, 600, range(1))
    assert sum(injected.values()) >= 6
    print(f"{injected} injected; throughput {ratios[0]:.2f} of clean")


@pytest.mark.slow
def test_ten_seeds_of_ten_thousand_samples(store: str, tmp_path: Path) -> None:
    url = make(store, tmp_path, SAMPLES, 25)
    ratios, injected = campaign(store, url, SAMPLES, range(10))
    print(f"{injected} injected; throughput of clean {[round(r, 2) for r in ratios]}")
    assert all(injected.values())
    assert sorted(ratios)[len(ratios) // 2] >= 0.6


@pytest.mark.slow
def test_bytes_fetched(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte of the set is fetched once an epoch, by 1, 2 and 4 workers of a node."""
    url = make(store, tmp_path, 960, 40)
    monkeypatch.setattr(blocks, "default_folder", lambda: tmp_path / "cache")
    for workers in (1, 2, 4):
        with Proxy(store) as proxy, environment(proxy.endpoint):
            done = manifest.load(url)
            size = int(done.split("train").sizes.sum())
            for path in (tmp_path / "cache").glob("*"):
                path.unlink()
            config = StreamConfig(url, batch_size=40, logical_shards=4, window=2, cache_bytes=0, readers=2)
            for rank in range(workers):
                blocks.CACHE.clear()
                parts = range(rank, 4, workers)
                with thread_stream(config, done, parts) as source:
                    for _ in range(24 * len(parts)):
                        next(source)
            fetched = sum(count for name, count in proxy.bytes.items() if "/shards/" in name)
        assert fetched <= 1.1 * size
        print(f"{workers} workers: {fetched / size:.3f} of the set's bytes fetched in an epoch")
