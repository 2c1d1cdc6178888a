"""One slice of the source becomes shards: read, check, resize, encode. A pure function of its arguments and the
source, so that a lost task is simply done again and gives the same bytes.

Each image goes to train or held-out by the hash of its final pixels, so that it never moves and exact duplicates stay
on one side. A slice writes its tars, then its part record; the record is what makes it finished.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.config import ShardConfig
from pipeline.data.formats import codecs, fit, headers, tar
from pipeline.data.making.sources.base import IMAGE_SUFFIXES, Found, Unit, shown
from pipeline.data.making.sources.kinds import open_source
from pipeline.data.sets.manifest import HELD_OUT, SPLITS, TRAIN
from pipeline.data.sets.tables import SAMPLES_SCHEMA, Table, parquet_bytes

MOST_REJECTS = 10_000  # named one by one, a slice
MOST_TAGS = 1 << 16


@dataclass(frozen=True)
class Slice:
    """A task: units of the source, the labels to keep, the numbers of named classes; `numbers` takes only these images
    of the units, by these numbers (several where images of one archive have one name).
    """

    index: int
    units: tuple[Unit, ...]
    extras: tuple[str, ...]
    classes: dict[str, int]
    numbers: dict[str, list[int]] | None = None


@dataclass(frozen=True)
class SliceDone:
    """What a slice came to."""

    index: int
    images: int
    rejected: int
    bytes: int


@dataclass(frozen=True)
class Part:
    """A part record: rows of SAMPLES_SCHEMA, rows of SHARDS_SCHEMA, exact channel sums by split, the first rejected
    images with reasons, and how many there were; how many members gave labels to images of the set (`sides`), and how
    many things were left out of which no image was expected (`others`, among the rejects by name).
    """

    rows: Table
    shards: list[dict[str, Any]]
    sums: dict[str, list[list[int]]]
    rejects: list[tuple[str, str]]
    rejected: int
    sides: int = 0
    others: int = 0


def make_slice(config: ShardConfig, building: str, task: Slice) -> SliceDone:
    """Makes one slice's tars and then its part record.

    Raises:
        OSError: a store that does not answer (an unreadable *image* is counted and listed, not raised).
    """
    maker = _Maker(config, task)
    number, left = 0, {name: list(numbers) for name, numbers in (task.numbers or {}).items()}
    for found in open_source(config).read(task.units):
        if found.beside:
            maker.name_beside(found)
        elif task.numbers is None:
            maker.take(number, found)
        elif left.get(found.name) and maker.take(left[found.name][0], found):
            left[found.name].pop(0)
        number += not found.beside
    part = maker.finish()
    note = {
        "shards": part.shards,
        "sums": part.sums,
        "rejects": part.rejects,
        "rejected": part.rejected,
        "sides": part.sides,
        "others": part.others,
    }
    storage.write_bytes(
        part_url(building, task.index),
        parquet_bytes(part.rows.replace_schema_metadata({b"part": json.dumps(note).encode()})),
    )
    return SliceDone(task.index, part.rows.num_rows, part.rejected, sum(row["size"] for row in part.shards))


def part_url(building: str, index: int) -> str:
    """Where a slice's part record lies."""
    return storage.join(building, f"{index:05d}.parquet")


def read_part(url: str) -> Part:
    """A part record."""
    table = pq.read_table(pa.BufferReader(storage.read_bytes(url)))
    note = json.loads((table.schema.metadata or {})[b"part"])
    rejects = [(source, reason) for source, reason in note["rejects"]]
    return Part(table.replace_schema_metadata(None), note["shards"], note["sums"], rejects, *_counts(note))


def _counts(note: dict[str, Any]) -> tuple[int, int, int]:
    return note["rejected"], note.get("sides", 0), note.get("others", 0)


