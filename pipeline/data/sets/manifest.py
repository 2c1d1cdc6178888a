"""What a finished set of shards is: tables and a digest of their content, one version after the other.

    URL/shards/SPLIT-NNNNN-DIGEST.tar            the samples
    URL/manifest-DIGEST/shards.parquet           one row a shard, see SHARDS_SCHEMA
    URL/manifest-DIGEST/removed.parquet          one row a sample that readers must leave out, see REMOVED_SCHEMA
    URL/manifest-DIGEST/samples.parquet          one row a sample that this version added, see SAMPLES_SCHEMA
    URL/manifest-DIGEST/rejects.parquet          one row an image that it left out: source, reason
    URL/manifest-DIGEST/card.json                counts, per-channel statistics, source, policy
    URL/manifest-DIGEST/manifest.json            this version
    URL/manifest.json                            a copy of the newest version's, written last

The manifest's digest covers image format, labels, of every shard url, split, size, sha256 and number of samples, and
what was removed: the content, and none of the bytes that a Parquet library happens to write. A version never changes
and never goes: a run that began with it finds it by its digest.

A mixture is a manifest without shards of its own: finished sets, each by its digest, with weights.
"""

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage
from pipeline.data.formats import tar
from pipeline.data.sets.tables import (
    REJECTS_SCHEMA,
    REMOVED_SCHEMA,
    SAMPLES_SCHEMA,
    SHARDS_SCHEMA,
    Column,
    Table,
    integers,
)
from pipeline.size import Size, settled, sides

Int64s = NDArray[np.int64]

SCHEMA = 2
TRAIN, HELD_OUT = "train", "held_out"
SPLITS = (TRAIN, HELD_OUT)
MOST_ROOT_BYTES, MOST_TABLE_BYTES = 256 << 20, 64 << 30

_SHARD_URL = re.compile(r"shards/(train|held_out)-[0-9]{5,}-[0-9a-f]{12}\.tar")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ImageSpec:
    """What every sample of a set is: `size` pixels, a side or (height, width), of `channels` (1 grey, 3 RGB) bytes,
    stored as `encoding` (png, jpg, webp, raw).
    """

    size: Size
    channels: int
    encoding: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", settled(self.size))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, *sides(self.size)

    @property
    def bytes(self) -> int:
        """Decoded bytes of a sample."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Names:
    """What labels are called: class and tag i by their i-th name; names are only ever added."""

    classes: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class SetRef:
    """What a reader needs to know of a set: its URL, how its samples are stored, and where its samples tables lie."""

    root: str
    encoding: str
    extras: tuple[str, ...]
    tables: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Split:
    """The shards of one split in manifest order; sample id = starts[shard] + index within the shard.

    Attributes:
        samples: (S,) how many each tar holds.
        removed: (R, 2) int64, shard and index of those that readers leave out, sorted.
    """

    name: str
    urls: Column
    sha256: Column
    sizes: Int64s
    samples: Int64s
    removed: Int64s

    @cached_property
    def starts(self) -> Int64s:
        """The id of each shard's first sample, (S + 1,)."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.samples)])

    @cached_property
    def kept(self) -> Int64s:
        """(S,) samples of each shard that are read."""
        return self.samples - np.bincount(self.removed[:, 0], minlength=len(self.samples))

    @cached_property
    def kept_starts(self) -> Int64s:
        """How many are read before each shard, (S + 1,)."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.kept)])

    @property
    def total(self) -> int:
        """Samples of the split that are read."""
        return int(self.kept.sum())

    def places(self, listed: Int64s) -> Int64s:
        """(n, 2) of shard and number among the kept -> the same with the index within the tar."""
        if not len(self.removed):
            return listed
        made = listed.copy()
        for shard in np.intersect1d(listed[:, 0], self.removed[:, 0]).tolist():
            gone = self.removed[self.removed[:, 0] == shard, 1]
            here = np.flatnonzero(listed[:, 0] == shard)
            made[here, 1] += np.searchsorted(gone - np.arange(len(gone)), listed[here, 1], side="right")
        return made


@dataclass(frozen=True)
class Manifest:
    """A finished, verified manifest.

    Attributes:
        extras: what follows each image: "cls", "json" (tags), "txt" (a caption).
        plan: names the sources and the policy by which this version was made.
        slices: how many slices of sources all versions took.
        sample_tables: path below `url` and sha256 of each version's samples.parquet; likewise reject_tables.
        mixture: the weighted sets of a mixture; it has no shards itself.
    """

    url: str
    digest: str
    version: int
    image: ImageSpec
    extras: tuple[str, ...]
    names: Names
    shards: Table
    removed: Table
    card: dict[str, Any]
    plan: str
    slices: int
    sample_tables: tuple[tuple[str, str], ...]
    reject_tables: tuple[tuple[str, str], ...]
    mixture: tuple[tuple[float, "Manifest"], ...] = ()

    @property
    def labelled(self) -> bool:
        """Whether every sample has a class."""
        return tar.CLASS in self.extras

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class; empty where the set has none."""
        return self.names.classes

    @property
    def parts(self) -> tuple[tuple[float, "Manifest"], ...]:
        """The sets that are read, with their weights."""
        return self.mixture or ((1.0, self),)

    @property
    def ref(self) -> SetRef:
        """What a reader needs to know."""
        return SetRef(self.url, self.image.encoding, self.extras, self.sample_tables)

    def split(self, name: str) -> Split:
        """The shards of a split, in manifest order; those of a mixture's sets one after the other."""
        if name not in SPLITS:
            raise ValueError(f"unknown split {name!r}; there are {', '.join(SPLITS)}")
        if self.mixture:
            return _laid_end_to_end([part.split(name) for _, part in self.mixture])
        rows = self.shards.filter(pa.array(np.array(self.shards["split"].to_pylist(), dtype=object) == name))
        place = {url: i for i, url in enumerate(rows["url"].to_pylist())}
        removed = [
            (place[url], index)
            for url, index in zip(self.removed["shard"].to_pylist(), self.removed["index"].to_pylist(), strict=True)
            if url in place
        ]
        return Split(
            name,
            rows["url"],
            rows["sha256"],
            integers(rows["size"]),
            integers(rows["samples"]),
            np.array(sorted(removed), dtype=np.int64).reshape(-1, 2),
        )


