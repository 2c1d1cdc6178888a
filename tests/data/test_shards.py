"""Sharding: the same bytes each time, resumed without repeating, verified by its manifest, readable by others."""

import gc
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from webdataset.compat import WebDataset

from pipeline import storage
from pipeline.data.formats import codecs, tar
from pipeline.data.making import shards
from pipeline.data.making.shards import ShardConfig
from pipeline.data.sets import manifest
from pipeline.data.sets.manifest import Manifest
from tests.data.folders import write_images


def tree(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and ".lease" not in p.parts
    }


def config(tmp_path: Path, **values: Any) -> ShardConfig:
    defaults: dict[str, Any] = {"image_size": 8, "samples_per_shard": 16}
    return ShardConfig(str(tmp_path / "images"), str(tmp_path / "set"), **(defaults | values))


def rows_of(made: Manifest) -> list[dict[str, Any]]:
    return manifest.samples(made).to_pylist()


@pytest.mark.parametrize("encoding", ["png", "raw"])
@pytest.mark.parametrize("channels", [1, 3])
def test_tables_say_what_the_tars_hold(
    made: Callable[..., Manifest], tmp_path: Path, encoding: str, channels: int
) -> None:
    done = made(100, 8, channels, 3, encoding=encoding, held_out=0.3)
    assert done.card["samples"]["train"] + done.card["samples"]["held_out"] == 100
    assert min(done.card["samples"].values()) > 10
    assert done.class_names == ("class0", "class1", "class2")
    seen: list[str] = []
    split_of = dict(zip(done.shards["url"].to_pylist(), done.shards["split"].to_pylist(), strict=True))
    for row in rows_of(done):
        data = Path(done.url, row["shard"]).read_bytes()
        payload = data[row["offset"] : row["offset"] + row["size"]]
        assert hashlib.sha256(payload).digest() == row["sha256"]
        source = cv2.imread(
            str(tmp_path / "set-images" / row["source"]),
            cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB,
        )
        assert source is not None
        pixels = source.reshape(8, 8, channels)
        stored = (
            codecs.decode(payload, channels)
            if encoding == "png"
            else np.load(io.BytesIO(payload), allow_pickle=False).transpose(1, 2, 0)
        )
        assert np.array_equal(stored, pixels)
        content = hashlib.sha256(b"8 8 %d\n" % channels + pixels.tobytes()).digest()
        assert content == row["content"]
        assert (split_of[row["shard"]] == "held_out") == (int.from_bytes(content[:8], "big") / 2**64 < 0.3)
        assert row["label"] == int(row["source"][5])
        assert (row["width"], row["height"]) == (8, 8)
        seen.append(row["source"])
    assert len(set(seen)) == 100
    for shard in done.shards.to_pylist():
        data = Path(done.url, shard["url"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["size"], shard["sha256"])
        assert shard["url"].endswith(f"-{shard['sha256'][:12]}.tar")
        with tarfile.open(fileobj=io.BytesIO(data)) as file:
            assert len(file.getmembers()) == 2 * shard["samples"]
        assert sum(shard["class_counts"]) == shard["samples"]
        members = tar.walk("s", np.frombuffer(data, np.uint8), shard["samples"], encoding, ("cls",))
        assert np.bincount(members.labels, minlength=3).tolist() == [
            dict(zip(shard["classes"], shard["class_counts"], strict=True)).get(c, 0) for c in range(3)
        ]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector
@pytest.mark.parametrize("encoding", ["png", "raw"])
def test_plain_webdataset_reads_it(made: Callable[..., Manifest], encoding: str) -> None:
    done = made(60, encoding=encoding, held_out=0.0)
    urls = [str(Path(done.url, url)) for url in done.shards["url"].to_pylist()]
    dataset: Any = WebDataset(urls, shardshuffle=False).decode("rgb8")
    samples: list[dict[str, Any]] = list(dataset)
    by_key = {row["key"]: row for row in rows_of(done)}
    assert len(samples) == 60
    for sample in samples:
        assert sample["cls"] == by_key[sample["__key__"]]["label"]
        image = sample["png"] if encoding == "png" else sample["npy"].transpose(1, 2, 0)
        assert hashlib.sha256(b"8 8 3\n" + image.tobytes()).digest() == by_key[sample["__key__"]]["content"]
    del dataset
    gc.collect()


def test_the_same_bytes_again_and_elsewhere(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 70, 8)
    first = shards.shard_in_process(config(tmp_path))
    before = tree(tmp_path / "set")
    shutil.copytree(tmp_path / "images", tmp_path / "copy")
    second = shards.shard_in_process(
        ShardConfig(str(tmp_path / "copy"), str(tmp_path / "set2"), image_size=8, samples_per_shard=16)
    )
    assert second.digest == first.digest
    after = tree(tmp_path / "set2")
    folder = manifest.folder_of(first.digest)
    differing = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys()
    assert differing <= {"manifest.json", f"{folder}/manifest.json", f"{folder}/card.json"}  # the card names its source

    def written() -> dict[Path, int]:
        files = (p for p in (tmp_path / "set").rglob("*") if p.is_file() and ".lease" not in p.parts)
        return {p: p.stat().st_mtime_ns for p in files}

    times = written()
    assert shards.shard_in_process(config(tmp_path)).digest == first.digest
    assert written() == times


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kill_at", range(0, 21, 3))
def test_killed_at_any_write_and_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int) -> None:
    write_images(tmp_path / "images", 70, 8)
    reference = shards.shard_in_process(
        ShardConfig(str(tmp_path / "images"), str(tmp_path / "reference"), image_size=8, samples_per_shard=16)
    )
    writes: list[str] = []
    real = os.replace

    def dying(source: str, target: str) -> None:
        if len(writes) == kill_at:
            raise Killed
        real(source, target)
        writes.append(target)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(Killed):
        shards.shard_in_process(config(tmp_path))
    monkeypatch.setattr(os, "replace", lambda source, target: (real(source, target), again.append(target)))
    again: list[str] = []
    assert not (tmp_path / "set" / "manifest.json").exists()
    done = shards.shard_in_process(config(tmp_path))
    assert done.digest == reference.digest
    assert tree(tmp_path / "set") == tree(tmp_path / "reference")
    recorded = [name for name in writes if "/building-" in name]
    assert not set(recorded) & set(again)
    assert len(writes) == kill_at


