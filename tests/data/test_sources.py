"""Sources: foreign tars, Parquet tables, S3; labels of every kind; what they give is what was put in."""

import gc
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from pipeline import storage
from pipeline.data.formats import codecs
from pipeline.data.making import shards
from pipeline.data.making.shards import ShardConfig
from pipeline.data.reading.stream import StreamConfig
from pipeline.data.sets import manifest
from pipeline.data.sets.manifest import Manifest
from tests.data.folders import epoch_of

RNG = np.random.default_rng(0)
PIXELS = [RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(48)]
TAGS = [sorted({f"t{i % 5}", f"u{i % 3}"}) for i in range(48)]


def config(source: Path | str, folder: Path | str, **values: Any) -> ShardConfig:
    defaults: dict[str, Any] = {"image_size": 8, "samples_per_shard": 12, "held_out": 0.0}
    return ShardConfig(str(source), str(folder), **(defaults | values))


def png(i: int) -> bytes:
    return codecs.encode_png(PIXELS[i])


def write_tars(folder: Path, count: int = 48, each: int = 16) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, count, each):
        with TarWriter(str(folder / f"part-{first:03d}.tar")) as out:
            for i in range(first, first + each):
                out.write(
                    {
                        "__key__": f"dir/{i:05d}",
                        "png": png(i),
                        "cls": i % 4,
                        "json": TAGS[i],
                        "txt": f"picture {i} ä",
                        "extra.bin": b"x",
                    }
                )


def write_table(path: Path, count: int = 48, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "image": [png(i) for i in range(count)],
        "label": [i % 4 for i in range(count)],
        "tags": TAGS[:count],
        "caption": [f"picture {i} ä" for i in range(count)],
    }
    pq.write_table(pa.table(values | columns), path, row_group_size=10)


def check(done: Manifest, kinds: tuple[str, ...] = ("cls", "json", "txt")) -> None:
    """Every image with its own labels, once, through the stream."""
    assert done.extras == kinds
    by_pixels = {pixels.transpose(2, 0, 1).tobytes(): i for i, pixels in enumerate(PIXELS)}
    seen: list[int] = []
    for batch in epoch_of(StreamConfig(done.url, batch_size=12, logical_shards=2, window=2), done):
        for row, image in enumerate(batch.images.numpy()):
            i = by_pixels[image.tobytes()]
            seen.append(i)
            if "cls" in kinds:
                assert batch.labels is not None
                assert done.class_names[int(batch.labels[row])] in (str(i % 4), f"class{i % 4}")
            if "json" in kinds:
                assert batch.tags is not None
                assert [done.names.tags[k] for k in np.flatnonzero(batch.tags[row].numpy())] == TAGS[i]
            if "txt" in kinds:
                assert batch.captions is not None
                assert batch.captions[row] == f"picture {i} ä"
    assert sorted(seen) == list(range(48))


