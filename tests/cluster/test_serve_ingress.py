"""What dies in front of the replicas: of two ingresses one, or the only HTTP proxy. What goes through it fails and
comes to its bytes when asked again with its seed; nobody killed is the control. Each prints its counts.
"""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from statistics import median
from typing import Any

import httpx
import psutil
import pytest

from pipeline.serving.config import ServingConfig
from tests.cluster.endpoints import GENERATE, Registry, import_serve, until

ROUNDS = 5
IN_FLIGHT = [{"n": 2, "steps": 400, "sampler": "ddim", "seed": seed} for seed in range(4)]
SMALL = {"steps": 2}
NEXT = 10  # small requests after each death
TITLES = {"ingress": "ServeReplica:raydiffusion:ingress", "proxy": "ray::ProxyActor"}
PATIENCE_S = 600


def processes(title: str) -> set[int]:
    """Of this test's own Ray."""
    mine = psutil.Process().children(recursive=True)
    return {each.pid for each in mine if TITLES[title] in " ".join(each.cmdline() or [])}


def ingresses_ready(count: int) -> bool:
    """A dead one is ready in Serve's eyes until its next look, a new one has a process before it is ready."""
    from ray import serve

    states = serve.status().applications["raydiffusion"].deployments["ingress"].replica_states
    return len(processes("ingress")) == count and dict(states) == {"RUNNING": count}


@pytest.fixture
def two_ingresses(endpoint: str, serving_config: ServingConfig, registry: Registry) -> Iterator[None]:
    serve = import_serve()
    serve.deploy(replace(serving_config, ingress_replicas=2), registry.uri)
    until(lambda: ingresses_ready(2), PATIENCE_S)
    yield
    serve.deploy(serving_config, registry.uri)
    until(lambda: ingresses_ready(1), PATIENCE_S)


def ask(url: str, fields: dict[str, Any]) -> Any:
    """The images; None where it failed. A plain client that never asks twice."""
    try:
        answer = httpx.post(f"{url}{GENERATE}", json=fields, timeout=120)
    except httpx.TransportError:
        return None
    return answer.json()["data"] if answer.status_code == 200 else None


def ask_again(url: str, fields: dict[str, Any]) -> Any:
    """The recipe of the README: the client's own retries, and the seed."""
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=10)
    ours = {name: fields[name] for name in ("steps", "sampler", "seed")}
    answer = client.images.generate(prompt="", n=fields["n"], extra_body=ours)
    assert answer.data is not None
    return [item.b64_json for item in answer.data]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("victim", ["nobody", "ingress", "proxy"])
def test_only_what_goes_through_it_fails(endpoint: str, two_ingresses: None, victim: str) -> None:
    expected = [ask(endpoint, fields) for fields in IN_FLIGHT]
    lost = refused = 0
    seconds, away = list[float](), list[float]()  # of the next requests that succeed; from the death to the first
    for _ in range(ROUNDS):
        before = processes(victim) if victim != "nobody" else set[int]()
        with ThreadPoolExecutor(len(IN_FLIGHT)) as pool:
            asked = [pool.submit(ask, endpoint, fields) for fields in IN_FLIGHT]
            assert ask(endpoint, SMALL)
            if before:
                os.kill(min(before), signal.SIGKILL)
            killed, answered = time.monotonic(), 0
            while answered < NEXT:
                started = time.monotonic()
                if ask(endpoint, SMALL) is None:
                    refused += 1
                    time.sleep(0.1)
                    continue
                seconds.append(time.monotonic() - started)
                answered += 1
                if answered == 1:
                    away.append(time.monotonic() - killed)
        for fields, future, images in zip(IN_FLIGHT, asked, expected, strict=True):
            if (told := future.result()) is None:
                lost += 1
                told = [{"b64_json": each} for each in ask_again(endpoint, fields)]
            assert [each["b64_json"] for each in told] == [each["b64_json"] for each in images]
        if before:
            until(lambda held=before: len(processes(victim)) == len(held) and processes(victim) != held, PATIENCE_S)
        until(lambda: ingresses_ready(2), PATIENCE_S)
    print(
        f"{victim} killed {ROUNDS} times: {lost} of {ROUNDS * len(IN_FLIGHT)} in flight failed and had their bytes "
        f"when asked again; of the next, {refused} were refused, {len(seconds)} took {median(seconds):.2f} s, at most "
        f"{max(seconds):.2f}; the first answer {', '.join(f'{each:.2f}' for each in away)} s after the death"
    )
    assert (lost == 0) == (victim == "nobody")
    assert refused == 0 or victim == "proxy"
