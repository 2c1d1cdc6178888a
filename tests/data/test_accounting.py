"""Everything in a source is in the set, or named with its reason: counted in members, files and rows."""

import io
import os
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from pipeline.data.formats import codecs, fit
from pipeline.data.making import shards
from pipeline.data.making.shards import ShardConfig
from pipeline.data.making.sources import tars
from pipeline.data.sets import manifest
from pipeline.data.sets.manifest import Manifest

FEW = int(os.environ.get("ACCOUNTING_EXAMPLES", "8"))
quick = settings(
    max_examples=FEW, deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
PNG = [codecs.encode_png(np.full((4, 4, 3), 10 * i, np.uint8)) for i in range(20)]


def make(source: Path | str, folder: Path, **values: Any) -> Manifest:
    defaults: dict[str, Any] = {"image_size": 4, "samples_per_shard": 4, "held_out": 0.0}
    return shards.shard_in_process(ShardConfig(str(source), str(folder / "set"), **(defaults | values)))


def named(done: Manifest) -> dict[str, str]:
    rows = manifest.rejects(done).to_pylist()
    found = {row["source"]: row["reason"] for row in rows}
    assert done.card["rejected"] + done.card["others"] == len(rows)
    assert all(found.values())
    return found


def accounted(done: Manifest) -> int:
    """Items that are in the set or named."""
    return sum(done.card["samples"].values()) + done.card["sides"] + manifest.rejects(done).num_rows


def archive(members: list[tuple[str, bytes]], kind: bytes = tarfile.REGTYPE) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.GNU_FORMAT) as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(data) if kind == tarfile.REGTYPE else 0
            out.addfile(info, io.BytesIO(data))
    return sink.getvalue()


@given(st.text(st.sampled_from("ab./-Ä"), max_size=12))
def test_keys_are_webdatasets(name: str) -> None:
    key, suffix = tars.key_of(name, "first-dot")
    theirs = base_plus_ext(name)
    if theirs[0] is None:
        assert (key, suffix) == (name, "")
    else:
        assert (key, suffix) == (theirs[0], str(theirs[1]).lower())


stems = st.sampled_from(["a", "b", "d/a", "d/b", "d.x/a", "IMG.2021.05", ".hidden", "d/"])
suffixes = st.sampled_from(
    [".png", ".jpg", ".PNG", ".left.png", ".right.png", ".cls", ".json", ".txt", ".bin", ".pkl", ".bmp", "", ".gif"]
)
kinds = st.sampled_from([tarfile.REGTYPE] * 8 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])


@quick
@given(
    st.lists(st.lists(st.tuples(stems, suffixes, kinds), max_size=10), min_size=1, max_size=3),
    st.sampled_from(["first-dot", "last-dot"]),
    st.sampled_from(["", "left.png", "png"]),
    st.booleans(),
)
def test_every_member_of_a_tar(parts: list[list[tuple[str, str, bytes]]], key: str, image: str, labels: bool) -> None:
    assume((key, image) != ("last-dot", "left.png"))  # no member has that suffix then
    bodies = {".cls": b"1", ".json": b'["x"]', ".txt": b"words", ".bin": b"?", ".pkl": b"!"}
    count, whole, names = 0, b"", Counter[str]()
    for part in parts:
        for stem, suffix, kind in part:
            data = bodies.get(suffix.lower(), PNG[count % 20])
            whole += archive([(stem + suffix, data)], kind)  # an end mark after each: concatenated archives
            names[stem + suffix] += 1
            count += 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        (folder / "in" / "x.TAR").write_bytes(whole + archive([("sure.left.png", PNG[0]), ("sure.cls", b"1")]))
        (folder / "in" / "good.tar").write_bytes(archive([("good.png", PNG[1]), ("sure.left.png", PNG[2])]))
        (folder / "in" / "old.tar.gz").write_bytes(b"\x1f\x8b")
        fields = {"tags_field": "json", "caption_field": "txt"} if labels else {"classes": False}
        done = make(folder / "in", folder, key=key, image=image, **fields)
        assert accounted(done) == count + 4 + 1
        reasons = named(done)
        assert "gunzip" in reasons["old.tar.gz"]
        taken = Counter(manifest.samples(done)["source"].to_pylist())
        for member, times in names.items():
            if member.lower().endswith((".png", ".jpg")):
                stem = tars.key_of(member, key)[0]
                there = f"x.TAR#{member}" in reasons or taken[f"x.TAR#{stem}"] >= 1
                assert there, (member, times, reasons)


