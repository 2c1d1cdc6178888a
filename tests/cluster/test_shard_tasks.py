"""Sharding on Ray: the bytes of the in-process job, resumed, verified, repaired, with honest progress."""

import hashlib
from pathlib import Path
from typing import Any

import cv2
import pytest

from pipeline.cluster import shard_tasks
from pipeline.cluster.shard_tasks import ShardProgress
from pipeline.data.making import shards, slices
from pipeline.data.making.shards import ShardConfig
from tests.data.folders import write_images


def config(tmp_path: Path, name: str = "set", **values: Any) -> ShardConfig:
    defaults: dict[str, Any] = {"image_size": 8, "channels": 1, "samples_per_shard": 16}
    return ShardConfig(str(tmp_path / "images"), str(tmp_path / name), **(defaults | values))


def tree(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and ".lease" not in p.parts
    }


def test_the_bytes_of_the_in_process_job(ray_cluster: None, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 100, 8)
    (tmp_path / "images" / "class1" / "bad.png").write_bytes(b"hello")
    events: list[ShardProgress] = []
    done = shard_tasks.shard(config(tmp_path), events.append)
    expected = shards.shard_in_process(config(tmp_path, "other"))
    assert done.digest == expected.digest
    assert tree(tmp_path / "set") == tree(tmp_path / "other")
    assert [e.slices_done for e in events] == list(range(1, 8))
    last = events[-1]
    assert (last.slices, last.images, last.rejected, last.seconds_left) == (7, 100, 1, 0.0)
    assert last.images_per_second == pytest.approx(101 / last.seconds)


def test_a_finished_set_is_verified_and_its_damage_repaired(ray_cluster: None, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 60, 8)
    first = shard_tasks.shard(config(tmp_path))
    before = tree(tmp_path / "set")
    events: list[ShardProgress] = []
    assert shard_tasks.shard(config(tmp_path), events.append).digest == first.digest
    assert events[-1].verified == len(first.shards)
    assert events[-1].slices_done == 0
    urls = first.shards["url"].to_pylist()
    path = tmp_path / "set" / urls[0]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    (tmp_path / "set" / urls[1]).unlink()
    events.clear()
    assert shard_tasks.shard(config(tmp_path), events.append).digest == first.digest
    assert tree(tmp_path / "set") == before
    assert events[-1].slices_done == 2
    path.unlink()
    for image in (tmp_path / "images").rglob("*.png"):
        pixels = cv2.imread(str(image), cv2.IMREAD_GRAYSCALE)
        size = image.stat().st_size
        image.write_bytes(b"\0" * size if pixels is not None else b"")
    with pytest.raises(ValueError, match="no longer gives the same bytes"):
        shard_tasks.shard(config(tmp_path))


def test_it_goes_on_where_it_was(ray_cluster: None, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 80, 8)
    expected = shards.shard_in_process(config(tmp_path, "other"))
    work = shards.plan(config(tmp_path))
    for index in (1, 3):
        slices.make_slice(work.config, work.building, work.slice(index))
    work.close()
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "set").rglob("*.tar")}
    assert len(kept) >= 2
    events: list[ShardProgress] = []
    done = shard_tasks.shard(config(tmp_path), events.append)
    assert done.digest == expected.digest
    assert events[1].slices_done == 2  # found, not made
    assert events[1].images_per_second == 0.0
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


def test_errors_arrive_as_they_are(ray_cluster: None, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="images is empty"):
        shard_tasks.shard(config(tmp_path))
    write_images(tmp_path / "images", 20, 8)
    (tmp_path / "set").mkdir(exist_ok=True)  # the first job has held it
    (tmp_path / "set" / "shards").write_text("in the way")
    with pytest.raises(OSError, match="shards"):
        shard_tasks.shard(config(tmp_path))