def test_tars_of_webdataset(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars")
    done = shards.shard_in_process(config(tmp_path / "tars", tmp_path / "set", tags_field="json", caption_field="txt"))
    check(done)
    assert done.class_names == ("0", "1", "2", "3")
    assert manifest.samples(done)["source"][0].as_py() == "part-000.tar#dir/00000"
    assert done.card["rejected"] == 0
    plain = shards.shard_in_process(config(tmp_path / "tars" / "part-000.tar", tmp_path / "one", classes=False))
    assert plain.extras == ()
    assert plain.split("train").total == 16


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector
def test_plain_webdataset_reads_all_labels(tmp_path: Path) -> None:
    write_table(tmp_path / "table.parquet")
    done = shards.shard_in_process(
        config(
            tmp_path / "table.parquet", tmp_path / "set", tags_field="tags", caption_field="caption", encoding="webp"
        )
    )
    rows = {row["key"]: row for row in manifest.samples(done).to_pylist()}
    dataset: Any = WebDataset([str(Path(done.url, url)) for url in done.shards["url"].to_pylist()], shardshuffle=False)
    samples: list[dict[str, Any]] = list(dataset.decode("rgb8"))
    assert len(samples) == 48
    for sample in samples:
        row = rows[sample["__key__"]]
        assert (sample["cls"], sample["json"], sample["txt"]) == (row["label"], row["tags"], row["caption"])
        assert np.array_equal(sample["webp"], PIXELS[int(row["source"].rpartition("#")[2])])
    del dataset, samples
    gc.collect()


@pytest.mark.parametrize("kind", ["bytes", "struct", "url"])
def test_tables(tmp_path: Path, kind: str) -> None:
    columns: dict[str, Any] = {"label": [f"class{i % 4}" for i in range(48)]}
    if kind == "struct":
        columns["image"] = [{"bytes": png(i), "path": "x.png"} for i in range(48)]
    if kind == "url":
        (tmp_path / "pictures").mkdir()
        for i in range(48):
            (tmp_path / "pictures" / f"{i}.png").write_bytes(png(i))
        columns["image"] = [f"{tmp_path}/pictures/{i}.png" if i % 2 else f"{i}.png" for i in range(48)]
    write_table(tmp_path / "tables" / "a.parquet", **columns)
    done = shards.shard_in_process(
        config(
            tmp_path / "tables",
            tmp_path / "set",
            tags_field="tags",
            caption_field="caption",
            image_root=str(tmp_path / "pictures") if kind == "url" else "",
        )
    )
    assert done.card["rejected"] == 0
    assert done.class_names == ("class0", "class1", "class2", "class3")
    check(done)


def test_everything_on_s3(s3_bucket: str, tmp_path: Path) -> None:
    write_tars(tmp_path / "tars")
    write_table(tmp_path / "tables" / "a.parquet", image=[f"{s3_bucket}/pictures/{i}.png" for i in range(48)])
    for i in range(48):
        storage.write_bytes(f"{s3_bucket}/pictures/class{i % 4}/{i}.png", png(i))
        storage.write_bytes(f"{s3_bucket}/pictures/{i}.png", png(i))
    for entry in storage.list_files(str(tmp_path)):
        storage.write_file(f"{s3_bucket}/{entry.path}", tmp_path / entry.path)
    labels = {"tags_field": "tags", "caption_field": "caption"}
    check(
        shards.shard_in_process(
            config(f"{s3_bucket}/tables", f"{s3_bucket}/a", image_root=f"{s3_bucket}/pictures", **labels)
        )
    )
    check(
        shards.shard_in_process(config(f"{s3_bucket}/tars", f"{s3_bucket}/b", tags_field="json", caption_field="txt"))
    )
    tree = shards.shard_in_process(config(f"{s3_bucket}/pictures/class1", f"{s3_bucket}/c"))
    assert tree.split("train").total == 12


def test_what_a_table_lacks_is_named(tmp_path: Path) -> None:
    write_table(
        tmp_path / "t.parquet",
        image=[None, b"no image", png(2), *(png(i) for i in range(3, 48))],
        label=[None] * 1 + [1] * 47,
    )
    done = shards.shard_in_process(config(tmp_path / "t.parquet", tmp_path / "set"))
    reasons = {row["source"]: row["reason"] for row in manifest.rejects(done).to_pylist()}
    assert set(reasons) == {"t.parquet#0", "t.parquet#1"}
    assert "class is None" in reasons["t.parquet#0"]
    assert "not a jpg" in reasons["t.parquet#1"]
    for values, reason in (
        ({"image_field": "picture"}, "no column 'picture' for the image"),
        ({"caption_field": "label"}, "cannot be the caption: it is"),
        ({"tags_field": "caption"}, "cannot be the tags: it is string"),
    ):
        with pytest.raises(ValueError, match=reason):
            shards.shard_in_process(config(tmp_path / "t.parquet", tmp_path / "other", **values))
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.parquet").write_bytes(b"PAR1 hello PAR1")
    with pytest.raises(ValueError, match="not a Parquet table"):
        shards.shard_in_process(config(tmp_path / "no.parquet", tmp_path / "other"))
    with pytest.raises(ValueError, match=r"tags_field: the source .* has images in folders"):
        shards.shard_in_process(config(tmp_path / "empty", tmp_path / "other", tags_field="x"))


@pytest.mark.parametrize(("encoding", "exact"), [("png", True), ("webp", True), ("raw", True), ("jpg", False)])
@pytest.mark.parametrize("channels", [1, 3])
def test_encodings(tmp_path: Path, encoding: str, exact: bool, channels: int) -> None:
    smooth = [cv2.resize(p[:3, :3], (8, 8), interpolation=cv2.INTER_CUBIC) for p in PIXELS]
    write_table(tmp_path / "t.parquet", image=[codecs.encode_png(np.asarray(p, np.uint8)) for p in smooth])
    done = shards.shard_in_process(
        config(tmp_path / "t.parquet", tmp_path / "set", encoding=encoding, channels=channels, quality=95)
    )
    want = {row["source"]: i for i, row in enumerate(manifest.samples(done).to_pylist())}
    assert len(want) == 48
    ids = {
        int(name): image
        for b in epoch_of(StreamConfig(done.url, batch_size=12), done)
        for name, image in zip(b.ids, b.images.numpy(), strict=True)
    }
    for source, row in want.items():
        pixels = codecs.decode(
            codecs.encode_png(np.asarray(smooth[int(source.rpartition("#")[2])], np.uint8)), channels
        )
        gap = np.abs(ids[row].transpose(1, 2, 0).astype(int) - pixels.astype(int)).max()
        assert gap == 0 if exact else gap < 40


def foreign(*members: tuple[tarfile.TarInfo | str, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=kind) as out:
        for info, data in members:
            info = tarfile.TarInfo(info) if isinstance(info, str) else info
            info.size = len(data) if info.isreg() else 0
            out.addfile(info, io.BytesIO(data))
    return sink.getvalue()


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_every_format(tmp_path: Path, kind: int) -> None:
    deep = "/".join(["folder" * 3] * 7) if kind != tarfile.USTAR_FORMAT else "a" * 90
    (tmp_path / "x.tar").write_bytes(foreign((f"{deep}/{'n' * 60}.png", png(0)), ("b.PNG", png(1)), kind=kind))
    done = shards.shard_in_process(config(tmp_path / "x.tar", tmp_path / "set", classes=False))
    assert sorted(manifest.samples(done)["source"].to_pylist()) == sorted([f"x.tar#{deep}/{'n' * 60}", "x.tar#b"])


def test_json_tags_must_be_a_list(tmp_path: Path) -> None:
    bad = [b"{}", b"[[1]]", b"nonsense", b"[" * 100_000, b'["a", 1]']
    (tmp_path / "x.tar").write_bytes(
        foreign(*(m for i, text in enumerate(bad) for m in ((f"{i}.png", png(i)), (f"{i}.json", text))))
    )
    done = shards.shard_in_process(config(tmp_path / "x.tar", tmp_path / "set", tags_field="json", classes=False))
    assert done.names.tags == ("1", "a")
    assert done.card["rejected"] == 4
    assert json.loads(storage.read_bytes(f"{done.url}/manifest.json"))["names"]["tags"] == ["1", "a"]
