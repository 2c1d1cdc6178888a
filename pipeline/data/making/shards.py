"""From a source of images to a set of shards: plan, make the slices, commit. No Ray here; `cluster/shard_tasks.py`
runs `slices.make_slice` as tasks.

The plan lists the source once and cuts what is new in it into slices. Where a set stands already, its shards stay as
they are, and what was added to the source since becomes the next version of its manifest. A killed job goes on where
it was and ends in the same bytes.
"""

import hashlib
import json
import os
import re
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage
from pipeline.data.config import ShardConfig
from pipeline.data.formats import tar
from pipeline.data.making.card import make_card
from pipeline.data.making.slices import MOST_TAGS, Slice, SliceDone, make_slice, part_url, read_part
from pipeline.data.making.sources.base import Unit, shown
from pipeline.data.making.sources.kinds import open_source
from pipeline.data.sets import manifest as manifests
from pipeline.data.sets import removals, versions
from pipeline.data.sets.manifest import SPLITS, Manifest, Names
from pipeline.data.sets.tables import (
    REJECTS_SCHEMA,
    REMOVED_SCHEMA,
    SAMPLES_SCHEMA,
    SHARDS_SCHEMA,
    Table,
    sample_batches,
)
from pipeline.storage.lease import hold

DUPLICATE = "an exact duplicate"


@dataclass
class Plan:
    """What is new in the source, cut into slices; the listing itself lies in a temporary file, 24 bytes a unit are in
    memory. Close it.

    Attributes:
        digest: of the policy and the whole listing.
        before: the newest version of the set at `config.url`, if there is one.
        size: new units.
        order: (size,) which entry of the listing comes when.
        cuts: (slices + 1,) where in `order` each slice begins.
        listed: entries of the listing, known ones too.
    """

    config: ShardConfig
    digest: str
    before: Manifest | None
    extras: tuple[str, ...]
    classes: tuple[str, ...]
    order: NDArray[np.int64]
    cuts: NDArray[np.int64]
    offsets: NDArray[np.int64]
    spool: Any = field(repr=False)

    @property
    def listed(self) -> int:
        """Entries of the listing, known ones too."""
        return len(self.offsets) - 1

    @property
    def indices(self) -> range:
        """The numbers of the new slices, after those of all versions before."""
        first = self.before.slices if self.before else 0
        return range(first, first + len(self.cuts) - 1)

    @property
    def building(self) -> str:
        """Where part records lie until the version is committed."""
        return storage.join(self.config.url, f"building-{self.digest[:12]}")

    def slice(self, index: int) -> Slice:
        """A slice by its number."""
        place = index - self.indices.start
        chosen = self.order[int(self.cuts[place]) : int(self.cuts[place + 1])].tolist()
        units = tuple(self._unit(entry) for entry in chosen)
        return Slice(index, units, self.extras, {name: i for i, name in enumerate(self.classes)})

    def close(self) -> None:
        """Drops the listing."""
        self.spool.close()

    def _unit(self, entry: int) -> Unit:
        start, stop = int(self.offsets[entry]), int(self.offsets[entry + 1])
        return Unit(*json.loads(os.pread(self.spool.fileno(), stop - start, start)))


