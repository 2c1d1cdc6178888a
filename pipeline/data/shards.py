"""From a folder or prefix of images to tar shards: plan, make one slice, commit. No Ray here;
`cluster/shard_tasks.py` runs `make_slice` as tasks.

The plan lists the source once, orders it by a hash of each image's path (so that every shard mixes all classes) and
cuts it into slices. A slice is made by a pure function: read, check, resize, encode; each image goes to train or
held-out by the hash of its final pixels, so that it never moves and exact duplicates stay on one side. A slice writes
one tar a split, then its part record; the record is what makes it finished, so a killed job goes on where it was and
ends in the same bytes.
"""

import hashlib
import io
import json
import os
import re
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.choose import choose
from pipeline.data import images, storage, tar
from pipeline.data import manifest as manifests
from pipeline.data.manifest import HELD_OUT, SPLITS, TRAIN, ImageSpec, Manifest

T = TypeVar("T")
R = TypeVar("R")

SHARD_BYTES = 64 << 20
MOST_SAMPLES = 8192
READS_AHEAD = 8
PLACES = ("source", "url")  # fields that do not change what is made


@dataclass(frozen=True)
class ShardConfig:
    """How images become shards."""

    source: Annotated[str, "folder or s3:// prefix of jpg, png and webp images; sub-folders are classes"]
    url: Annotated[str, "where the set goes, a folder or s3:// prefix"]
    image_size: Annotated[int, "side of the square images, pixels"] = 64
    channels: Annotated[int, "1 grey, 3 RGB"] = 3
    encoding: Annotated[str, "png, or raw (uncompressed pixels, for tiny images)"] = "png"
    resize: Annotated[str, "centre-crop, squash, or exact (refuse other sizes)"] = "centre-crop"
    classes: Annotated[bool, "take the first sub-folder as the class"] = True
    held_out: Annotated[float, "fraction of images held out, chosen by content"] = 0.1
    samples_per_shard: Annotated[int, "images a shard; 0: as many as give about 64 MiB of pixels"] = 0
    max_image_bytes: Annotated[int, "largest encoded image read, bytes"] = 64 << 20
    max_image_pixels: Annotated[int, "largest image decoded, pixels"] = 64_000_000

    def __post_init__(self) -> None:
        for name in PLACES:
            storage.parse(getattr(self, name))
        if not 1 <= self.image_size <= 4096:
            raise ValueError(f"image_size must be 1 to 4096 pixels; got {self.image_size}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB); got {self.channels}")
        choose(tar.SUFFIX, self.encoding, "encoding")
        choose(images.POLICIES, self.resize, "resize policy")
        if not 0.0 <= self.held_out < 1.0:
            raise ValueError(f"held_out must be a fraction, 0 <= held_out < 1; got {self.held_out}")
        for name, least in (("samples_per_shard", 0), ("max_image_bytes", 1), ("max_image_pixels", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")

    @property
    def image(self) -> ImageSpec:
        """What every sample of the set is."""
        return ImageSpec(self.image_size, self.channels, self.encoding)

    @property
    def slice_size(self) -> int:
        """Source images a slice."""
        return self.samples_per_shard or min(MOST_SAMPLES, max(64, SHARD_BYTES // self.image.bytes))

    @property
    def policy(self) -> dict[str, Any]:
        """Everything that decides what is made from given sources."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in PLACES} | {
            "samples_per_shard": self.slice_size
        }


@dataclass(frozen=True)
class Slice:
    """A task: source images (path relative to the source, listed size) and the class numbers."""

    index: int
    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    classes: dict[str, int]


@dataclass(frozen=True)
class SliceDone:
    """What a slice came to."""

    index: int
    images: int
    rejected: int
    bytes: int


@dataclass
class Plan:
    """The listed source, in the order of slices; the listing itself lies in a temporary file, 24 bytes an image are
    in memory. Close it.
    """

    config: ShardConfig
    digest: str
    class_names: tuple[str, ...]
    size: int
    order: NDArray[np.int64]
    offsets: NDArray[np.int64]
    spool: Any = field(repr=False)

    @property
    def slices(self) -> int:
        """How many slices there are."""
        return -(-self.size // self.config.slice_size)

    @property
    def building(self) -> str:
        """Where part records lie until the set is committed."""
        return storage.join(self.config.url, f"building-{self.digest[:12]}")

    def slice(self, index: int) -> Slice:
        """The index-th slice."""
        chosen = self.order[index * self.config.slice_size : (index + 1) * self.config.slice_size]
        lines = [
            os.pread(self.spool.fileno(), int(self.offsets[i + 1] - self.offsets[i]), int(self.offsets[i]))
            for i in chosen
        ]
        rows = [json.loads(line) for line in lines]
        return Slice(
            index,
            tuple(path for path, _ in rows),
            tuple(size for _, size in rows),
            {name: i for i, name in enumerate(self.class_names)},
        )

    def close(self) -> None:
        """Drops the listing."""
        self.spool.close()


def plan(config: ShardConfig) -> Plan:
    """Lists the source once.

    Raises:
        ValueError: nothing there, or images both in sub-folders and outside while `classes` asks for one class an
            image.
    """
    local = storage.local_path(config.source)
    if local is not None and not local.is_dir():
        raise ValueError(f"source {config.source} is not a folder")
    spool = tempfile.TemporaryFile(prefix="raydiffusion-listing-")  # noqa: SIM115 - the plan closes it
    total = hashlib.sha256(json.dumps(config.policy, sort_keys=True).encode())
    offsets, hashes, classes = _Column(), _Column(), set[str]()
    bare: str | None = None
    at = 0
    for entry in storage.list_files(config.source):
        line = json.dumps([entry.path, entry.size]).encode()
        total.update(line)
        spool.write(line)
        offsets.append(at)
        hashes.append(int.from_bytes(hashlib.blake2b(entry.path.encode(), digest_size=8).digest(), "little") >> 1)
        at += len(line)
        folder, _, rest = entry.path.partition("/")
        if rest:
            classes.add(folder)
        elif bare is None:
            bare = entry.path
    spool.flush()
    offsets.append(at)
    size = len(hashes)
    if size == 0:
        spool.close()
        raise ValueError(f"source {config.source} is empty: no files in it")
    if config.classes and classes and bare is not None:
        spool.close()
        raise ValueError(
            f"source {config.source} has {bare!r} outside of its class folders "
            f"({', '.join(sorted(classes)[:5])}, ...); move it into one of them, or set classes: false"
        )
    names = tuple(sorted(classes)) if config.classes else ()
    return Plan(
        config, total.hexdigest(), names, size, np.argsort(hashes.array(), kind="stable"), offsets.array(), spool
    )


def make_slice(config: ShardConfig, building: str, task: Slice) -> SliceDone:
    """Reads, checks, resizes and encodes one slice's images, writes its tars and then its part record. A pure
    function of its arguments and the source: the same bytes each time.

    Raises:
        OSError: a store that does not answer (an unreadable *image* is counted and listed, not raised).
    """
    writers = {split: _ShardWriter(split, config, bool(task.classes)) for split in SPLITS}
    rejected: list[tuple[str, str]] = []
    limits = images.Limits(config.max_image_bytes, config.max_image_pixels)
    threshold = int(config.held_out * 2**64)
    jobs = [(path, size) for path, size in zip(task.paths, task.sizes, strict=True)]
    for number, (path, data) in enumerate(
        _ahead(
            lambda job: _source_bytes(config, limits, *job), jobs, READS_AHEAD if storage.is_s3(config.source) else 0
        )
    ):
        try:
            if isinstance(data, ValueError):
                raise data
            original = images.decode(data, config.channels, limits)
            pixels = images.fit(original, config.image_size, config.resize)
        except ValueError as error:
            rejected.append((path, str(error)))
            continue
        content = hashlib.sha256(b"%d %d %d\n" % pixels.shape + pixels.tobytes()).digest()
        split = HELD_OUT if int.from_bytes(content[:8], "big") < threshold else TRAIN
        label = task.classes[path.partition("/")[0]] if task.classes else None
        writers[split].add(
            f"{task.index:05d}-{number:05d}", pixels, content, label, (original.shape[1], original.shape[0]), path
        )
    parts = [writer.write(config.url, task.index) for writer in writers.values() if writer.rows]
    rows = pa.Table.from_pylist([row for part in parts for row in part.rows], schema=manifests.SAMPLES_SCHEMA)
    note = {
        "shards": [part.shard for part in parts],
        "statistics": {part.shard["split"]: part.statistics for part in parts},
        "rejected": rejected,
    }
    storage.write_bytes(
        part_url(building, task.index),
        manifests.parquet_bytes(rows.replace_schema_metadata({b"part": json.dumps(note).encode()})),
    )
    return SliceDone(task.index, rows.num_rows, len(rejected), sum(part.shard["size"] for part in parts))


def part_url(building: str, index: int) -> str:
    """Where a slice's part record lies."""
    return storage.join(building, f"{index:05d}.parquet")


def finished(work: Plan) -> dict[int, SliceDone]:
    """The slices whose part records and tars stand already."""
    done: dict[int, SliceDone] = {}
    shards = {
        f"shards/{entry.path}": entry.size for entry in storage.list_files(storage.join(work.config.url, "shards"))
    }
    for entry in storage.list_files(work.building):
        if not re.fullmatch(r"[0-9]{5,}\.parquet", entry.path):
            continue
        table, note = _read_part(storage.join(work.building, entry.path))
        if all(shards.get(shard["url"]) == shard["size"] for shard in note["shards"]):
            index = int(entry.path.split(".")[0])
            done[index] = SliceDone(
                index, table.num_rows, len(note["rejected"]), sum(shard["size"] for shard in note["shards"])
            )
    return done


def commit(work: Plan) -> Manifest:
    """Joins all part records into the set's tables and writes the manifest, last.

    Raises:
        ValueError: not one readable image.
    """
    config = work.config
    shards: list[dict[str, Any]] = []
    rejected: list[tuple[str, str]] = []
    statistics: dict[str, list[NDArray[Any]]] = {split: [] for split in SPLITS}
    contents: list[bytes] = []
    with tempfile.TemporaryDirectory(prefix="raydiffusion-commit-") as folder:
        path = os.path.join(folder, "samples.parquet")
        with pq.ParquetWriter(path, manifests.SAMPLES_SCHEMA, compression="zstd") as writer:
            for index in range(work.slices):
                table, note = _read_part(part_url(work.building, index))
                if table.num_rows:
                    writer.write_table(table.replace_schema_metadata(None))
                shards += note["shards"]
                rejected += [(source, reason) for source, reason in note["rejected"]]
                contents += [row[:16] for row in table["content"].to_pylist()]
                for split, values in note["statistics"].items():
                    statistics[split].append(np.array(values, dtype=object))
        if not shards:
            reasons = "; ".join(f"{source}: {reason}" for source, reason in rejected[:3])
            raise ValueError(f"source {config.source}: none of {work.size} files is a readable image ({reasons})")
        shards.sort(key=lambda row: (SPLITS.index(row["split"]), int(row["url"].split("-")[1])))
        card = _card(
            work,
            shards,
            len(rejected),
            len(contents) - len(set(contents)),
            {split: np.sum(values, axis=0) for split, values in statistics.items() if values},
        )
        rejects = pa.Table.from_pylist(
            [{"source": source, "reason": reason} for source, reason in rejected], schema=manifests.REJECTS_SCHEMA
        )
        made = manifests.commit(
            config.url,
            config.image,
            work.class_names,
            pa.Table.from_pylist(shards, schema=manifests.SHARDS_SCHEMA),
            path,
            rejects,
            card,
            work.digest,
        )
    clean(work)
    return made


def standing(work: Plan) -> Manifest | None:
    """The finished set at the plan's URL, if there is one.

    Raises:
        ValueError: it was made from other images or by another policy.
    """
    if not storage.exists(storage.join(work.config.url, "manifest.json")):
        return None
    found = manifests.load(work.config.url)
    if found.plan == work.digest:
        return found
    changed = [
        f"{name}: {found.card['policy'].get(name)!r} there, {value!r} asked"
        for name, value in work.config.policy.items()
        if found.card["policy"].get(name) != value
    ]
    reason = (
        "; ".join(changed) or f"the source lists other files than it did ({work.size} now, {found.card['listed']} then)"
    )
    raise ValueError(f"{work.config.url} already holds another set, {found.digest[:12]} ({reason}); choose another url")


def shard_in_process(config: ShardConfig) -> Manifest:
    """The whole job without Ray, one slice after the other; goes on where it was cut off, keeps a finished set.

    Raises:
        ValueError, OSError: as `plan`, `make_slice`, `commit`, `standing`.
    """
    work = plan(config)
    try:
        done = standing(work)
        if done is not None:
            return done
        there = finished(work)
        for index in range(work.slices):
            if index not in there:
                make_slice(config, work.building, work.slice(index))
        return commit(work)
    finally:
        work.close()


def clean(work: Plan) -> None:
    """Drops the part records of a plan."""
    storage.delete_tree(work.building)


def damage(url: str, shard: str, size: int, sha256: str) -> str | None:
    """Reads one shard and says what is wrong with it, None where it is what the manifest says."""
    try:
        data = storage.read_bytes(storage.join(url, *shard.split("/")))
    except FileNotFoundError:
        return "missing"
    if len(data) != size:
        return f"{len(data)} bytes where the manifest says {size}"
    got = storage.digest(data)
    return None if got == sha256 else f"sha256 {got} where the manifest says {sha256}"


def slice_of(shard: str) -> int:
    """The slice that made a shard."""
    return int(shard.split("-")[1])


@dataclass(frozen=True)
class _Part:
    shard: dict[str, Any]
    rows: list[dict[str, Any]]
    statistics: list[list[int]]


class _ShardWriter:
    """One tar in memory, its table rows and its exact channel sums."""

    def __init__(self, split: str, config: ShardConfig, labelled: bool) -> None:
        self.split, self.config, self.labelled = split, config, labelled
        self.tar = bytearray()
        self.rows: list[dict[str, Any]] = []
        self.statistics = np.zeros((2, config.channels), dtype=np.int64)

    def add(
        self, key: str, pixels: images.UInt8s, content: bytes, label: int | None, original: tuple[int, int], source: str
    ) -> None:
        payload = images.encode_png(pixels) if self.config.encoding == "png" else encode_raw(pixels)
        self.tar += tar.header(key.encode() + tar.SUFFIX[self.config.encoding], len(payload))
        offset = len(self.tar)
        self.tar += tar.padded(payload)
        if self.labelled:
            text = b"%d" % (label or 0)
            self.tar += tar.header(key.encode() + b".cls", len(text)) + tar.padded(text)
        flat = pixels.reshape(-1, pixels.shape[2]).astype(np.int64)
        self.statistics += np.stack([flat.sum(axis=0), (flat * flat).sum(axis=0)])
        sha256 = hashlib.sha256(payload).digest()
        width, height = original
        self.rows.append(
            {
                "key": key,
                "offset": offset,
                "size": len(payload),
                "sha256": sha256,
                "content": content,
                "label": label,
                "width": width,
                "height": height,
                "source": source,
            }
        )

    def write(self, url: str, index: int) -> _Part:
        data = bytes(self.tar + tar.END)
        sha256 = storage.digest(data)
        name = f"shards/{self.split}-{index:05d}-{sha256[:12]}.tar"
        storage.write_bytes(storage.join(url, *name.split("/")), data)
        counts = sorted(Counter(row["label"] for row in self.rows).items()) if self.labelled else []
        shard = {
            "url": name,
            "split": self.split,
            "size": len(data),
            "sha256": sha256,
            "samples": len(self.rows),
            "classes": [label for label, _ in counts],
            "class_counts": [count for _, count in counts],
        }
        return _Part(shard, [row | {"shard": name} for row in self.rows], self.statistics.tolist())


def encode_raw(pixels: images.UInt8s) -> bytes:
    """(H, W, C) -> a .npy file of (C, H, W) uint8, which readers copy as it lies."""
    sink = io.BytesIO()
    np.lib.format.write_array(sink, np.ascontiguousarray(pixels.transpose(2, 0, 1)), version=(1, 0), allow_pickle=False)
    return sink.getvalue()


class _Column:
    """A growing column of int64, 8 bytes an entry."""

    def __init__(self) -> None:
        self.values = np.empty(1024, dtype=np.int64)
        self.used = 0

    def __len__(self) -> int:
        return self.used

    def append(self, value: int) -> None:
        if self.used == len(self.values):
            self.values = np.concatenate([self.values, np.empty(len(self.values), dtype=np.int64)])
        self.values[self.used] = value
        self.used += 1

    def array(self) -> NDArray[np.int64]:
        return self.values[: self.used]


def _source_bytes(config: ShardConfig, limits: images.Limits, path: str, size: int) -> tuple[str, bytes | ValueError]:
    """One source image's bytes, or why it cannot be read."""
    if size > limits.bytes:
        return path, ValueError(f"{size} bytes, more than the limit of {limits.bytes}")
    try:
        return path, storage.read_bytes(f"{config.source.rstrip('/')}/{path}", 0, limits.bytes + 1)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        return path, ValueError(f"cannot be read: {error.strerror or error}")
    except ValueError as error:  # a key that is no URL
        return path, error


def _ahead(call: Callable[[T], R], jobs: list[T], workers: int) -> Iterator[R]:
    """call(job) for each job in order, `workers` of them under way in threads; 0: one after the other."""
    if workers == 0:
        yield from map(call, jobs)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[R]] = deque()
        for job in jobs:
            waiting.append(pool.submit(call, job))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _read_part(url: str) -> tuple[manifests.Table, dict[str, Any]]:
    table = pq.read_table(pa.BufferReader(storage.read_bytes(url)))
    return table, json.loads((table.schema.metadata or {})[b"part"])


def _card(
    work: Plan, shards: list[dict[str, Any]], rejected: int, duplicates: int, statistics: dict[str, NDArray[Any]]
) -> dict[str, Any]:
    counts = {split: sum(row["samples"] for row in shards if row["split"] == split) for split in SPLITS}
    per_class = {name: dict.fromkeys(SPLITS, 0) for name in work.class_names}
    for row in shards:
        for label, count in zip(row["classes"], row["class_counts"], strict=True):
            per_class[work.class_names[label]][row["split"]] += count
    split = TRAIN if counts[TRAIN] else HELD_OUT
    pixels = counts[split] * work.config.image_size**2
    sums, squares = (np.array([int(value) for value in row], dtype=np.float64) for row in statistics[split])
    mean = sums / pixels
    return {
        "samples": counts,
        "shards": {split: sum(row["split"] == split for row in shards) for split in SPLITS},
        "bytes": sum(row["size"] for row in shards),
        "classes": list(work.class_names),
        "per_class": per_class,
        "channel_mean": mean.tolist(),
        "channel_std": np.sqrt(np.maximum(squares / pixels - mean**2, 0.0)).tolist(),
        "channel_statistics_of": f"{split}, in grey levels 0..255",
        "listed": work.size,
        "rejected": rejected,
        "exact_duplicates": duplicates,
        "image": asdict(work.config.image),
        "source": work.config.source,
        "policy": work.config.policy,
    }