def test_unreadable_images_are_counted_listed_and_not_fatal(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 20, 8)
    (tmp_path / "images" / "class1" / "notes.txt").write_text("hello")
    (tmp_path / "images" / "class1" / "empty.png").write_bytes(b"")
    whole = (tmp_path / "images" / "class0" / "00000.png").read_bytes()
    (tmp_path / "images" / "class2" / "cut.png").write_bytes(whole[:-20])
    (tmp_path / "images" / "class2" / "big.png").write_bytes(whole + bytes(5000))
    done = shards.shard_in_process(config(tmp_path, max_image_bytes=4000))
    assert sum(done.card["samples"].values()) == 20
    assert done.card["rejected"] == 4
    reasons = {row["source"]: row["reason"] for row in manifest.rejects(done).to_pylist()}
    assert set(reasons) == {"class1/notes.txt", "class1/empty.png", "class2/cut.png", "class2/big.png"}
    assert "not a jpg, png or webp" in reasons["class1/notes.txt"]
    assert "truncated" in reasons["class2/cut.png"]
    assert "limit of 4000" in reasons["class2/big.png"]


def test_errors_name_what_and_where(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match=r"images is empty"):
        shards.shard_in_process(config(tmp_path))
    (tmp_path / "images" / "a").mkdir()
    (tmp_path / "images" / "a" / "x.png").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"none of 1 files is a readable image \(a/x.png: not a jpg"):
        shards.shard_in_process(config(tmp_path))
    write_images(tmp_path / "images", 3, 8, classes=0)
    with pytest.raises(ValueError, match=r"'00000.png' outside of its class folders"):
        shards.shard_in_process(config(tmp_path))
    with pytest.raises(ValueError, match="is not a folder"):
        shards.shard_in_process(ShardConfig(str(tmp_path / "nowhere"), str(tmp_path / "set")))
    with pytest.raises(ValueError, match="no finished shard set at"):
        manifest.load(str(tmp_path / "set"))
    cases: list[tuple[str, Any]] = [
        ("channels", 2),
        ("encoding", "pgn"),
        ("held_out", 1.0),
        ("image_size", 0),
        ("resize", "crop"),
        ("samples_per_shard", -1),
        ("max_image_pixels", 0),
    ]
    for name, value in cases:
        values: dict[str, Any] = {"source": "a", "url": "b", name: value}
        with pytest.raises(ValueError, match=name):
            ShardConfig(**values)
    with pytest.raises(ValueError, match="scheme 'pipe:' is not allowed"):
        ShardConfig("pipe:id", "b")


def test_another_policy_or_source_does_not_overwrite_a_set(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 20, 8)
    shards.shard_in_process(config(tmp_path))
    with pytest.raises(ValueError, match=r"already holds another set, .*image_size: 8 there, 4 asked"):
        shards.shard_in_process(config(tmp_path, image_size=4))


