"""What the endpoint survives under load: replicas killed and terminated, aliases moved, broken candidates, clients that
leave. Each prints its counts."""

import itertools
import json
import os
import re
import signal
import socket
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipeline.serving.config import ServingConfig
from tests.cluster.endpoints import GENERATE, Registry, import_serve, until

SEEDS = range(6)
DEATHS = 10
PATIENCE_S = 600  # for replicas to come, which on a busy machine takes minutes
FIELDS = {"n": 2, "steps": 12, "sampler": "ddim"}


@pytest.fixture
def two_replicas(endpoint: str, serving_config: ServingConfig, registry: Registry) -> Iterator[None]:
    """The endpoint with two replicas, and with one again."""
    serve = import_serve()
    assert serve.deploy(replace(serving_config, min_replicas=2, max_replicas=2), registry.uri) == endpoint
    until(lambda: len(processes()) == 2, PATIENCE_S)
    yield
    serve.deploy(serving_config, registry.uri)
    until(lambda: len(processes()) == 1, PATIENCE_S)


class Traffic:
    """Clients in closed loop that never ask twice; every answer is held against the reference of its version."""

    def __init__(self, url: str, clients: int = 3) -> None:
        self.url = url
        self.expected: dict[tuple[str, int], Any] = {}
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(index,)) for index in range(clients)]

    def _ask(self, index: int) -> None:
        with httpx.Client(base_url=self.url, timeout=120) as client:
            for number in itertools.count(index):
                if self._ended.is_set():
                    return
                seed = number % len(SEEDS)
                try:
                    answer = client.post(GENERATE, json={**FIELDS, "seed": seed})
                except httpx.HTTPError as error:
                    self.wrong.append(repr(error))
                    continue
                if answer.status_code != 200:
                    self.wrong.append(answer.text)
                    continue
                body = answer.json()
                key = (body["model_version"], seed)
                if self.expected.setdefault(key, body["data"]) != body["data"]:
                    self.wrong.append(f"another image of {key}")
                self.counts[body["model_version"]] += 1

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(150)

    def some_more(self, version: str = "", answers: int = 12) -> None:
        """Wait for so many answers (of a version) from now on."""

        def count() -> int:
            return self.counts[version] if version else self.counts.total()

        before = count()
        until(lambda: count() >= before + answers, PATIENCE_S)


def processes() -> set[int]:
    return {replica["process"] for replica in import_serve().status()}


