"""Writing a set's versions, and mixtures of sets; the layout is `manifest`'s."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline import storage
from pipeline.data.sets.manifest import SCHEMA, SPLITS, ImageSpec, Manifest, Names, content_digest, folder_of, load
from pipeline.data.sets.tables import REMOVED_SCHEMA, SHARDS_SCHEMA, Table, parquet_bytes


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


def commit(url: str, new: Version, may_write: Callable[[], None]) -> Manifest:
    """Writes the tables, then the version's manifest.json, then the set's. may_write: asked before these; raises where
    the set is another job's by now.
    """
    digest = content_digest(new.image, new.extras, new.names, new.shards, new.removed)
    before = new.before
    samples = list(before.sample_tables if before else ())
    rejects = list(before.reject_tables if before else ())
    if new.samples_path is not None:
        path = f"{folder_of(digest)}/samples.parquet"
        storage.write_file(storage.join(url, *path.split("/")), new.samples_path)
        samples.append((path, storage.digest_of(new.samples_path)))
        rejects.append(_write_table(url, digest, "rejects.parquet", parquet_bytes(new.rejects)))
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
            "tables": _write_tables(url, digest, new.shards, new.removed, new.card),
            "samples": samples,
            "rejects": rejects,
            "mixture": [],
        },
        may_write,
    )


def mix(url: str, weights: Mapping[str, float], may_write: Callable[[], None] = lambda: None) -> Manifest:
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
    card = {
        "samples": {split: sum(part.card["samples"][split] for _, part in parts) for split in SPLITS},
        "shards": {split: sum(part.card["shards"][split] for _, part in parts) for split in SPLITS},
        "rejected": 0,
        "mixture": [{"url": part.url, "digest": part.digest, "weight": weight} for weight, part in parts],
    }
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
            "tables": _write_tables(url, digest, shards, removed, card),
            "samples": [],
            "rejects": [],
            "mixture": mixture,
        },
        may_write,
    )


def _write_tables(url: str, digest: str, shards: Table, removed: Table, card: dict[str, Any]) -> dict[str, Any]:
    """The tables that every version has; path and sha256 of each."""
    written = {
        "shards.parquet": parquet_bytes(shards),
        "removed.parquet": parquet_bytes(removed),
        "card.json": _json_bytes(card),
    }
    made = {name: _write_table(url, digest, name, data) for name, data in written.items()}
    return {name: {"path": path, "sha256": sha256} for name, (path, sha256) in made.items()}


def _write_table(url: str, digest: str, name: str, data: bytes) -> tuple[str, str]:
    """Its path below the set's URL, and its sha256."""
    storage.write_bytes(storage.join(url, folder_of(digest), name), data)
    return f"{folder_of(digest)}/{name}", storage.digest(data)


def _write_root(url: str, root: dict[str, Any], may_write: Callable[[], None]) -> Manifest:
    data = _json_bytes(root)
    may_write()
    storage.write_bytes(storage.join(url, folder_of(root["digest"]), "manifest.json"), data)
    storage.write_bytes(storage.join(url, "manifest.json"), data)
    return load(url)


def _json_bytes(value: object) -> bytes:
    """Readable JSON in a fixed order of keys."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