def test_sets_without_classes(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 20, 8, classes=0)
    done = shards.shard_in_process(config(tmp_path))
    assert done.class_names == ()
    assert not done.labelled
    assert {row["label"] for row in rows_of(done)} == {None}
    nested = ShardConfig(str(tmp_path / "images"), str(tmp_path / "other"), image_size=8, classes=False, held_out=0.0)
    assert shards.shard_in_process(nested).class_names == ()


def test_split_never_moves_and_duplicates_stay_together(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 40, 8)
    first = shards.shard_in_process(config(tmp_path, held_out=0.5))
    for path in sorted((tmp_path / "images").rglob("*.png")):
        shutil.copy(path, path.with_name(f"again-{path.name}"))
    write_images(tmp_path / "images", 80, 8, seed=1)  # other images under the first names
    second = shards.shard_in_process(
        ShardConfig(
            str(tmp_path / "images"),
            str(tmp_path / "set2"),
            image_size=8,
            held_out=0.5,
            samples_per_shard=7,
            encoding="raw",
        )
    )

    def sides(done: Manifest) -> dict[bytes, set[str]]:
        split_of = dict(zip(done.shards["url"].to_pylist(), done.shards["split"].to_pylist(), strict=True))
        found: dict[bytes, set[str]] = {}
        for row in rows_of(done):
            found.setdefault(row["content"], set()).add(split_of[row["shard"]])
        return found

    assert all(len(side) == 1 for side in sides(second).values())
    common = sides(first).keys() & sides(second).keys()
    assert len(common) == 40
    assert all(sides(first)[content] == sides(second)[content] for content in common)
    write_images(tmp_path / "images", 0, 8)
    assert second.card["exact_duplicates"] == 0
    shutil.copytree(tmp_path / "images" / "class0", tmp_path / "images" / "class9")
    third = shards.shard_in_process(ShardConfig(str(tmp_path / "images"), str(tmp_path / "set3"), image_size=8))
    assert third.card["exact_duplicates"] == len(list((tmp_path / "images" / "class9").iterdir()))


def test_card_statistics(made: Callable[..., Manifest]) -> None:
    done = made(50, 8, held_out=0.0)
    pixels = np.concatenate(
        [codecs.decode(p.read_bytes(), 3).reshape(-1, 3) for p in Path(done.url + "-images").rglob("*.png")]
    ).astype(np.float64)
    assert done.card["channel_mean"] == pytest.approx(pixels.mean(axis=0).tolist(), rel=1e-12)
    assert done.card["channel_std"] == pytest.approx(pixels.std(axis=0).tolist(), rel=1e-9)


def test_the_manifest_digest_is_of_content_and_damage_is_named(made: Callable[..., Manifest], tmp_path: Path) -> None:
    done = made(40)
    assert manifest.load(done.url).digest == done.digest
    with pytest.raises(ValueError, match="was changed since"):
        manifest.load(done.url, digest="0" * 64)
    root = Path(done.url, "manifest.json")
    good = root.read_text()
    value = json.loads(good)
    assert done.digest[:12] in value["tables"]["shards.parquet"]["path"]
    import pyarrow.parquet as pq

    table = Path(done.url, value["tables"]["shards.parquet"]["path"])
    pq.write_table(done.shards, table, compression="none")  # other bytes, same content
    value["tables"]["shards.parquet"]["sha256"] = storage.digest(table.read_bytes())
    root.write_text(json.dumps(value))
    assert manifest.load(done.url).digest == done.digest
    table.write_bytes(table.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"shards.parquet is damaged: expected sha256"):
        manifest.load(done.url)
    for change, reason in (
        ({"digest": "0" * 64}, "is damaged"),
        ({"schema": 99}, "schema 99"),
        ({"tables": {}}, "is damaged: KeyError"),
        ({"tables": {"shards.parquet": {"path": "../../etc/passwd", "sha256": ""}}}, "refused path"),
    ):
        root.write_text(json.dumps(json.loads(good) | change))
        with pytest.raises(ValueError, match=reason):
            manifest.load(done.url)
    root.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        manifest.load(done.url)


def test_on_s3(s3_bucket: str, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 40, 8)
    for entry in storage.list_files(str(tmp_path / "images")):
        storage.write_file(f"{s3_bucket}/images/{entry.path}", tmp_path / "images" / entry.path)
    local = shards.shard_in_process(config(tmp_path))
    remote = shards.shard_in_process(
        ShardConfig(f"{s3_bucket}/images", f"{s3_bucket}/set", image_size=8, samples_per_shard=16)
    )
    assert remote.digest == local.digest
    assert (
        shards.shard_in_process(
            ShardConfig(f"{s3_bucket}/images", f"{s3_bucket}/set", image_size=8, samples_per_shard=16)
        ).digest
        == local.digest
    )
    assert not [e.path for e in storage.list_files(f"{s3_bucket}/set") if "building" in e.path]
