"""What Prometheus reads of endpoints, trainings, feeds and jobs, through the metrics port that every Ray node has.

One rule of names: raydiffusion_, then training_, feed_, tracking_ or job_ (nothing for the endpoint), then what it is,
then its base unit; Ray puts `ray_` before each and `_total` behind a counter. Few labels, each bounded by what a user
wrote down: model (an id), run, job, node, route, status, outcome.
"""

import functools
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import ray
from ray.util.metrics import Counter, Gauge, Histogram

from pipeline import storage
from pipeline.data.reading.blocks import Block
from pipeline.serving.engine import Load
from pipeline.storage.s3 import HEDGE
from pipeline.training import events as say

SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0]
GAUGES = {
    "waiting_requests": ("waiting", "requests accepted and not yet started"),
    "live_requests": ("live", "requests in progress"),
    "live_images": ("live_rows", "images in progress"),
    "owed_evaluations": ("queued_cost", "row evaluations owed to accepted requests"),
    "evaluations_per_second": ("rows_per_s", "row evaluations a second of full network calls"),
}
COUNTERS = {
    "network_calls": ("calls", "network calls"),
    "evaluations": ("rows", "row evaluations answered"),
    "padded_evaluations": ("padded_rows", "rows of network calls that were padding"),
    "network_seconds": ("network_s", "seconds inside the network"),
    "turn_seconds": ("turn_s", "seconds in whole turns of the engine"),
}
GIB = 2**30
REPEAT_S = 5.0
STEP = {  # key of `events.Step.metrics` -> name, description, what one of its units is in base units
    "loss": ("training_loss", "training loss, the objective's own units", 1),
    "grad_norm": ("training_gradient_norm", "norm of the whole gradient before clipping", 1),
    "learning_rate": ("training_learning_rate", "learning rate of the last step", 1),
    "images_per_s": ("training_images_per_second", "images a second, all workers", 1),
    "mfu": ("training_mfu_ratio", "operations of forward and backward over the device's peak", 1),
    "peak_memory_gib": ("training_peak_memory_bytes", "the most memory that a worker has held", GIB),
    "data_wait": ("feed_wait_ratio", "share of the time in which the training waits for data", 1),
}
SYSTEM = {"busy_percent": ("training_gpu_busy_ratio", 0.01), "memory_gib": ("training_gpu_memory_bytes", GIB)}
GPU_KEY = re.compile(r"system/(?P<node>.+)/gpu_(?P<gpu>\d+)_(?P<what>\w+)")
RUN_GAUGES = {
    "training_running": "1 while the job trains, 0 once it has ended",
    "training_step": "global batches done",
    "training_step_timestamp_seconds": "when steps were last told of, or checkpoint, evaluation or start",
    "training_checkpoint_timestamp_seconds": "when a checkpoint was last committed, or the start",
    "training_checkpoint_write_seconds": "how long the last one was written",
    "training_checkpoint_bytes": "how large it is",
    "training_world_size": "workers",
    "tracking_backlog_entries": "records that MLflow has not taken yet",
}
RUN_COUNTERS = {
    "training_images": "images seen by this job",
    "training_restarts": "times that the workers started anew",
    "training_hangs": "times that they stood still and were ended",
    "training_checkpoint_failures": "saves or removals of old checkpoints that failed",
    "feed_lost_images": "damaged or removed images that others stood in for",
}
FEED = {
    "feed_images": "images read by reader tasks",
    "feed_bytes": "their decoded bytes",
    "feed_damaged_shards": "damaged shards met on quarantine",
    "feed_repeated_requests": "requests to the store made beside one that was silent",
}
OUTCOMES = ("finished", "failed", "cancelled", "expired")
PREFIX = "raydiffusion_"


class ReplicaMetrics:
    """The engines of a replica: gauges as they are, counters by what was added since they were last seen."""

    def __init__(self) -> None:
        self._gauges = {
            name: Gauge(f"{PREFIX}{name}", description, tag_keys=("model",))
            for name, (_, description) in GAUGES.items()
        }
        self._counters = {
            name: Counter(f"{PREFIX}{name}", description, tag_keys=("model",))
            for name, (_, description) in COUNTERS.items()
        }
        self._requests = Counter(f"{PREFIX}engine_requests", "requests ended", tag_keys=("model", "outcome"))
        self._seen: dict[str, dict[str, Any]] = {}

    def update(self, loads: Mapping[str, Load]) -> None:
        """`loads` by model id. A model whose engine is new starts from zero."""
        for model, load in loads.items():
            now, before = asdict(load), self._seen.get(model, {})
            if now["calls"] < before.get("calls", 0):
                before = {}
            tags = {"model": model}
            for name, (field, _) in GAUGES.items():
                self._gauges[name].set(now[field], tags=tags)
            for name, (field, _) in COUNTERS.items():
                if (more := now[field] - before.get(field, 0)) > 0:
                    self._counters[name].inc(more, tags=tags)
            for outcome in OUTCOMES:
                if (more := now[outcome] - before.get(outcome, 0)) > 0:
                    self._requests.inc(more, tags={**tags, "outcome": outcome})
            self._seen[model] = now
        for model in set(self._seen) - set(loads):
            del self._seen[model]
            for gauge in self._gauges.values():
                gauge.set(0, tags={"model": model})


