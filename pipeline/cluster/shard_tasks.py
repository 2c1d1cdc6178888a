"""Sharding on Ray: one task a slice of the source, the manifest last."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray

from pipeline.cluster.session import result
from pipeline.data.config import ShardConfig
from pipeline.data.making import shards
from pipeline.data.making.slices import Slice, SliceDone, make_slice
from pipeline.data.sets import versions
from pipeline.data.sets.manifest import Manifest
from pipeline.storage.lease import hold

TASKS_A_CPU = 2  # under way: one runs, one waits


@dataclass(frozen=True)
class ShardProgress:
    """How far the job is. `verified` counts shards of a finished set that were read again, of `to_verify`."""

    slices_done: int
    slices: int
    images: int
    rejected: int
    bytes: int
    verified: int
    to_verify: int
    seconds: float
    images_per_second: float
    seconds_left: float | None


def shard(config: ShardConfig, progress: Callable[[ShardProgress], None] | None = None) -> Manifest:
    """Makes the set, or goes on with it, or adds what the source has more as a new version; where there is nothing to
    add, verifies the set and makes its damaged shards again. Ray must be initialised.

    Raises:
        ValueError: an empty source, no readable image, a url that holds another set, or damaged shards whose sources
            changed under the same names.
        OSError: a store that does not answer. lease.Held: another job is at this set.
    """
    with hold(config.url, "jobs.shard") as lease:
        return _shard(config, progress, lease.claim.check)


def _shard(
    config: ShardConfig, progress: Callable[[ShardProgress], None] | None, may_write: Callable[[], None]
) -> Manifest:
    if config.mixture:
        return versions.mix(config.url, config.mixture, may_write)
    work = shards.plan(config)
    try:
        verify = work.before is not None and not work.indices
        meter = _Meter(len(work.indices), len(work.before.shards) if verify and work.before else 0, progress)
        if verify and work.before:
            wrong = _verify(work.before, meter)
            if wrong:
                _mend(work, work.before, wrong, meter)
        done = shards.finished(work)
        for slice_done in done.values():
            meter.add(slice_done, made=False)
        _make(work, (work.slice(index) for index in work.indices if index not in done), meter)
        return shards.commit(work, may_write)
    finally:
        work.close()


def _mend(work: shards.Plan, standing: Manifest, wrong: dict[str, str], meter: "_Meter") -> None:
    """Makes the damaged shards of a finished set again, from the sources that made them.

    Raises:
        ValueError: those give other bytes now.
    """
    _make(work, shards.made_again(work, sorted({shards.slice_of(url) for url in wrong})), meter)
    still = _verify(standing, meter)
    if still:
        reasons = "; ".join(f"{url}: {reason}" for url, reason in still.items())
        raise ValueError(
            f"{work.config.url} has damaged shards and {work.config.source} no longer gives the same bytes: {reasons}"
        )
    shards.clean(work)


def _make(work: shards.Plan, tasks: Iterable[Slice], meter: "_Meter") -> None:
    make = ray.remote(make_slice).options(num_cpus=1, max_retries=3, name="make_slice")
    for done in _run(make.remote(work.config, work.building, task) for task in tasks):
        meter.add(done, made=True)


def _verify(standing: Manifest, meter: "_Meter") -> dict[str, str]:
    """Reads every shard of a finished set; the damaged ones with what is wrong."""
    task = ray.remote(_checked).options(num_cpus=1, max_retries=3, name="verify_shard")
    rows = zip(*(standing.shards[name].to_pylist() for name in ("url", "size", "sha256", "samples")), strict=True)
    wrong: dict[str, str] = {}
    for url, samples, reason in _run(task.remote(standing.url, *row) for row in rows):
        if reason is not None:
            wrong[url] = reason
        meter.verify(samples)
    return wrong


def _checked(root: str, url: str, size: int, sha256: str, samples: int) -> tuple[str, int, str | None]:
    return url, samples, shards.damage(root, url, size, sha256)


def _run(submitted: Iterator[Any]) -> Iterator[Any]:
    """The results of tasks as they finish; tasks are submitted as room allows, and cancelled where one fails or the
    consumer stops.
    """
    most = max(2, int(TASKS_A_CPU * ray.cluster_resources().get("CPU", 1)))
    waiting: list[Any] = []
    more = True
    try:
        while more or waiting:
            while more and len(waiting) < most:
                ref = next(submitted, None)
                if ref is None:
                    more = False
                else:
                    waiting.append(ref)
            if waiting:
                ready, waiting = ray.wait(waiting, num_returns=1)
                yield result(ready[0])
    finally:
        for ref in waiting:
            ray.cancel(ref)


class _Meter:
    """Counts and rates of a running job; the rate leaves out what was there already."""

    def __init__(self, slices: int, to_verify: int, report: Callable[[ShardProgress], None] | None) -> None:
        self.slices, self.to_verify, self.report = slices, to_verify, report
        self.started = time.monotonic()
        self.done = self.made = self.images = self.made_images = self.rejected = self.bytes = self.verified = 0

    def add(self, done: SliceDone, made: bool) -> None:
        self.done += 1
        self.made += made
        self.images += done.images
        self.made_images += (done.images + done.rejected) * made
        self.rejected += done.rejected
        self.bytes += done.bytes
        self._tell()

    def verify(self, samples: int) -> None:
        self.verified += 1
        self.images += samples
        self.made_images += samples
        self._tell()

    def _tell(self) -> None:
        if self.report is None:
            return
        seconds = time.monotonic() - self.started
        left = seconds / self.made * max(0, self.slices - self.done) if self.made else None
        rate = self.made_images / seconds if seconds > 0 else 0.0
        self.report(
            ShardProgress(
                self.done,
                self.slices,
                self.images,
                self.rejected,
                self.bytes,
                self.verified,
                self.to_verify,
                seconds,
                rate,
                left,
            )
        )
