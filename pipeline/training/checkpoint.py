"""Checkpoints: verifiable data, committed by writing their record last, on a local path or S3.

    STORE/step-000000200/model.safetensors       weights of the denoiser, buffers included
    STORE/step-000000200/ema.safetensors         their exponential moving average
    STORE/step-000000200/optimizer.safetensors   AdamW's means and squares
    STORE/step-000000200/state.json              step, identity of the run, guards with memory
    STORE/step-000000200/commit.json             written last: sha256 and size of each of the others, and its own

A checkpoint without its commit record does not exist, and files are verified whenever they are read. On a local path
every file, and every folder that got or lost a name, is on the disk before the record is.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
from torch import Tensor

from pipeline import storage
from pipeline.storage.lease import Lost

VERSION = 2
COMMIT = "commit.json"
STATE = "state.json"

_FOLDER = re.compile(r"step-(\d{9,})")

Tensors = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class State:
    """What a training is after `step` global batches.

    tensors: file stem (model, ema, optimizer, objective) -> name -> tensor; facts: JSON.
    """

    step: int
    tensors: Tensors
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """What a commit record says. images: seen at its step; bits_per_dim: held-out, where it was measured at that step;
    both None in records of version 1. files: name -> sha256, bytes.
    """

    version: int
    step: int
    files: Mapping[str, Mapping[str, Any]]
    images: int | None = None
    bits_per_dim: float | None = None


class Damaged(ValueError):
    """A committed checkpoint whose files are not what was committed."""


def folder(store: str, step: int) -> str:
    """The URL of a step's checkpoint."""
    return storage.join(store, f"step-{step:09d}")


def write(store: str, state: State, may_write: Callable[[], None] = lambda: None) -> str:
    """Writes and commits a checkpoint; returns its URL. One of the same step that is there loses its record first.

    may_write: raises where the store is another job's by now; asked before anything is touched, before each file and,
    last of all, before the record, which is only written where there is none: whoever slept meanwhile takes no one
    else's away.

    Raises:
        Lost: another writer has committed this step meanwhile. What `may_write` raises.
    """
    may_write()
    url = folder(store, state.step)
    _make_folder(url)
    remove_record(url)
    files: dict[str, dict[str, Any]] = {}

    def put(name: str, data: bytes) -> None:
        may_write()
        storage.write_bytes(storage.join(url, name), data)
        files[name] = {"sha256": storage.digest(data), "bytes": len(data)}

    for stem, tensors in state.tensors.items():
        put(f"{stem}.safetensors", safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()}))
    put(STATE, _json({"step": state.step, "facts": dict(state.facts)}))
    marks = {name: state.facts.get(name) for name in ("images", "bits_per_dim")}
    record = {"version": VERSION, "step": state.step, "files": files, **marks}
    may_write()
    if not storage.create_bytes(storage.join(url, COMMIT), _json({**record, "sha256": storage.digest(_json(record))})):
        raise Lost(f"{url} was committed by another job meanwhile; this one writes nothing more there")
    return url


def read(store: str, step: int) -> State:
    """The checkpoint of a step, every file verified.

    Raises:
        Damaged: a file is missing or not the one that was committed, or the record is of an unknown version.
        FileNotFoundError: there is no committed checkpoint of that step.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    facts: dict[str, Any] = {}
    found = record(store, step)
    for name, data in _verified(folder(store, step), found):
        if name.endswith(".safetensors"):
            tensors[name.removesuffix(".safetensors")] = safetensors.torch.load(data)
        else:
            facts = json.loads(data)["facts"]
    for version in range(found.version, VERSION):
        facts = MIGRATIONS[version](facts)
    return State(step, tensors, facts)


def verify(store: str, step: int) -> None:
    """Reads a checkpoint and checks every digest; raises as `read`."""
    for _ in _verified(folder(store, step), record(store, step)):
        pass


def committed(store: str) -> list[int]:
    """Steps of the committed checkpoints, newest first, not verified."""
    return sorted((step for step, names in folders(store).items() if COMMIT in names), reverse=True)


def newest(store: str, below: int | None = None) -> tuple[State | None, list[str]]:
    """The newest checkpoint that verifies (of a step < `below`), and of each newer one a line saying why not."""
    rejected: list[str] = []
    for step in committed(store):
        if below is not None and step >= below:
            continue
        try:
            return read(store, step), rejected
        except (Damaged, FileNotFoundError) as error:
            rejected.append(str(error))
    return None, rejected


def folders(store: str) -> dict[int, set[str]]:
    """step -> names of the files in its folder."""
    found: dict[int, set[str]] = {}
    for entry in storage.list_files(store):
        name, _, file = entry.path.partition("/")
        match = _FOLDER.fullmatch(name)
        if match and file:
            found.setdefault(int(match.group(1)), set()).add(file)
    return found


def _json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, indent=1, sort_keys=True).encode()


def record(store: str, step: int) -> Record:
    """The commit record of a step's checkpoint; raises as `read`."""
    url = folder(store, step)
    data = storage.read_bytes(storage.join(url, COMMIT))
    try:
        values = json.loads(data)
        if not 1 <= values["version"] <= VERSION:
            raise Damaged(f"{url} has checkpoint version {values['version']}; this code reads 1 to {VERSION}")
        if values.pop("sha256") != storage.digest(_json(values)) or values["step"] != step:
            raise ValueError("its content is not what was written")
        return Record(**values)
    except Damaged:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"{url}/{COMMIT} is damaged: {error}") from None


def remove_record(url: str) -> None:
    """Takes the commit record of a checkpoint away, and on a local path waits until it is gone from the disk."""
    storage.delete(storage.join(url, COMMIT))
    _sync(url)


def _make_folder(url: str) -> None:
    """On a local path, makes a checkpoint's folder so that it outlasts a power cut."""
    path = storage.local_path(url)
    if path is None:
        return
    path = path.absolute()
    missing = [part for part in path.parents if not part.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for part in (*reversed(missing), path):
        _sync(str(part.parent))


def _sync(url: str) -> None:
    path = storage.local_path(url)
    if path is not None and path.is_dir():
        storage.sync_folder(path)


def _verified(url: str, found: Record) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every file, its digest checked, one at a time."""
    for name, facts in found.files.items():
        try:
            data = storage.read_bytes(storage.join(url, name))
        except FileNotFoundError:
            raise Damaged(f"{url}/{name} is missing") from None
        if storage.digest(data) != facts["sha256"]:
            raise Damaged(f"{url}/{name} is damaged: {len(data)} bytes of {facts['bytes']}, and another sha256")
        yield name, data


def _from_1(facts: dict[str, Any]) -> dict[str, Any]:
    """Version 1 knew one end of a training, and no guard with memory."""
    ended = "budget" if facts.pop("finished") else None
    new = {"seconds": 0.0, "bits_per_dim": None, "rollbacks": 0, "skip_steps": [], "guard": {"losses": [], "norms": []}}
    return {**facts, **new, "ended": ended}


# version -> facts of that version -> those of the next
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}