class IngressMetrics:
    """The HTTP side: answers by route and status, and how long they took in all and in each stage."""

    def __init__(self) -> None:
        self._answers = Counter(f"{PREFIX}http_requests", "answers of the HTTP side", tag_keys=("route", "status"))
        self._seconds = Histogram(
            f"{PREFIX}http_seconds", "seconds from a request to the end of its answer", SECONDS, tag_keys=("route",)
        )
        self._stages = Histogram(
            f"{PREFIX}stage_seconds", "seconds an answered request was in a stage", SECONDS, tag_keys=("stage",)
        )
        self._swaps = Counter(f"{PREFIX}model_swaps", "aliases followed to a new version", tag_keys=("model", "result"))

    def answered(self, route: str, status: int, seconds: float) -> None:
        """`route`: the pattern, never what a client wrote."""
        self._answers.inc(tags={"route": route, "status": str(status)})
        self._seconds.observe(max(seconds, 1e-6), tags={"route": route})

    def ran(self, answer: Mapping[str, Any]) -> None:
        """The stages of a request, from the lineage in its answer."""
        for stage in ("queued", "run"):
            if f"{stage}_s" in answer:
                self._stages.observe(max(float(answer[f"{stage}_s"]), 1e-6), tags={"stage": stage})

    def swapped(self, model: str, succeeded: bool) -> None:
        """An alias has moved: the new version has the traffic, or was refused."""
        self._swaps.inc(tags={"model": model, "result": "swapped" if succeeded else "refused"})


