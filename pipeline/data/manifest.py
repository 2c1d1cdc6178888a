"""What a finished set of shards is: tables and a digest of their content.

    URL/shards/SPLIT-NNNNN-DIGEST.tar            the samples
    URL/manifest-DIGEST/shards.parquet           one row a shard, see SHARDS_SCHEMA
    URL/manifest-DIGEST/samples.parquet          one row a sample, see SAMPLES_SCHEMA
    URL/manifest-DIGEST/rejects.parquet          one row an image left out: source, reason
    URL/manifest-DIGEST/card.json                counts, per-channel statistics, source, policy
    URL/manifest.json                            written last: until it stands there is no set

The manifest's digest covers image format, class names and, of every shard, url, split, size, sha256 and number of
samples: the content, and none of the bytes that a Parquet library happens to write.
"""

import hashlib
import io
import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data import storage

Table = Any  # pyarrow ships no types
Column = Any

SCHEMA = 1
TRAIN, HELD_OUT = "train", "held_out"
SPLITS = (TRAIN, HELD_OUT)
TABLES = ("shards.parquet", "samples.parquet", "rejects.parquet", "card.json")

_SHARD_URL = re.compile(r"shards/(train|held_out)-[0-9]{5,}-[0-9a-f]{12}\.tar")

SHARDS_SCHEMA = pa.schema(
    [
        ("url", pa.string()),
        ("split", pa.string()),
        ("size", pa.int64()),
        ("sha256", pa.string()),
        ("samples", pa.int64()),
        ("classes", pa.list_(pa.int32())),
        ("class_counts", pa.list_(pa.int64())),
    ]
)
SAMPLES_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("sha256", pa.binary(32)),
        ("content", pa.binary(32)),
        ("label", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("source", pa.string()),
    ]
)
REJECTS_SCHEMA = pa.schema([("source", pa.string()), ("reason", pa.string())])


@dataclass(frozen=True)
class ImageSpec:
    """What every sample of a set is: `size` x `size` pixels of `channels` (1 grey, 3 RGB) bytes, stored as `encoding`
    (png, raw).
    """

    size: int
    channels: int
    encoding: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.size, self.size

    @property
    def bytes(self) -> int:
        """Decoded bytes of a sample."""
        return self.channels * self.size * self.size


@dataclass(frozen=True)
class Split:
    """The shards of one split in manifest order; sample id = starts[shard] + index within the shard."""

    name: str
    urls: Column
    sha256: Column
    sizes: NDArray[np.int64]
    samples: NDArray[np.int64]

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """The id of each shard's first sample, (S + 1,); the last entry is the number of samples."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.samples)])

    @property
    def total(self) -> int:
        """Samples in the split."""
        return int(self.samples.sum())


@dataclass(frozen=True)
class Manifest:
    """A finished, verified manifest. `class_names` is empty where the set has no classes; `plan` names the sources
    and the policy it was made by.
    """

    url: str
    digest: str
    image: ImageSpec
    class_names: tuple[str, ...]
    shards: Table
    card: dict[str, Any]
    plan: str

    @property
    def labelled(self) -> bool:
        """Whether every sample has a class."""
        return bool(self.class_names)

    def split(self, name: str) -> Split:
        """The shards of "train" or "held_out"."""
        if name not in SPLITS:
            raise ValueError(f"unknown split '{name}'; choose one of: {', '.join(SPLITS)}")
        rows = self.shards.filter(pa.compute.equal(self.shards["split"], name))  # pyright: ignore[reportAttributeAccessIssue]
        return Split(name, rows["url"], rows["sha256"], _integers(rows["size"]), _integers(rows["samples"]))


def content_digest(image: ImageSpec, class_names: tuple[str, ...], shards: Table) -> str:
    """The manifest's digest, sha256 in hex."""
    total = hashlib.sha256(
        json.dumps({"schema": SCHEMA, "image": asdict(image), "class_names": class_names}, sort_keys=True).encode()
    )
    for name in ("url", "split", "sha256"):
        total.update("\n".join(shards[name].to_pylist()).encode() + b"\n\n")
    for name in ("size", "samples"):
        total.update(_integers(shards[name]).astype("<i8").tobytes())
    return total.hexdigest()


