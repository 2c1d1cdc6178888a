"""The serving section of the run file."""

import math
from dataclasses import dataclass
from typing import Annotated

from pipeline.choose import choose
from pipeline.diffusion.sampling.samplers import SAMPLERS
from pipeline.ranges import Range, check
from pipeline.serving.ports import is_loopback


@dataclass(frozen=True)
class ServingConfig:
    """The endpoint: where it listens, what it serves, how much it takes on."""

    model: Annotated[
        str | None, "models:/NAME@alias, models:/NAME/VERSION or a model directory; null: the champion"
    ] = None
    more_models: Annotated[
        tuple[str, ...], "further models, named alike; a replica loads one when a request asks for it"
    ] = ()
    watch_s: Annotated[
        float, "seconds between looks at the registry: an alias that moved is followed", Range(gt=0, lt=math.inf)
    ] = 10.0
    max_model_bytes: Annotated[int, "weights a replica holds; the model unused for longest goes first", Range(ge=1)] = (
        8 << 30
    )
    kept_models: Annotated[str | None, "folder of each node for verified models, by digest; null: the user's cache"] = (
        None
    )
    max_kept_bytes: Annotated[int, "models kept there; the one unused for longest goes first", Range(ge=1)] = 32 << 30
    host: Annotated[str, "address to listen on; other than loopback only with key_hashes"] = "127.0.0.1"
    port: Annotated[int, "TCP port; 0 for any free one", Range(ge=0, le=65535)] = 8000
    key_hashes: Annotated[tuple[str, ...], "sha256 (hex) of each accepted bearer key; empty: no key is asked"] = ()
    key_quota: Annotated[
        int, "cost units (images x evaluations x pixels) a minute for each key; 0: no limit", Range(ge=0)
    ] = 0
    min_replicas: Annotated[
        int, "engine replicas kept; 0: none without requests, the first then waits for one", Range(ge=0)
    ] = 1
    max_replicas: Annotated[int, "engine replicas at most", Range(ge=1)] = 2
    work_per_replica_s: Annotated[
        float,
        "seconds of network evaluations that may be owed by a replica; more start above it",
        Range(gt=0, lt=math.inf),
    ] = 5.0
    upscale_delay_s: Annotated[float, "seconds of high load before replicas are added", Range(ge=0, lt=math.inf)] = 5.0
    downscale_delay_s: Annotated[float, "seconds of low load before a replica is stopped", Range(ge=0, lt=math.inf)] = (
        300.0
    )
    cpus_per_replica: Annotated[
        float, "CPU cores an engine replica asks for; also its torch threads", Range(gt=0, lt=math.inf)
    ] = 1.0
    gpus_per_replica: Annotated[float, "GPUs an engine replica asks for", Range(ge=0, lt=math.inf)] = 0.0
    ingress_replicas: Annotated[
        int, "HTTP ingresses; with two or more, one may die and requests go on", Range(ge=1)
    ] = 1
    cpus_ingress: Annotated[
        float, "CPU cores the HTTP ingress asks for, a fraction where engines use all cores", Range(ge=0, lt=math.inf)
    ] = 0.1
    chunk: Annotated[
        int, "rows of every network call; a request's bytes are promised for one value of it", Range(ge=1)
    ] = 8
    max_live_images: Annotated[int, "images in progress at once in a replica", Range(ge=1)] = 256
    sampler: Annotated[str, "sampler where a request names none"] = "heun"
    steps: Annotated[int, "steps where a request names none", Range(ge=1)] = 18
    max_images: Annotated[int, "images a request at most", Range(ge=1)] = 64
    max_steps: Annotated[int, "steps a request at most", Range(ge=1)] = 1000
    max_request_cost: Annotated[int, "images x network evaluations x pixels of a request at most", Range(ge=1)] = (
        100_000_000
    )
    max_queued_cost: Annotated[int, "the same, of all requests in a replica: 429 above it", Range(ge=1)] = 1_000_000_000
    max_request_bytes: Annotated[int, "body of a request at most", Range(ge=1)] = 16 << 20
    max_image_pixels: Annotated[int, "pixels of a sent image at most, before resizing", Range(ge=1)] = 16_000_000
    deadline_s: Annotated[float, "seconds until an unfinished request is given up", Range(gt=0, lt=math.inf)] = 120.0
    max_queued_requests: Annotated[int, "requests waiting for a replica at most: 429 above it", Range(ge=1)] = 512

    def __post_init__(self) -> None:
        check(self, "serving")
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"serving: needs min_replicas <= max_replicas, got {self.min_replicas} and {self.max_replicas}"
            )
        choose(SAMPLERS, self.sampler, "serving.sampler")
        if any(len(key) != 64 or set(key) - set("0123456789abcdef") for key in self.key_hashes):
            raise ValueError("serving.key_hashes must be sha256 digests, 64 hex digits each, never the keys themselves")
        if not self.key_hashes:
            refuse_strangers(self.host, "serving.host")


def refuse_strangers(host: str, key: str) -> None:
    """Raises ValueError where an endpoint without keys would listen on an address that others can reach; `key` names
    the setting."""
    if not is_loopback(host):
        raise ValueError(f"{key} is {host}, which others can reach: set serving.key_hashes, or host 127.0.0.1")