def content_digest(
    image: ImageSpec, extras: tuple[str, ...], names: Names, shards: Table, removed: Table, mixture: object = None
) -> str:
    """The manifest's digest, sha256 in hex."""
    facts = {"schema": SCHEMA, "image": asdict(image), "extras": extras, "names": asdict(names), "mixture": mixture}
    total = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for table, strings, numbers in (
        (shards, ("url", "split", "sha256"), ("size", "samples")),
        (removed, ("shard",), ("index",)),
    ):
        for name in strings:
            total.update("\n".join(table[name].to_pylist()).encode() + b"\n\n")
        for name in numbers:
            total.update(integers(table[name]).astype("<i8").tobytes())
    return total.hexdigest()


def folder_of(digest: str) -> str:
    """Where a version's tables lie below the set's URL."""
    return f"manifest-{digest[:12]}"


def load(url: str, digest: str | None = None) -> Manifest:
    """Reads and verifies a manifest of the set at `url`.

    Args:
        digest: the version with this digest (a run that goes on must see the set it began with); None: the newest.

    Raises:
        ValueError: no set there, no such version, or tables that are not what manifest.json says.
    """
    name = storage.join(url, "manifest.json")
    root = _root(name, url)
    if digest is not None and root.get("digest") != digest:
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"not a manifest digest: {digest!r}; give 64 hexadecimal digits")
        name = storage.join(url, folder_of(digest), "manifest.json")
        if not storage.exists(name):
            newest = str(root.get("digest"))[:12]
            raise ValueError(
                f"the set at {url} has no version {digest[:12]}, its newest is {newest}: it was changed since"
            )
        root = _root(name, url)
    try:
        if root["schema"] != SCHEMA:
            raise ValueError(
                f"{name} has schema {root['schema']!r}; this version reads {SCHEMA}: remove that folder and run "
                "jobs.shard again"
            )
        image = ImageSpec(**root["image"])
        extras = tuple(str(item) for item in root["extras"])
        names = Names(*(tuple(str(item) for item in root["names"][kind]) for kind in ("classes", "tags")))
        tables, said = root["tables"], str(root["digest"])
        shards = pq.read_table(pa.BufferReader(_verified(url, **tables["shards.parquet"])))
        removed = pq.read_table(pa.BufferReader(_verified(url, **tables["removed.parquet"])))
        card = cast("dict[str, Any]", json.loads(_verified(url, **tables["card.json"])))
        sample_tables, reject_tables = (
            tuple((str(path), str(sha)) for path, sha in root[kind]) for kind in ("samples", "rejects")
        )
        mixture = [(float(weight), str(part), str(sha)) for weight, part, sha in root["mixture"]]
        facts = (int(root["version"]), str(root["plan"]), int(root["slices"]))
    except (KeyError, TypeError, pa.ArrowInvalid) as error:
        raise ValueError(f"{name} is damaged: {type(error).__name__}: {error}") from None
    if not shards.schema.equals(SHARDS_SCHEMA) or not removed.schema.equals(REMOVED_SCHEMA):
        raise ValueError(f"{url}: a table has other columns than schema {SCHEMA}: {shards.schema.names}")
    if not set(extras) <= set(tar.EXTRAS):
        raise ValueError(f"{name} is damaged: extras {extras}")
    for row in shards["url"].to_pylist():
        if not _SHARD_URL.fullmatch(row):
            raise ValueError(f"{url}: refused shard {row!r}; shards are named shards/SPLIT-NNNNN-DIGEST.tar")
    mixed = [[weight, sha] for weight, _, sha in mixture] or None
    got = content_digest(image, extras, names, shards, removed, mixed)
    if got != said or (digest is not None and got != digest):
        raise ValueError(f"{name} is damaged: it says digest {said}, its content has {got}")
    version, plan, slices = facts
    parts = tuple((weight, load(part, sha)) for weight, part, sha in mixture)
    return Manifest(
        url,
        got,
        version,
        image,
        extras,
        names,
        shards,
        removed,
        card,
        plan,
        slices,
        sample_tables,
        reject_tables,
        parts,
    )