@pytest.mark.parametrize("swaps", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_an_alias_that_moves_loses_no_request(endpoint: str, registry: Registry, swaps: int) -> None:
    with Traffic(endpoint) as traffic:
        traffic.some_more("1")
        for swap in range(swaps):
            version = 2 if swap % 2 == 0 else 1
            registry.point(version)
            traffic.some_more(str(version))
        registry.point(1)
        traffic.some_more("1")
    print(f"{swaps} swaps: {dict(traffic.counts)} answers by version, 0 lost")
    assert not traffic.wrong
    assert len(traffic.expected) == 2 * len(SEEDS)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_a_replica_that_dies_loses_no_request(endpoint: str, two_replicas: None, number: signal.Signals) -> None:
    with Traffic(endpoint) as traffic:
        traffic.some_more()
        for _ in range(DEATHS):
            running = processes()
            os.kill(min(running), number)
            traffic.some_more()
            until(lambda held=running: len(processes()) == 2 and processes() != held, PATIENCE_S)
    print(f"{DEATHS} {number.name}: {traffic.counts.total()} answers, 0 lost")
    assert not traffic.wrong


def test_a_broken_candidate_gets_no_traffic_and_is_reported(endpoint: str, registry: Registry) -> None:
    with httpx.Client(base_url=endpoint, timeout=60) as client, Traffic(endpoint, 1) as traffic:

        def rejected() -> Any:
            return client.get("/v1/models/digits").json()["rejected_version"]

        assert rejected() is None
        registry.point(3)
        until(lambda: rejected() is not None)
        assert rejected()["version"] == "3"
        assert "not finite" in rejected()["reason"]
        traffic.some_more("1")
        registry.point(1)
    assert set(traffic.counts) == {"1"}
    assert not traffic.wrong


def test_a_deleted_alias_is_told_and_its_version_stays(endpoint: str, registry: Registry) -> None:
    def warning() -> Any:
        (entry,) = httpx.get(f"{endpoint}/v1/models", timeout=60).json()["data"]
        return entry["warning"]

    assert warning() is None
    registry.client.delete_registered_model_alias("digits", "champion")
    try:
        until(lambda: warning() is not None)
        assert (
            warning() == "models:/digits@champion is not in the registry any more; models:/digits/1 stays until it is"
        )
        httpx.post(f"{endpoint}{GENERATE}", json=FIELDS, timeout=60).raise_for_status()
    finally:
        registry.point(1)
    until(lambda: warning() is None)


@pytest.mark.parametrize("times", [5, pytest.param(300, marks=pytest.mark.slow)])
def test_a_client_that_leaves_is_noticed_at_once(endpoint: str, times: int) -> None:
    from ray.serve import get_deployment_handle

    address = endpoint.removeprefix("http://")
    host, _, port = address.partition(":")
    told: list[float] = []
    handle = get_deployment_handle("engine", "raydiffusion")

    def load(field: str) -> int:
        replica = handle.status.remote().result()
        return sum(model["load"][field] for model in replica["models"])

    def cancelled() -> int:
        return load("cancelled")

    def live() -> int:
        return load("live")

    for index in range(times):
        body = json.dumps({"n": 1, "steps": 30_000, "sampler": "ddim", "stream": index % 2 == 0}).encode()
        head = f"POST {GENERATE} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n"
        before = cancelled()
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
            until(lambda: live() == 1)
        closed = time.monotonic()
        until(lambda held=before: cancelled() == held + 1)
        told.append(time.monotonic() - closed)
        assert live() == 0
    told.sort()
    at_99 = told[min(len(told) - 1, int(0.99 * len(told)))]
    print(f"{times} of {times} cancelled; close to told (with asking): p50 {told[times // 2]:.3f} s, p99 {at_99:.3f} s")


def test_a_replica_comes_back_without_the_registry_and_where_none_can_the_reason_is_told(
    endpoint: str, registry: Registry, serving_config: ServingConfig
) -> None:
    """The registry's files away: one death is outlived by the weights kept on the node. Those away as well: 503 with
    the reason, soon, for requests, streams and probes."""
    folder, fields = Path(registry.uri.removeprefix("sqlite:///")).parent, {**FIELDS, "seed": 3}
    away, kept = folder.with_name("away"), Path(serving_config.kept_models or "")
    expected = httpx.post(f"{endpoint}{GENERATE}", json=fields, timeout=60).json()["data"]
    folder.rename(away)
    try:
        (before,) = processes()
        os.kill(before, signal.SIGKILL)
        assert httpx.post(f"{endpoint}{GENERATE}", json=fields, timeout=120).json()["data"] == expected
        until(lambda: processes() not in (set(), {before}), PATIENCE_S)
        kept.rename(kept.with_name("kept-away"))
        os.kill(min(processes()), signal.SIGKILL)
        told: list[float] = []
        for path, body in ((GENERATE, fields), (GENERATE, {**fields, "stream": True}), ("/readyz", None)):
            started = time.monotonic()
            method = "GET" if body is None else "POST"
            answer = httpx.request(method, f"{endpoint}{path}", json=body, timeout=serving_config.deadline_s)
            told.append(time.monotonic() - started)
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert "no replica" in answer.json()["error"]["message"]
        print(f"told after {', '.join(f'{each:.1f}' for each in told)} s: {answer.text}")
    finally:
        assert not folder.exists(), "an empty registry was made"
        away.rename(folder)
        if not kept.exists():
            kept.with_name("kept-away").rename(kept)
    until(lambda: httpx.get(f"{endpoint}/readyz", timeout=60).status_code == 200, PATIENCE_S)
    assert httpx.post(f"{endpoint}{GENERATE}", json=fields, timeout=120).json()["data"] == expected


def test_prometheus_finds_every_metric_that_the_dashboard_shows(endpoint: str) -> None:
    import ray

    from pipeline.cluster import monitoring

    text = (Path(__file__).parents[2] / "infra" / "monitoring" / "grafana.json").read_text()
    shown = set(re.findall(r"ray_raydiffusion_\w+", text))
    stems = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in shown}
    assert stems == set(monitoring.names())
    port = ray.nodes()[0]["MetricsExportPort"]

    def exported() -> set[str]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return set(re.findall(r"^(ray_raydiffusion_\w+)\{", answer.read().decode(), re.MULTILINE))

    httpx.post(f"{endpoint}{GENERATE}", json=FIELDS, timeout=60).raise_for_status()
    until(lambda: shown <= exported(), 60)
