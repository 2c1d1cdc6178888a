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
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data import storage, tar

Table = Any  # pyarrow ships no types
Column = Any
Int64s = NDArray[np.int64]

SCHEMA = 2
TRAIN, HELD_OUT = "train", "held_out"
SPLITS = (TRAIN, HELD_OUT)
MOST_ROOT_BYTES = 256 << 20
READS = 3  # of a table whose digest is wrong, before it counts as damaged: the line may have erred

_SHARD_URL = re.compile(r"shards/(train|held_out)-[0-9]{5,}-[0-9a-f]{12}\.tar")
_DIGEST = re.compile(r"[0-9a-f]{64}")

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
        ("sha256", pa.binary(32)),  # of the stored bytes
        ("content", pa.binary(32)),  # of the stored pixels: equal for exact duplicates
        ("original", pa.binary(32)),  # of the source's bytes
        ("label", pa.int32()),
        ("tags", pa.list_(pa.string())),
        ("caption", pa.string()),
        ("width", pa.int32()),  # before resizing
        ("height", pa.int32()),
        ("source", pa.string()),
    ]
)
REMOVED_SCHEMA = pa.schema([("shard", pa.string()), ("index", pa.int64()), ("reason", pa.string())])
REJECTS_SCHEMA = pa.schema([("source", pa.string()), ("reason", pa.string())])