def test_views_dots_and_second_images_are_named_with_the_option_that_takes_them(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(
        archive(
            [
                ("1.left.png", PNG[0]),
                ("1.right.png", PNG[1]),
                ("IMG.2021.05.01.jpg", PNG[2]),
                ("a.png", PNG[3]),
                ("a.webp", PNG[4]),
                ("a.txt", b"words"),
            ]
        )
    )
    done = make(tmp_path / "x.tar", tmp_path)
    assert manifest.samples(done)["source"].to_pylist() == ["x.tar#a"]
    reasons = named(done)
    assert "image: left.png takes it, key: last-dot every image" in reasons["x.tar#1.left.png"]
    assert "key: last-dot" in reasons["x.tar#IMG.2021.05.01.jpg"]
    assert "image: webp takes this one" in reasons["x.tar#a.webp"]
    assert "caption_field: txt takes it" in reasons["x.tar#a.txt"]
    every = make(tmp_path / "x.tar", tmp_path / "every", key="last-dot")
    assert sorted(manifest.samples(every)["source"].to_pylist()) == [
        "x.tar#1.left", "x.tar#1.right", "x.tar#IMG.2021.05.01", "x.tar#a",
    ]  # fmt: skip
    left = make(tmp_path / "x.tar", tmp_path / "left", image="left.png")
    assert manifest.samples(left)["source"].to_pylist() == ["x.tar#1"]
    with pytest.raises(ValueError, match=r"image: '?None'? there|image: None there, 'left.png' asked"):
        make(tmp_path / "x.tar", tmp_path, image="left.png")
    with pytest.raises(ValueError, match=r"key: 'last-dot' there, None asked"):
        make(tmp_path / "x.tar", tmp_path / "every")


def test_a_damaged_shard_of_images_with_one_name_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"".join(archive([("a.png", body)]) for body in (b"bad", PNG[0], PNG[1])))
    done = make(tmp_path / "x.tar", tmp_path)
    assert manifest.samples(done)["source"].to_pylist() == ["x.tar#a"] * 2
    shard = Path(done.url, *done.shards["url"].to_pylist()[0].split("/"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    work = shards.plan(ShardConfig(str(tmp_path / "x.tar"), done.url, image_size=4, samples_per_shard=4, held_out=0.0))
    for task in shards.made_again(work, [0]):
        shards.make_slice(work.config, work.building, task)
    work.close()
    assert shard.read_bytes() == whole


def test_patterns_of_files(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"p-{number:05d}.tar").write_bytes(archive([(f"{number}.png", PNG[number])]))
    done = make(f"{tmp_path}/p-{{00001..00002}}.tar", tmp_path)
    assert sorted(manifest.samples(done)["source"].to_pylist()) == ["p-00001.tar#1", "p-00002.tar#2"]
    with pytest.raises(ValueError, match=r"there is no .*p-00003.tar"):
        make(f"{tmp_path}/p-{{00001..00003}}.tar", tmp_path / "more")
    for name in ("x.tar.gz", "x.tgz", "x.ZIP"):
        with pytest.raises(ValueError, match=r"source .* is a (compressed tar|zip archive)"):
            make(tmp_path / name, tmp_path / "packed")


FILES = [b"/%d.png", b"/x%d.JPG", b"/%d\xff.png", b"/%d.txt", b"/%d.zip", b"/no suffix %d", b"/%d.bad.png"]


@quick
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(range(8))), min_size=1, max_size=12, unique=True))
def test_every_entry_of_a_folder(entries: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        source = Path(name, "in")
        for where, kind in [*entries, ("sure", 0)]:
            (source / where).mkdir(parents=True, exist_ok=True)
            path = os.fsencode(source / where)
            if kind == 7:
                os.symlink("/nowhere", path + b"/gone.png")
                continue
            file = [b"/%d.png", b"/x%d.JPG", b"/%d\xff.png", b"/%d.txt", b"/%d.zip", b"/no suffix %d", b"/%d.bad.png"][
                kind
            ]
            with open(path + file % kind, "wb") as out:
                out.write(b"hello" if kind in (3, 4, 6) else PNG[kind])
        (source / "README.md").write_text("words")
        (source / "labels.csv").write_text("words")
        done = make(source, Path(name))
        assert accounted(done) == len(entries) + 3
        reasons = named(done)
        assert reasons["README.md"].startswith("other")
        assert len(manifest.samples(done)) == 1 + sum(kind in (0, 1, 5) for _, kind in entries)
        assert sum("not UTF-8" in reason for reason in reasons.values()) == sum(kind == 2 for _, kind in entries)
        assert make(source, Path(name)).version == 1, "all of it is known"


@quick
@given(st.lists(st.lists(st.sampled_from(["good", "bad", "none", "class"]), max_size=9), min_size=1, max_size=3))
def test_every_row_of_a_table(tables: list[list[str]]) -> None:
    values = {"good": PNG[3], "bad": b"no image", "none": None, "class": PNG[4]}
    with tempfile.TemporaryDirectory() as name:
        source = Path(name, "in")
        source.mkdir()
        rows = 0
        for number, kinds in enumerate([*tables, ["good"]]):
            columns = [pa.array([values[kind] for kind in kinds], pa.binary())]
            columns.append(pa.array([None if kind == "class" else "x" for kind in kinds], pa.string()))
            pq.write_table(pa.table(columns, ["image", "label"]), source / f"{number}.PARQUET", row_group_size=2)
            rows += len(kinds)
        twice = pa.table([pa.array([PNG[0], PNG[1]])] * 2 + [pa.array(["x", "x"])], ["image", "image", "label"])
        pq.write_table(twice, source / "twice.parquet")
        (source / "cut.parquet").write_bytes(b"PAR1 hello PAR1")
        (source / "README.md").write_text("words")
        done = make(source, Path(name))
        assert accounted(done) == rows + 2 + 2
        reasons = named(done)
        assert reasons["twice.parquet#1"] == "the table has 2 columns named 'image'"
        assert "not a Parquet table" in reasons["cut.parquet"]
        assert reasons["README.md"].startswith("other")
        assert len(manifest.samples(done)) == 1 + sum(kind == "good" for kinds in tables for kind in kinds)


def test_sources_of_several_kinds_are_chosen_or_refused(tmp_path: Path) -> None:
    source = tmp_path / "in"
    (source / "cats").mkdir(parents=True)
    (source / "cats" / "a.png").write_bytes(PNG[0])
    (source / "extra.tar").write_bytes(archive([("b.png", PNG[1])]))
    with pytest.raises(ValueError, match=r"several kinds \(1 images, 1 tars, of the first 2 files\)"):
        make(source, tmp_path)
    tarred = make(source, tmp_path / "t", kind="tars")
    assert manifest.samples(tarred)["source"].to_pylist() == ["extra.tar#b"]
    assert named(tarred)["cats/a.png"] == "other: a file beside the tars"
    images = make(source, tmp_path / "i", kind="images")
    assert manifest.samples(images)["source"].to_pylist() == ["cats/a.png"]
    assert named(images)["extra.tar"].startswith("other")


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(PNG[0])
    done = shards.shard_in_process(ShardConfig("~/images", "~/set", image_size=4, held_out=0.0))
    assert done.split("train").total == 1
    assert (tmp_path / "set" / "manifest.json").exists()


@pytest.mark.parametrize("error", [MemoryError("none left"), RuntimeError("resizer"), KeyError("x")])
def test_a_failing_decoder_or_resizer_rejects_that_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    real, calls = fit.fit, []

    def failing(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return real(*args)

    monkeypatch.setattr(fit, "fit", failing)
    for number in range(3):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.png").write_bytes(PNG[number])
    done = make(tmp_path / "in", tmp_path)
    assert len(manifest.samples(done)) == 2
    assert type(error).__name__ in next(iter(named(done).values()))
