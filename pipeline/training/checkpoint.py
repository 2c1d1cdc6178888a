"""Checkpoints: verifiable data, committed by writing their record last, on a local path or S3.

    STORE/step-000000200/model.safetensors       weights of the denoiser, buffers included
    STORE/step-000000200/ema.safetensors         their exponential moving average
    STORE/step-000000200/optimizer.safetensors   AdamW's means and squares
    STORE/step-000000200/state.json              step, identity of the run, guards with memory
    STORE/step-000000200/commit.json             written last: sha256 and size of each of the others, and its own

A checkpoint without its commit record does not exist. Files are verified when they are read, and before an older
checkpoint is removed for a newer one, so the newest one that can be read is never lost.
"""

import json
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pipeline.data import storage

VERSION = 1
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


class Damaged(ValueError):
    """A committed checkpoint whose files are not what was committed."""


def folder(store: str, step: int) -> str:
    """The URL of a step's checkpoint."""
    return storage.join(store, f"step-{step:09d}")


def write(store: str, state: State) -> str:
    """Writes and commits a checkpoint; returns its URL. One of the same step that is there loses its record first."""
    url = folder(store, state.step)
    storage.delete(storage.join(url, COMMIT))
    files: dict[str, dict[str, Any]] = {}

    def put(name: str, data: bytes) -> None:
        storage.write_bytes(storage.join(url, name), data)
        files[name] = {"sha256": storage.digest(data), "bytes": len(data)}

    for stem, tensors in state.tensors.items():
        put(f"{stem}.safetensors", safetensors.torch.save(dict(tensors)))
    put(STATE, _json({"step": state.step, "facts": dict(state.facts)}))
    record = {"version": VERSION, "step": state.step, "files": files}
    storage.write_bytes(storage.join(url, COMMIT), _json({**record, "sha256": storage.digest(_json(record))}))
    return url


def read(store: str, step: int) -> State:
    """The checkpoint of a step, every file verified.

    Raises:
        Damaged: a file is missing or not the one that was committed, or the record is of an unknown version.
        FileNotFoundError: there is no committed checkpoint of that step.
    """
    url = folder(store, step)
    tensors: dict[str, dict[str, Tensor]] = {}
    facts: dict[str, Any] = {}
    for name, data in _verified(url, step):
        if name.endswith(".safetensors"):
            tensors[name.removesuffix(".safetensors")] = safetensors.torch.load(data)
        else:
            facts = json.loads(data)["facts"]
    return State(step, tensors, facts)


def verify(store: str, step: int) -> None:
    """Reads a checkpoint and checks every digest; raises as `read`."""
    for _ in _verified(folder(store, step), step):
        pass


def committed(store: str) -> list[int]:
    """Steps of the committed checkpoints, newest first, not verified."""
    return sorted((step for step, names in _folders(store).items() if COMMIT in names), reverse=True)


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


def prune(store: str, keep: int) -> None:
    """Removes all but the newest `keep` committed checkpoints, and what cut-off saves left behind.

    Nothing is removed unless the newest one verifies; commit records go first, so nothing half removed looks whole.
    """
    folders = _folders(store)
    steps = sorted((step for step, names in folders.items() if COMMIT in names), reverse=True)
    if not steps:
        return
    kept = set(steps[:keep])
    doomed = [step for step in folders if step not in kept and step < steps[0]]
    if not doomed:
        return
    verify(store, steps[0])
    for step in sorted(doomed):
        url = folder(store, step)
        storage.delete(storage.join(url, COMMIT))
        storage.delete_tree(url)


def _folders(store: str) -> dict[int, set[str]]:
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


def _record(url: str, step: int) -> dict[str, dict[str, Any]]:
    """The files that a commit record names: name -> sha256, bytes."""
    data = storage.read_bytes(storage.join(url, COMMIT))
    try:
        record = json.loads(data)
        if record["version"] != VERSION:
            raise Damaged(f"{url} has checkpoint version {record['version']}; this code reads {VERSION}")
        if record.pop("sha256") != storage.digest(_json(record)) or record["step"] != step:
            raise ValueError("its content is not what was written")
        return record["files"]
    except Damaged:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"{url}/{COMMIT} is damaged: {error}") from None


def _verified(url: str, step: int) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every file, its digest checked, one at a time."""
    for name, facts in _record(url, step).items():
        try:
            data = storage.read_bytes(storage.join(url, name))
        except FileNotFoundError:
            raise Damaged(f"{url}/{name} is missing") from None
        if storage.digest(data) != facts["sha256"]:
            raise Damaged(f"{url}/{name} is damaged: {len(data)} bytes of {facts['bytes']}, and another sha256")
        yield name, data


@dataclass(frozen=True)
class Outcome:
    """How a save ended: `failure` is None if it was committed.

    wait_s: what the caller spent on it; write_s: what the background did.
    """

    step: int
    url: str
    wait_s: float
    write_s: float
    failure: str | None = None


class Saver:
    """Saves in a thread of its own: the caller pays for one copy into buffers that are kept.

    It waits where the save before is still being written.
    """

    def __init__(self, store: str, keep: int) -> None:
        self.store, self.keep = store, keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._buffers: dict[str, dict[str, Tensor]] = {}
        self._pending: Future[Outcome] | None = None
        self._done: list[Outcome] = []

    def save(self, state: State) -> None:
        """Starts a save; waits first for the one before."""
        start = time.perf_counter()
        self.wait()
        held = State(state.step, self._copied(state.tensors), state.facts)
        wait_s = time.perf_counter() - start
        self._pending = self._pool.submit(self._write, held, wait_s)

    def outcomes(self, wait: bool = False) -> list[Outcome]:
        """The saves that ended since the last call; with `wait` all that were started."""
        if wait or (self._pending is not None and self._pending.done()):
            self.wait()
        done, self._done = self._done, []
        return done

    def wait(self) -> None:
        """Until nothing is under way."""
        if self._pending is not None:
            self._done.append(self._pending.result())
            self._pending = None

    def close(self) -> None:
        """Lets a save under way end."""
        self.wait()
        self._pool.shutdown()

    @torch.no_grad()
    def _copied(self, tensors: Tensors) -> dict[str, dict[str, Tensor]]:
        on_device = False
        for stem, group in tensors.items():
            buffers = self._buffers.setdefault(stem, {})
            for name, tensor in group.items():
                buffer = buffers.get(name)
                if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                    buffers[name] = buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                buffer.copy_(tensor, non_blocking=True)
                on_device |= tensor.is_cuda
        if on_device:
            torch.cuda.synchronize()
        return {stem: {name: self._buffers[stem][name] for name in group} for stem, group in tensors.items()}

    def _write(self, state: State, wait_s: float) -> Outcome:
        start = time.perf_counter()
        url, failure = folder(self.store, state.step), None
        try:
            write(self.store, state)
            prune(self.store, self.keep)
        except (OSError, ValueError) as error:  # a full disk, an unreachable store: the run goes on and says so
            failure = f"{type(error).__name__}: {error}"
        return Outcome(state.step, url, wait_s, time.perf_counter() - start, failure)
