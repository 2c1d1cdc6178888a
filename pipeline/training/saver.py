"""Saving in the background: the training pays for one copy of its state."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline import storage
from pipeline.storage.lease import Lost
from pipeline.training.checkpoint import State, Tensors, folder, write
from pipeline.training.retention import Keep, prune


@dataclass(frozen=True)
class SaveOutcome:
    """How a save ended: committed or not, and what went wrong (with it, or where it was, with removing older ones).

    wait_s: what the caller spent on it; write_s: what the background did. lost: the store is another job's by now.
    """

    step: int
    url: str
    committed: bool
    wait_s: float
    write_s: float
    failure: str | None = None
    lost: bool = False


class Saver:
    """Saves in a thread of its own: the caller pays for one copy into buffers that are kept.

    It waits where the save before is still being written. may_write: see `checkpoint.write`.
    """

    def __init__(self, store: str, keep: Keep, may_write: Callable[[], None] = lambda: None) -> None:
        self.store, self.keep, self.may_write = store, keep, may_write
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._buffers: dict[str, dict[str, Tensor]] = {}
        self._pending: Future[SaveOutcome] | None = None
        self._done: list[SaveOutcome] = []

    def save(self, state: State) -> None:
        """Starts a save; waits first for the one before."""
        start = time.perf_counter()
        self.wait()
        held = State(state.step, self.reserve(state.tensors), state.facts)
        wait_s = time.perf_counter() - start
        self._pending = self._pool.submit(self._write, held, wait_s)

    def outcomes(self, wait: bool = False) -> list[SaveOutcome]:
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
    def reserve(self, tensors: Tensors) -> Tensors:
        """The tensors copied into buffers of the host. These are made at the first call: made early, no save waits for
        them.
        """
        on_device = False
        for stem, group in tensors.items():
            buffers = self._buffers.setdefault(stem, {})
            for name, tensor in group.items():
                buffer = buffers.get(name)
                if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                    buffers[name] = buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
                buffer.copy_(tensor, non_blocking=True)
                on_device |= tensor.is_cuda
        if on_device:
            torch.cuda.synchronize()
        return {stem: {name: self._buffers[stem][name] for name in group} for stem, group in tensors.items()}

    def _write(self, state: State, wait_s: float) -> SaveOutcome:
        start = time.perf_counter()
        url, committed, failure, lost = folder(self.store, state.step), False, None, False
        try:
            write(self.store, state, self.may_write)
            committed = True
            prune(self.store, self.keep)
        except Lost as error:  # what is there is no longer ours to clear
            failure, lost = str(error), True
        except (OSError, ValueError, MemoryError) as error:  # a full disk, an unreachable store: the run says so
            failure = f"{type(error).__name__}: {error}"
            if not committed:
                self._clear(url)
        return SaveOutcome(state.step, url, committed, wait_s, time.perf_counter() - start, failure, lost)

    def _clear(self, url: str) -> None:
        """Gives back the room that a failed save took; where that fails too, the next pruning does it. What another job
        wrote while the save was failing is not touched.
        """
        with suppress(OSError, Lost):
            self.may_write()
            storage.delete_tree(url)