def plan(config: ShardConfig) -> Plan:
    """Lists the source once.

    Raises:
        ValueError: nothing there; labels that are not as asked; a set at `config.url` made by another policy.
    """
    before = _standing(config)
    source = open_source(config)
    spool = tempfile.TemporaryFile(prefix="raydiffusion-listing-")  # noqa: SIM115 - the plan closes it
    try:
        total = hashlib.sha256(json.dumps(config.policy, sort_keys=True).encode())
        offsets, hashes, weights, at = array("q"), array("Q"), array("q"), 0
        for unit in source.units():
            line = json.dumps([unit.path, unit.size, unit.group, unit.weight]).encode()
            total.update(line)
            spool.write(line)
            offsets.append(at)
            hashes.append(_hash(shown(unit.path)))
            if not source.mixed:
                weights.append(unit.weight)
            at += len(line)
        spool.flush()
        offsets.append(at)
        if not hashes:
            raise ValueError(f"source {config.source} is empty: no files in it")
        labels = source.labels()
        hashed = np.frombuffer(hashes, dtype=np.uint64)
        new: NDArray[np.int64] | None = None  # all of it
        extras, classes = labels.extras, tuple(sorted(labels.classes))
        if before is not None:
            known = before.plan == total.hexdigest() or np.isin(hashed, _known(before, source.mixed))
            new = np.flatnonzero(~np.broadcast_to(known, hashed.shape))
            extras = before.extras
            classes = before.names.classes + tuple(sorted(labels.classes - set(before.names.classes)))
        if source.mixed:
            order = _mixed(hashed, new)
            cuts = np.append(np.arange(0, len(order), source.slice_weight), len(order))
        else:
            order = np.arange(len(hashed)) if new is None else new
            cuts = _cut(np.frombuffer(weights, np.int64)[order], source.slice_weight)
        return Plan(
            config, total.hexdigest(), before, extras, classes, order, cuts, np.frombuffer(offsets, np.int64), spool
        )
    except BaseException:
        spool.close()
        raise


def _standing(config: ShardConfig) -> Manifest | None:
    """The set at `config.url`, if there is one.

    Raises:
        ValueError: it was made by another policy.
    """
    if not storage.exists(storage.join(config.url, "manifest.json")):
        return None
    found = manifests.load(config.url)
    if found.mixture:
        raise ValueError(f"{config.url} holds a mixture; choose another url for a set of its own")
    there = found.card["policy"]
    asked = config.policy
    changed = [
        f"{name}: {there.get(name)!r} there, {asked.get(name)!r} asked"
        for name in sorted(asked.keys() | there.keys())
        if there.get(name) != asked.get(name)
    ]
    if changed:
        raise ValueError(
            f"{config.url} already holds another set, {found.digest[:12]} ({'; '.join(changed)}); choose another url"
        )
    return found


def _hash(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "little")


def _known(before: Manifest, images: bool) -> NDArray[np.uint64]:
    """Hashes of the paths that earlier versions read; a tar's or table's images are PATH#NAME."""
    found = array("Q")
    for tables in (before.sample_tables, before.reject_tables):
        for rows in sample_batches(before.url, tables, ["source"]):
            names = rows["source"].to_pylist()
            found.extend(_hash(name) for name in (names if images else {name.partition("#")[0] for name in names}))
    return np.frombuffer(found, dtype=np.uint64)