def _root(name: str, url: str) -> dict[str, Any]:
    data, _ = storage.read_sure(name, None, MOST_ROOT_BYTES)  # nobody knows its digest: two reads must agree
    if data is None:
        raise ValueError(f"no finished shard set at {url}: there is no manifest.json; make one with jobs.shard")
    try:
        root = json.loads(data.tobytes())
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(root, dict):
        raise ValueError(f"{name} is damaged: not an object")
    return cast("dict[str, Any]", root)


def samples(manifest: Manifest) -> Table:
    """The table of all samples, verified, the removed ones too; see SAMPLES_SCHEMA. All of it in memory: about 200
    bytes a sample.
    """
    return _joined(manifest, manifest.sample_tables, SAMPLES_SCHEMA)


def rejects(manifest: Manifest) -> Table:
    """The table of images left out, with reasons."""
    return _joined(manifest, manifest.reject_tables, REJECTS_SCHEMA)


def _joined(manifest: Manifest, tables: tuple[tuple[str, str], ...], schema: Any) -> Table:
    return pa.concat_tables(
        [
            schema.empty_table(),
            *(pq.read_table(pa.BufferReader(_verified(manifest.url, path, sha))) for path, sha in tables),
        ]
    )


def _verified(url: str, path: str, sha256: str) -> bytes:
    name = storage.join(url, *path.split("/"))
    data, right = storage.read_sure(name, sha256, MOST_TABLE_BYTES)
    if data is None or not right:
        got = "nothing" if data is None else storage.digest(data)
        raise ValueError(f"{name} is damaged: expected sha256 {sha256}, got {got}")
    return data.tobytes()


def _laid_end_to_end(splits: list[Split]) -> Split:
    firsts = np.cumsum([0, *(len(split.samples) for split in splits)])
    removed = [split.removed + np.array([first, 0]) for split, first in zip(splits, firsts[:-1].tolist(), strict=True)]
    return Split(
        splits[0].name,
        pa.chunked_array([chunk for split in splits for chunk in split.urls.chunks], pa.string()),
        pa.chunked_array([chunk for split in splits for chunk in split.sha256.chunks], pa.string()),
        np.concatenate([split.sizes for split in splits]),
        np.concatenate([split.samples for split in splits]),
        np.concatenate(removed),
    )