def commit(
    url: str,
    image: ImageSpec,
    class_names: tuple[str, ...],
    shards: Table,
    samples_path: str,
    rejects: Table,
    card: dict[str, Any],
    plan: str,
) -> Manifest:
    """Writes the tables, then `manifest.json`; `samples_path` is the finished local samples.parquet."""
    digest = content_digest(image, class_names, shards)
    folder = f"manifest-{digest[:12]}"
    storage.write_bytes(storage.join(url, folder, "shards.parquet"), parquet_bytes(shards))
    storage.write_file(storage.join(url, folder, "samples.parquet"), samples_path)
    storage.write_bytes(storage.join(url, folder, "rejects.parquet"), parquet_bytes(rejects))
    storage.write_bytes(storage.join(url, folder, "card.json"), json_bytes(card))
    root = {
        "schema": SCHEMA,
        "digest": digest,
        "image": asdict(image),
        "class_names": list(class_names),
        "plan": plan,
        "tables": {
            name: {"path": f"{folder}/{name}", "sha256": storage.digest_of(storage.join(url, folder, name))}
            for name in TABLES
        },
    }
    storage.write_bytes(storage.join(url, "manifest.json"), json_bytes(root))
    return load(url)


def load(url: str, digest: str | None = None) -> Manifest:
    """Reads and verifies the manifest of the set at `url`.

    Args:
        digest: refuse any other content (a run that goes on must see the set it began with).

    Raises:
        ValueError: no set there, another digest, or tables that are not what manifest.json says.
    """
    name = storage.join(url, "manifest.json")
    try:
        root = json.loads(storage.read_bytes(name, 0, 256 << 20))
    except FileNotFoundError:
        raise ValueError(
            f"no finished shard set at {url}: there is no manifest.json; make one with jobs.shard"
        ) from None
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    try:
        if root["schema"] != SCHEMA:
            raise ValueError(f"{name} has schema {root['schema']!r}; this version reads {SCHEMA}")
        image, class_names = ImageSpec(**root["image"]), tuple(str(item) for item in root["class_names"])
        tables, plan, said = root["tables"], str(root["plan"]), str(root["digest"])
        shards = pq.read_table(pa.BufferReader(_verified(url, tables["shards.parquet"])))
        card = json.loads(_verified(url, tables["card.json"]))
    except (KeyError, TypeError, pa.ArrowInvalid) as error:
        raise ValueError(f"{name} is damaged: {type(error).__name__}: {error}") from None
    if not shards.schema.equals(SHARDS_SCHEMA):
        raise ValueError(f"{url}: the shard table has other columns than schema {SCHEMA}: {shards.schema.names}")
    for row in shards["url"].to_pylist():
        if not _SHARD_URL.fullmatch(row):
            raise ValueError(f"{url}: refused shard {row!r}; shards are named shards/SPLIT-NNNNN-DIGEST.tar")
    got = content_digest(image, class_names, shards)
    if got != said:
        raise ValueError(f"{name} is damaged: it says digest {said}, its content has {got}")
    if digest is not None and got != digest:
        raise ValueError(f"the set at {url} has digest {got[:12]}, not {digest[:12]}: it was changed since")
    return Manifest(url, got, image, class_names, shards, cast("dict[str, Any]", card), plan)


def samples(manifest: Manifest) -> Table:
    """The table of all samples, verified; see SAMPLES_SCHEMA. All of it in memory: about 150 bytes a sample."""
    return pq.read_table(pa.BufferReader(_verified(manifest.url, _tables(manifest.url)["samples.parquet"])))


def rejects(manifest: Manifest) -> Table:
    """The table of images left out, with reasons."""
    return pq.read_table(pa.BufferReader(_verified(manifest.url, _tables(manifest.url)["rejects.parquet"])))


def parquet_bytes(table: Table) -> bytes:
    """A table as Parquet."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def json_bytes(value: object) -> bytes:
    """Readable JSON in a fixed order of keys."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _tables(url: str) -> dict[str, dict[str, str]]:
    return json.loads(storage.read_bytes(storage.join(url, "manifest.json")))["tables"]


def _verified(url: str, table: dict[str, str]) -> bytes:
    data = storage.read_bytes(storage.join(url, *table["path"].split("/")))
    got = storage.digest(data)
    if got != table["sha256"]:
        raise ValueError(
            f"{storage.join(url, *table['path'].split('/'))} is damaged: expected sha256 {table['sha256']}, got {got}"
        )
    return data


def _integers(column: Column) -> NDArray[np.int64]:
    return column.to_numpy().astype(np.int64)
