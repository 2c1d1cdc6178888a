"""Images that a model made as a shard set: the format, the tables and the resumption of `shards`, without a source.

A slice is one shard and its part record, a pure function of the set's facts and of the slice's number; the record is
what makes it finished, so a killed job goes on where it was and ends in the same bytes.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.config import ShardConfig
from pipeline.data.formats import codecs, tar
from pipeline.data.making import shards
from pipeline.data.making.card import make_card
from pipeline.data.making.slices import Part, ShardWriter, SliceDone, part_url, read_part
from pipeline.data.sets import manifest as manifests
from pipeline.data.sets import versions
from pipeline.data.sets.manifest import TRAIN, ImageSpec, Manifest, Names
from pipeline.data.sets.tables import REJECTS_SCHEMA, REMOVED_SCHEMA, SAMPLES_SCHEMA, SHARDS_SCHEMA, parquet_bytes

ENCODING = "png"


@dataclass(frozen=True)
class GeneratedSet:
    """What is made. facts: all that the images follow from, plain JSON; the card shows it, and sets that differ in it
    are different sets. class_names: of the labels; empty where images have none.
    """

    url: str
    image: ImageSpec
    images: int
    samples_per_shard: int
    class_names: tuple[str, ...]
    facts: dict[str, Any]

    @property
    def digest(self) -> str:
        """Names the set before it is made."""
        known = [self.image.shape, self.images, self.samples_per_shard, self.class_names, self.facts]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    @property
    def building(self) -> str:
        """Where part records lie until the set is committed."""
        return storage.join(self.url, f"building-{self.digest[:12]}")

    @property
    def slices(self) -> int:
        """How many shards there are."""
        return -(-self.images // self.samples_per_shard)

    def indices(self, index: int) -> range:
        """Which images the index-th slice holds."""
        return range(index * self.samples_per_shard, min((index + 1) * self.samples_per_shard, self.images))


def write_slice(made: GeneratedSet, index: int, pixels: codecs.UInt8s, labels: Sequence[int] | None) -> SliceDone:
    """Writes one slice's tar, then its part record. pixels: uint8 (n, H, W, C); labels: one an image, or None."""
    extras = (tar.CLASS,) if labels is not None else ()
    shard, sums = ShardWriter(ENCODING, extras), np.zeros((2, made.image.channels), dtype=np.int64)
    for number, each in enumerate(pixels):
        content = hashlib.sha256(b"%d %d %d\n" % each.shape + each.tobytes()).digest()
        payload = codecs.encode_png(each)
        row: dict[str, Any] = {
            "key": f"{index:05d}-{number:05d}",
            "content": content,
            "original": hashlib.sha256(payload).digest(),
            "label": None if labels is None else labels[number],
            "tags": None,
            "caption": None,
            "width": each.shape[1],
            "height": each.shape[0],
            "source": f"image {made.indices(index)[number]}",
        }
        shard.add(row, payload)
        sums += codecs.channel_sums(each)
    written = shard.write(made.url, TRAIN, index)
    rows = pa.Table.from_pylist([row | {"shard": written["url"]} for row in shard.rows], SAMPLES_SCHEMA)
    note = {"shards": [written], "sums": {TRAIN: sums.tolist()}, "rejects": [], "rejected": 0}
    record = rows.replace_schema_metadata({b"part": json.dumps(note).encode()})
    storage.write_bytes(part_url(made.building, index), parquet_bytes(record))
    return SliceDone(index, rows.num_rows, 0, written["size"])


def finished(made: GeneratedSet) -> dict[int, SliceDone]:
    """The slices whose part records and tars stand already."""
    done: dict[int, SliceDone] = {}
    there = {f"shards/{entry.path}": entry.size for entry in storage.list_files(storage.join(made.url, "shards"))}
    for entry in storage.list_files(made.building):
        if re.fullmatch(r"[0-9]{5,}\.parquet", entry.path):
            index = int(entry.path.split(".")[0])
            part = read_part(storage.join(made.building, entry.path))
            if index < made.slices and all(there.get(shard["url"]) == shard["size"] for shard in part.shards):
                done[index] = SliceDone(index, part.rows.num_rows, 0, sum(shard["size"] for shard in part.shards))
    return done


def standing(made: GeneratedSet) -> Manifest | None:
    """The finished set at the URL, if there is one.

    Raises:
        ValueError: it is another set; says in which facts it differs.
    """
    if not storage.exists(storage.join(made.url, "manifest.json")):
        return None
    found = manifests.load(made.url)
    if found.plan == made.digest:
        return found
    there, asked = found.card.get("generated") or {}, _facts(made)
    changed = [
        f"{name}: {there.get(name)!r} there, {asked[name]!r} asked" for name in asked if there.get(name) != asked[name]
    ]
    reason = "; ".join(changed[:4]) if there else "images that no model made"
    raise ValueError(f"{made.url} already holds another set, {found.digest[:12]} ({reason}); choose another url")


def damaged(found: Manifest) -> list[int]:
    """The slices of a finished set whose shard is not what the manifest says; reads all of it."""
    rows = zip(*(found.shards[name].to_pylist() for name in ("url", "size", "sha256")), strict=True)
    return sorted(shards.slice_of(url) for url, size, sha256 in rows if shards.damage(found.url, url, size, sha256))


def clean(made: GeneratedSet) -> None:
    """Drops the part records."""
    storage.delete_tree(made.building)


def commit(made: GeneratedSet, may_write: Callable[[], None] = lambda: None) -> Manifest:
    """Joins all part records into the set's tables and writes the manifest, last. may_write: see `versions.commit`.

    Raises:
        FileNotFoundError: a slice is not finished.
    """
    with tempfile.TemporaryDirectory(prefix="raydiffusion-commit-") as folder:
        path = os.path.join(folder, "samples.parquet")
        rows: list[dict[str, Any]] = []
        contents: list[bytes] = []
        sums: list[Any] = []
        with pq.ParquetWriter(path, SAMPLES_SCHEMA, compression="zstd") as writer:
            for part in _parts(made):
                writer.write_table(part.rows)
                rows += part.shards
                contents += part.rows["content"].to_pylist()
                sums.append(part.sums[TRAIN])
        names, none = Names(made.class_names), REMOVED_SCHEMA.empty_table()
        counts = (made.images, 0, 0, 0, len(contents) - len(set(contents)))
        config = ShardConfig(made.url, made.url, made.image.size, made.image.channels, ENCODING, held_out=0.0)
        card = make_card(config, None, names, rows, none, counts, {TRAIN: sums})
        card |= {"source": "made by a model", "policy": {}, "generated": _facts(made)}
        new = versions.Version(
            made.image,
            (tar.CLASS,) if made.class_names else (),
            names,
            pa.Table.from_pylist(rows, schema=SHARDS_SCHEMA),
            none,
            card,
            made.digest,
            made.slices,
            path,
            REJECTS_SCHEMA.empty_table(),
            None,
        )
        found = versions.commit(made.url, new, may_write)
    clean(made)
    return found


def _parts(made: GeneratedSet) -> Iterable[Part]:
    for index in range(made.slices):
        yield read_part(part_url(made.building, index))


def _facts(made: GeneratedSet) -> dict[str, Any]:
    return {**made.facts, "images": made.images, "samples_per_shard": made.samples_per_shard}