def _mixed(hashed: NDArray[np.uint64], new: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """The new entries (None: all) in the order of their hashes. The hash gives its low bits to the entry's number and
    is sorted in place, where all are new in the memory of `hashed` itself: a quarter of what an argsort takes.
    """
    mask = np.uint64((1 << max(1, len(hashed)).bit_length()) - 1)
    keys = hashed if new is None else hashed[new]
    keys &= ~mask
    for first in range(0, len(keys), 1 << 20):
        stop = min(first + (1 << 20), len(keys))
        numbers = np.arange(first, stop) if new is None else new[first:stop]
        keys[first:stop] |= numbers.astype(np.uint64)
    keys.sort()
    keys &= mask
    return keys.view(np.int64)


def _cut(weights: NDArray[np.int64], least: int) -> NDArray[np.int64]:
    """Where slices begin, each the shortest run of at least `least` in weight; and the end."""
    cuts, total = [0], np.cumsum(weights)
    while cuts[-1] < len(weights):
        done = int(total[cuts[-1] - 1]) if cuts[-1] else 0
        cuts.append(min(len(weights), int(np.searchsorted(total, done + least, side="left")) + 1))
    return np.array(cuts, dtype=np.int64)


def finished(work: Plan) -> dict[int, SliceDone]:
    """The slices whose part records and tars stand already."""
    done: dict[int, SliceDone] = {}
    shards = {
        f"shards/{entry.path}": entry.size for entry in storage.list_files(storage.join(work.config.url, "shards"))
    }
    for entry in storage.list_files(work.building):
        if not re.fullmatch(r"[0-9]{5,}\.parquet", entry.path):
            continue
        index = int(entry.path.split(".")[0])
        part = read_part(storage.join(work.building, entry.path))
        if index in work.indices and all(shards.get(shard["url"]) == shard["size"] for shard in part.shards):
            done[index] = SliceDone(
                index, part.rows.num_rows, part.rejected, sum(shard["size"] for shard in part.shards)
            )
    return done


def commit(work: Plan, may_write: Callable[[], None]) -> Manifest:
    """Joins all part records into the set's next version, the manifest last. Gives back the version that stands where
    nothing is new. may_write: see `versions.commit`.

    Raises:
        ValueError: not one readable image; a removal list that cannot be read.
    """
    config, before = work.config, work.before
    if before is not None and not work.indices and not config.removals:
        return before
    shards: list[dict[str, Any]] = before.shards.to_pylist() if before else []
    rejects: list[tuple[str, str]] = []
    counts, tags = (0, 0, 0), set[str]()  # rejected, sides, others
    sums: dict[str, list[Any]] = {split: [] for split in SPLITS}
    with tempfile.TemporaryDirectory(prefix="raydiffusion-commit-") as folder:
        path = os.path.join(folder, "samples.parquet")
        with pq.ParquetWriter(path, SAMPLES_SCHEMA, compression="zstd") as writer:
            for index in work.indices:
                part = read_part(part_url(work.building, index))
                if part.rows.num_rows:
                    writer.write_table(part.rows)
                    tags.update(tag for listed in part.rows["tags"].to_pylist() for tag in listed or ())
                shards += part.shards
                rejects += part.rejects
                counts = (counts[0] + part.rejected, counts[1] + part.sides, counts[2] + part.others)
                for split, values in part.sums.items():
                    sums[split].append(np.array(values, dtype=object))
        if not shards:
            reasons = "; ".join(f"{source}: {reason}" for source, reason in rejects[:3])
            raise ValueError(f"source {config.source}: none of {work.listed} files is a readable image ({reasons})")
        names = _names(work, shards, tags)
        copies, gone = _removed(config, before, path)
        if before is not None and not work.indices and gone.num_rows == before.removed.num_rows:
            return before
        shards.sort(key=lambda row: (SPLITS.index(row["split"]), int(row["url"].split("-")[1])))
        card = make_card(config, before, names, shards, gone, (work.listed, *counts, copies), sums)
        made = versions.commit(
            config.url,
            versions.Version(
                config.spec,
                work.extras,
                names,
                pa.Table.from_pylist(shards, schema=SHARDS_SCHEMA),
                gone,
                card,
                work.digest,
                work.indices.stop,
                path if work.indices else None,
                pa.Table.from_pylist(
                    [{"source": source, "reason": reason} for source, reason in rejects],
                    schema=REJECTS_SCHEMA,
                ),
                before,
            ),
            may_write,
        )
    clean(work)
    return made


def _names(work: Plan, shards: list[dict[str, Any]], tags: set[str]) -> Names:
    """What classes and tags are called: old names keep their numbers."""
    classes = work.classes
    if tar.CLASS in work.extras:
        most = max((label for row in shards for label in row["classes"]), default=-1)
        if most >= 1 << 20:
            raise ValueError(f"source {work.config.source}: class {most}; classes are numbers below {1 << 20}")
        classes += tuple(str(number) for number in range(len(classes), most + 1))
    old = work.before.names.tags if work.before else ()
    all_tags = old + tuple(sorted(tags - set(old)))
    if len(all_tags) > MOST_TAGS:
        raise ValueError(f"source {work.config.source}: {len(all_tags)} different tags; at most {MOST_TAGS}")
    return Names(classes, all_tags)


def _removed(config: ShardConfig, before: Manifest | None, path: str) -> tuple[int, Table]:
    """How many images are exact copies of an earlier one, and the table of what readers leave out: what was so before,
    the copies where they are dropped, and what the removal list names.
    """
    tables = before.sample_tables if before else ()
    url = before.url if before else config.url
    digests = removals.read_list(config.removals) if config.removals else set[bytes]()
    contents: list[NDArray[np.uint64]] = []
    shards: list[str] = []
    first: list[int] = []  # of each shard, the number of its first row over all tables
    named: dict[tuple[str, int], str] = {}
    total = 0
    for rows in (*sample_batches(url, tables, list(_LOOKED_UP)), *_local_batches(path)):
        for number, shard in enumerate(rows["shard"].to_pylist()):
            if not shards or shards[-1] != shard:
                shards.append(shard)
                first.append(total + number)
        for name in removals.COLUMNS if digests else ():
            for number, digest in enumerate(rows[name].to_pylist()):
                if digest in digests:
                    place = int(np.searchsorted(first, total + number, side="right")) - 1
                    named[shards[place], total + number - first[place]] = f"removal list: {digest.hex()}"
        data = b"".join(content[:16] for content in rows["content"].to_pylist())
        contents.append(np.frombuffer(data, dtype=np.uint64).reshape(-1, 2))
        total += rows.num_rows
    copies = _copies(np.concatenate(contents)) if contents else np.empty(0, np.int64)
    gone = dict[tuple[str, int], str]()
    if before is not None:
        old = (before.removed[name].to_pylist() for name in ("shard", "index", "reason"))
        gone |= {(shard, index): reason for shard, index, reason in zip(*old, strict=True)}
    if config.duplicates == "drop":
        places = np.searchsorted(first, copies, side="right") - 1
        for place, row in zip(places.tolist(), copies.tolist(), strict=True):
            gone.setdefault((shards[place], row - first[place]), DUPLICATE)
    gone |= named
    listed = [{"shard": shard, "index": index, "reason": reason} for (shard, index), reason in sorted(gone.items())]
    return len(copies), pa.Table.from_pylist(listed, schema=REMOVED_SCHEMA)


_LOOKED_UP = ("shard", *removals.COLUMNS)


def _local_batches(path: str) -> list[Table]:
    with pq.ParquetFile(path) as file:
        return [file.read_row_group(group, columns=list(_LOOKED_UP)) for group in range(file.num_row_groups)]


def _copies(contents: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The rows (in order) whose 128 bits an earlier row has."""
    order = np.lexsort((contents[:, 1], contents[:, 0]))  # stable: of equals the first row comes first
    sorted_ = contents[order]
    again = np.flatnonzero((sorted_[1:] == sorted_[:-1]).all(axis=1)) + 1
    return np.sort(order[again])


def shard_in_process(config: ShardConfig) -> Manifest:
    """The whole job without Ray, one slice after the other; goes on where it was cut off, extends a finished set.

    Raises:
        ValueError, OSError: as `plan`, `make_slice`, `commit`, `versions.mix`; lease.Held: another job is at it.
    """
    with hold(config.url, "a shard job") as lease:
        return _shard_in_process(config, lease.claim.check)


def _shard_in_process(config: ShardConfig, may_write: Callable[[], None]) -> Manifest:
    if config.mixture:
        return versions.mix(config.url, config.mixture, may_write)
    work = plan(config)
    try:
        there = finished(work)
        for index in work.indices:
            if index not in there:
                make_slice(config, work.building, work.slice(index))
        return commit(work, may_write)
    finally:
        work.close()


def made_again(work: Plan, indices: Iterable[int]) -> Iterator[Slice]:
    """The tasks that made some slices of the standing set, from its samples' rows.

    Raises:
        OSError: the tables cannot be read.
    """
    standing = work.before
    if standing is None:
        return
    numbers: dict[int, dict[str, list[int]]] = {index: {} for index in indices}
    for rows in sample_batches(standing.url, standing.sample_tables, ["key", "source"]):
        for key, source in zip(rows["key"].to_pylist(), rows["source"].to_pylist(), strict=True):
            index, number = (int(part) for part in key.split("-"))
            if index in numbers:
                numbers[index].setdefault(source, []).append(number)
    source = open_source(work.config)
    classes = {name: i for i, name in enumerate(standing.names.classes)}
    for index, wanted in numbers.items():
        if source.mixed:
            units = [Unit(path, 0, 0, 1) for path in sorted(wanted, key=wanted.__getitem__)]
        else:
            files = {name.partition("#")[0] for name in wanted}
            units = [unit for unit in source.units() if shown(unit.path) in files]
        yield Slice(index, tuple(units), standing.extras, classes, wanted)


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