@dataclass(frozen=True)
class ImageSpec:
    """What every sample of a set is: `size` x `size` pixels of `channels` (1 grey, 3 RGB) bytes, stored as `encoding`
    (png, jpg, webp, raw).
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
            _integers(rows["size"]),
            _integers(rows["samples"]),
            np.array(sorted(removed), dtype=np.int64).reshape(-1, 2),
        )


@dataclass(frozen=True)
class Version:
    """What `commit` writes: the shards of all versions, and what is new in this one.

    Attributes:
        samples_path: the finished local samples.parquet of what is new; None where nothing is.
        rejects: the table of images left out by this version.
        before: the version that this one follows.
    """

    image: ImageSpec
    extras: tuple[str, ...]
    names: Names
    shards: Table
    removed: Table
    card: dict[str, Any]
    plan: str
    slices: int
    samples_path: str | None
    rejects: Table
    before: Manifest | None


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
            total.update(_integers(table[name]).astype("<i8").tobytes())
    return total.hexdigest()


def commit(url: str, new: Version) -> Manifest:
    """Writes the tables, then the version's manifest.json, then the set's."""
    digest = content_digest(new.image, new.extras, new.names, new.shards, new.removed)
    folder = folder_of(digest)
    before = new.before
    written = {
        "shards.parquet": parquet_bytes(new.shards),
        "removed.parquet": parquet_bytes(new.removed),
        "card.json": json_bytes(new.card),
    }
    if new.samples_path is not None:
        written["rejects.parquet"] = parquet_bytes(new.rejects)
    tables: dict[str, dict[str, str]] = {}
    for name, data in written.items():
        storage.write_bytes(storage.join(url, folder, name), data)
        tables[name] = {"path": f"{folder}/{name}", "sha256": storage.digest(data)}
    if new.samples_path is not None:
        storage.write_file(storage.join(url, folder, "samples.parquet"), new.samples_path)
        tables["samples.parquet"] = {
            "path": f"{folder}/samples.parquet",
            "sha256": storage.digest_of(new.samples_path),
        }
    return _write_root(
        url,
        {
            "schema": SCHEMA,
            "digest": digest,
            "version": before.version + 1 if before else 1,
            "follows": before.digest if before else None,
            "image": asdict(new.image),
            "extras": list(new.extras),
            "names": asdict(new.names),
            "plan": new.plan,
            "slices": new.slices,
            "tables": {name: tables[name] for name in ("shards.parquet", "removed.parquet", "card.json")},
            "samples": [*(before.sample_tables if before else ()), *_present(tables, "samples.parquet")],
            "rejects": [*(before.reject_tables if before else ()), *_present(tables, "rejects.parquet")],
            "mixture": [],
        },
    )


def mix(url: str, weights: Mapping[str, float]) -> Manifest:
    """Writes a mixture of finished sets (URL -> weight) at `url`; a part is read as it is now, by its digest.

    Raises:
        ValueError: no sets, a weight that is not positive, or sets whose images, labels or names differ.
    """
    if not weights:
        raise ValueError("a mixture needs at least one set with its weight")
    for name, weight in weights.items():
        if not 0.0 < weight < float("inf"):
            raise ValueError(f"mixture: the weight of {name} must be positive; got {weight}")
    parts = [(float(weight), load(name)) for name, weight in weights.items()]
    first = parts[0][1]
    for _, part in parts:
        if part.mixture:
            raise ValueError(f"mixture: {part.url} is a mixture itself; name its sets")
        for what in ("shape", "extras", "names"):
            have, want = (m.image.shape if what == "shape" else getattr(m, what) for m in (part, first))
            if have != want:
                raise ValueError(f"mixture: {part.url} has {what} {have}, {first.url} has {want}; they must be equal")
    mixture = [[weight, part.url, part.digest] for weight, part in parts]
    facts = [[weight, part.digest] for weight, part in parts]
    shards, removed = SHARDS_SCHEMA.empty_table(), REMOVED_SCHEMA.empty_table()
    digest = content_digest(first.image, first.extras, first.names, shards, removed, facts)
    folder = folder_of(digest)
    card = {
        "samples": {split: sum(part.card["samples"][split] for _, part in parts) for split in SPLITS},
        "shards": {split: sum(part.card["shards"][split] for _, part in parts) for split in SPLITS},
        "rejected": 0,
        "mixture": [{"url": part.url, "digest": part.digest, "weight": weight} for weight, part in parts],
    }
    tables: dict[str, dict[str, str]] = {}
    for name, data in (
        ("shards.parquet", parquet_bytes(shards)),
        ("removed.parquet", parquet_bytes(removed)),
        ("card.json", json_bytes(card)),
    ):
        storage.write_bytes(storage.join(url, folder, name), data)
        tables[name] = {"path": f"{folder}/{name}", "sha256": storage.digest(data)}
    return _write_root(
        url,
        {
            "schema": SCHEMA,
            "digest": digest,
            "version": 1,
            "follows": None,
            "image": asdict(first.image),
            "extras": list(first.extras),
            "names": asdict(first.names),
            "plan": "",
            "slices": 0,
            "tables": tables,
            "samples": [],
            "rejects": [],
            "mixture": mixture,
        },
    )


def _write_root(url: str, root: dict[str, Any]) -> Manifest:
    data = json_bytes(root)
    storage.write_bytes(storage.join(url, folder_of(root["digest"]), "manifest.json"), data)
    storage.write_bytes(storage.join(url, "manifest.json"), data)
    return load(url)


def _present(tables: dict[str, dict[str, str]], name: str) -> list[list[str]]:
    return [list(tables[name].values())] if name in tables else []


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
    for attempt in range(READS):
        try:
            return _load(url, digest)
        except ValueError:
            if attempt + 1 == READS or not storage.is_s3(url):
                raise
    raise AssertionError("unreachable: the last attempt returns or raises")


def _load(url: str, digest: str | None) -> Manifest:
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
    try:
        root = json.loads(storage.read_bytes(name, 0, MOST_ROOT_BYTES))
    except FileNotFoundError:
        raise ValueError(
            f"no finished shard set at {url}: there is no manifest.json; make one with jobs.shard"
        ) from None
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


def sample_batches(url: str, tables: tuple[tuple[str, str], ...], columns: list[str]) -> Iterator[Table]:
    """Some columns of the samples tables, a row group (a slice of the source) at a time; a few MiB in memory. Read by
    ranges, so not verified by the tables' digests.
    """
    for path, _ in tables:
        with storage.open_ranges(storage.join(url, *path.split("/"))) as raw, pq.ParquetFile(raw) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns=columns)


def shard_rows(url: str, tables: tuple[tuple[str, str], ...], shard: str) -> Table:
    """The rows of one shard's samples in tar order, found by the row groups' statistics.

    Raises:
        ValueError: no table has them.
    """
    for path, _ in tables:
        with storage.open_ranges(storage.join(url, *path.split("/"))) as raw, pq.ParquetFile(raw) as file:
            column = file.schema_arrow.get_field_index("shard")
            pieces: list[Table] = []
            for group in range(file.num_row_groups):
                found = file.metadata.row_group(group).column(column).statistics
                if found is not None and found.has_min_max and not found.min <= shard <= found.max:
                    continue
                rows = file.read_row_group(group)
                pieces.append(rows.filter(pa.array(np.array(rows["shard"].to_pylist(), dtype=object) == shard)))
            found_rows = pa.concat_tables(pieces) if pieces else SAMPLES_SCHEMA.empty_table()
            if found_rows.num_rows:
                return found_rows
    raise ValueError(f"no samples table of {url} has rows of {shard}")


def parquet_bytes(table: Table) -> bytes:
    """A table as Parquet."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def json_bytes(value: object) -> bytes:
    """Readable JSON in a fixed order of keys."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _joined(manifest: Manifest, tables: tuple[tuple[str, str], ...], schema: Any) -> Table:
    return pa.concat_tables(
        [
            schema.empty_table(),
            *(pq.read_table(pa.BufferReader(_verified(manifest.url, path, sha))) for path, sha in tables),
        ]
    )


def _verified(url: str, path: str, sha256: str) -> bytes:
    name = storage.join(url, *path.split("/"))
    data = storage.read_bytes(name)
    got = storage.digest(data)
    if got != sha256:
        raise ValueError(f"{name} is damaged: expected sha256 {sha256}, got {got}")
    return data


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


def _integers(column: Column) -> Int64s:
    return column.to_numpy().astype(np.int64)