class _Maker:
    """The open tars of one slice, and everything that its record says."""

    def __init__(self, config: ShardConfig, task: Slice) -> None:
        self.config, self.task = config, task
        self.open: dict[str, ShardWriter] = {}
        self.shards: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.sums = {split: np.zeros((2, config.channels), dtype=np.int64) for split in SPLITS}
        self.rejects: list[tuple[str, str]] = []
        self.beside: list[tuple[str, str]] = []
        self.rejected = self.others = self.sides = 0
        self.threshold = int(config.held_out * 2**64)

    def take(self, number: int, found: Found) -> bool:
        """One image of the source, into a tar (True) or among the rejected."""
        config, task = self.config, self.task
        try:
            if isinstance(found.data, ValueError):
                raise found.data
            original = codecs.decode(found.data, config.channels, config.limits)
            label = self._label(found)
            pixels = fit.fit(original, config.image_size, config.resize)
            payload = codecs.encode(pixels, config.encoding, config.quality)
        except Exception as error:  # whatever a decoder or a resizer makes of it is named, and rejects this one only
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            if isinstance(error, headers.NoImage) and not found.name.lower().endswith(IMAGE_SUFFIXES):
                reason = f"other: {reason}"
            self._reject(found, reason)
            return False
        self.sides += len(found.sides)
        content = hashlib.sha256(b"%d %d %d\n" % pixels.shape + pixels.tobytes()).digest()
        split = HELD_OUT if int.from_bytes(content[:8], "big") < self.threshold else TRAIN
        row: dict[str, Any] = {
            "key": f"{task.index:05d}-{number:05d}",
            "content": content,
            "original": hashlib.sha256(found.data).digest(),
            "label": label,
            "tags": list(found.tags) if tar.TAGS in task.extras else None,
            "caption": found.caption if tar.CAPTION in task.extras else None,
            "width": original.shape[1],
            "height": original.shape[0],
            "source": found.name,
        }
        shard = self.open.setdefault(split, ShardWriter(config.encoding, task.extras))
        shard.add(row, payload)
        self.sums[split] += codecs.channel_sums(pixels)
        if len(shard.rows) >= config.slice_size:
            self._close(split)
        return True

    def finish(self) -> Part:
        """Writes the tars that are still open."""
        for split in SPLITS:
            self._close(split)
        last = shown(self.task.units[-1].path)
        for named, count, what in (
            (self.rejects, self.rejected, "images of this slice were rejected"),
            (self.beside, self.others, "things of this slice are no images"),
        ):
            if count > len(named):
                named.append((last, f"{count - len(named)} more {what}"))
        rows = pa.Table.from_pylist(self.rows, schema=SAMPLES_SCHEMA)
        sums = {split: values.tolist() for split, values in self.sums.items()}
        return Part(rows, self.shards, sums, self.rejects + self.beside, self.rejected, self.sides, self.others)

    def name_beside(self, found: Found) -> None:
        """Something of which no image was expected."""
        self.others += 1
        if len(self.beside) < MOST_REJECTS:
            self.beside.append((found.name, str(found.data)))

    def _reject(self, found: Found, reason: str) -> None:
        self.rejected += 1
        if len(self.rejects) < MOST_REJECTS:
            self.rejects.append((found.name, reason))
        for side in found.sides:
            self.name_beside(Found(side, ValueError("other: it belongs to an image that was rejected")))

    def _label(self, found: Found) -> int | None:
        if tar.CLASS not in self.task.extras:
            return None
        if found.label is None:
            raise ValueError("it has no class, and the set's images have one")
        return self.task.classes[found.label] if isinstance(found.label, str) else found.label

    def _close(self, split: str) -> None:
        shard = self.open.pop(split, None)
        if shard is not None:
            made = shard.write(self.config.url, split, self.task.index)
            self.shards.append(made)
            for row in shard.rows:
                row["shard"] = made["url"]
            self.rows += shard.rows


class ShardWriter:
    """One tar in memory and its rows."""

    def __init__(self, encoding: str, extras: tuple[str, ...]) -> None:
        self.suffix, self.extras = tar.SUFFIX[encoding], extras
        self.tar = bytearray()
        self.rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any], payload: bytes) -> None:
        """One sample, whose offset, size and sha256 are noted in its row."""
        key = row["key"].encode()
        self.tar += tar.header(key + self.suffix, len(payload))
        row |= {"offset": len(self.tar), "size": len(payload), "sha256": hashlib.sha256(payload).digest()}
        self.tar += tar.padded(payload)
        for extra in self.extras:
            text = tar.extra_bytes(extra, row)
            self.tar += tar.header(key + b"." + extra.encode(), len(text)) + tar.padded(text)
        self.rows.append(row)

    def write(self, url: str, split: str, index: int) -> dict[str, Any]:
        """Writes the tar; its row of SHARDS_SCHEMA."""
        self.tar += tar.END
        sha256 = storage.digest(self.tar)
        name = f"shards/{split}-{index:05d}-{sha256[:12]}.tar"
        storage.write_bytes(storage.join(url, *name.split("/")), self.tar)
        counts = sorted(Counter(row["label"] for row in self.rows).items()) if tar.CLASS in self.extras else []
        return {
            "url": name,
            "split": split,
            "size": len(self.tar),
            "sha256": sha256,
            "samples": len(self.rows),
            "classes": [label for label, _ in counts],
            "class_counts": [count for _, count in counts],
        }