class RunMetrics:
    """A training as its driver hears of it. Use as a context: the run counts as running inside."""

    def __init__(self, run: str) -> None:
        self.run = run
        plain = [name for name, _, _ in STEP.values()]
        described = RUN_GAUGES | {name: text for name, text, _ in STEP.values()}
        self._gauges = {name: _gauge(name, described[name], "run") for name in (*RUN_GAUGES, *plain)}
        self._levels = _gauge("training_level_loss", "loss in a quarter of the noise range, 1 is low", "run", "quarter")
        self._gpus = {name: _gauge(name, "of a worker's GPU", "run", "node", "gpu") for name, _ in SYSTEM.values()}
        self._counters = {name: _counter(name, text, "run") for name, text in RUN_COUNTERS.items()}
        self._guard = _counter("training_guard", "steps left out, and rollbacks", "run", "what")
        self._images: int | None = None
        self._starts = 0

    def __enter__(self) -> "RunMetrics":
        self._set("training_running", 1)
        for name in ("training_step_timestamp_seconds", "training_checkpoint_timestamp_seconds"):
            self._set(name, time.time())
        self.backlog(0)
        return self

    def __exit__(self, *_: object) -> None:
        self._set("training_running", 0)

    def handle(self, event: say.Event) -> None:
        """Counts an event; never fails."""
        if isinstance(event, say.System):
            self._system(event.metrics)
            return
        if not isinstance(event, say.Hung):
            self._set("training_step_timestamp_seconds", time.time())
        match event:
            case say.Started():
                self._started(event)
            case say.Step():
                self._step(event)
            case say.CheckpointSaved():
                self._set("training_checkpoint_timestamp_seconds", time.time())
                self._set("training_checkpoint_write_seconds", event.write_s)
                self._set("training_checkpoint_bytes", _size(event.checkpoint))
            case say.CheckpointFailed():
                self._count("training_checkpoint_failures")
            case say.Hung():
                self._count("training_hangs")
            case say.Skipped():
                self._guard.inc(tags={"run": self.run, "what": "skipped"})
            case say.RolledBack():
                self._guard.inc(tags={"run": self.run, "what": "rolled_back"})
            case _:
                return

    def backlog(self, entries: int) -> None:
        """Records that wait for MLflow."""
        self._set("tracking_backlog_entries", entries)

    def _started(self, event: say.Started) -> None:
        self._starts += 1
        self._images = event.images
        self._set("training_world_size", event.world_size)
        self._set("training_step", event.step)
        if self._starts > 1:
            self._count("training_restarts")

    def _step(self, event: say.Step) -> None:
        self._set("training_step", event.step)
        if self._images is not None:
            self._count("training_images", event.images - self._images)
        self._images = event.images
        for key, (name, _, unit) in STEP.items():
            if key in event.metrics:
                self._set(name, event.metrics[key] * unit)
        for quarter in "1234":
            if (loss := event.metrics.get(f"loss_quarter_{quarter}")) is not None:
                self._levels.set(loss, tags={"run": self.run, "quarter": quarter})
        self._count("feed_lost_images", event.metrics.get("lost_images", 0))

    def _system(self, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            found = GPU_KEY.fullmatch(key)
            if found and found["what"] in SYSTEM:
                name, unit = SYSTEM[found["what"]]
                self._gpus[name].set(value * unit, tags={"run": self.run, "node": found["node"], "gpu": found["gpu"]})

    def _set(self, name: str, value: float) -> None:
        self._gauges[name].set(value, tags={"run": self.run})

    def _count(self, name: str, more: float = 1) -> None:
        if more > 0:
            self._counters[name].inc(more, tags={"run": self.run})


class JobMetrics:
    """How far a piece of work of a job is: `what` is its name on the progress bar."""

    def __init__(self, what: str) -> None:
        self.tags = {"job": what}
        self._done = _gauge("job_done_units", "what is done of this piece of work", "job")
        self._total = _gauge("job_wanted_units", "how much there is of it", "job")
        self._at = _gauge("job_progress_timestamp_seconds", "when it last went on", "job")

    def update(self, done: float, total: float) -> None:
        for gauge, value in ((self._done, done), (self._total, total), (self._at, time.time())):
            gauge.set(value, tags=self.tags)


class FeedMetrics:
    """What the reader tasks of a process have read."""

    def __init__(self) -> None:
        self._counters = {name: _counter(name, text) for name, text in FEED.items()}
        self._seconds = Histogram(f"{PREFIX}feed_block_seconds", "seconds to read and decode a block", SECONDS)
        self._asked_again = 0

    def read(self, block: Block, seconds: float) -> None:
        repeated = HEDGE.asked_again - self._asked_again
        self._asked_again += repeated
        self._seconds.observe(max(seconds, 1e-6))
        for name, more in zip(FEED, (len(block.ids), block.pixels.nbytes, len(block.damage), repeated), strict=True):
            if more:
                self._counters[name].inc(more)


class Kept:
    """A gauge that stands until it is set again: Ray tells of each value once, and of a process that stands still it
    would tell nothing any more. A thread says all of them again every REPEAT_S.
    """

    _values: ClassVar[dict[tuple["Kept", tuple[tuple[str, str], ...]], float]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()
    _thread: ClassVar[threading.Thread | None] = None

    def __init__(self, name: str, description: str, *tags: str) -> None:
        self.gauge = Gauge(f"{PREFIX}{name}", description, tag_keys=tags)

    def set(self, value: float, tags: Mapping[str, str]) -> None:
        """`value` in base units, from now on."""
        with Kept._lock:
            Kept._values[self, tuple(sorted(tags.items()))] = value
            if Kept._thread is None:
                Kept._thread = threading.Thread(target=Kept._repeat, name="metrics", daemon=True)
                Kept._thread.start()
        self.gauge.set(value, tags=dict(tags))

    @staticmethod
    def _repeat() -> None:
        while True:
            time.sleep(REPEAT_S)
            if not ray.is_initialized():
                continue
            with Kept._lock:
                said = dict(Kept._values)
            for (kept, tags), value in said.items():
                kept.gauge.set(value, tags=dict(tags))


@functools.cache
def feed_metrics() -> FeedMetrics:
    """This process's own."""
    return FeedMetrics()


def _gauge(name: str, description: str, *tags: str) -> Kept:
    return Kept(name, description, *tags)


def _counter(name: str, description: str, *tags: str) -> Counter:
    return Counter(f"{PREFIX}{name}", description, tag_keys=tags)


def _size(url: str) -> int:
    """Bytes of what lies below a URL; 0 where it is gone already or does not answer: metrics end no training."""
    try:
        return sum(entry.size for entry in storage.list_files(url))
    except (OSError, ValueError):
        return 0


def names() -> list[str]:
    """Every metric of the endpoint as Prometheus sees it, without the suffixes of histograms."""
    own = [*GAUGES, *COUNTERS, "engine_requests", "http_requests", "http_seconds", "stage_seconds", "model_swaps"]
    return [f"ray_{PREFIX}{name}" for name in own]


def run_names() -> list[str]:
    """Every metric of trainings, feeds and jobs, likewise."""
    own = [*RUN_GAUGES, *RUN_COUNTERS, *FEED, *(name for name, _, _ in STEP.values())]
    own += [*(name for name, _ in SYSTEM.values()), "training_level_loss", "training_guard", "feed_block_seconds"]
    own += ["job_done_units", "job_wanted_units", "job_progress_timestamp_seconds"]
    return [f"ray_{PREFIX}{name}" for name in own]
