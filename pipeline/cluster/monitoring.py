"""What Prometheus reads of the endpoints, through the metrics port that every Ray node has.

Base units and few labels: model (an id), route, status, outcome. Ray puts `ray_` before each name.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from pipeline.serving.engine import Load

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


def names() -> list[str]:
    """Every metric as Prometheus sees it, without the suffixes of histograms."""
    own = [*GAUGES, *COUNTERS, "engine_requests", "http_requests", "http_seconds", "stage_seconds", "model_swaps"]
    return [f"ray_{PREFIX}{name}" for name in own]
