"""Hostile requests against the HTTP application: each is refused by the error schema, none harms the next."""

import asyncio
import base64
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from pipeline.model import Model, load
from pipeline.serving.config import ServingConfig
from tests.faults.endpoint import Endpoint, serving
from tests.faults.hostile_numbers import all_numbers
from tests.faults.hostile_requests import ENCODE, GENERATE, JSON_TYPE, MOST_BYTES, MOST_IMAGES, Hostile, all_requests
from tests.serving.tiny import save_tiny

ANSWER_S = 60.0  # the longest that an answer may take, on a busy machine
DEADLINE_S = 60.0
MOST_COST = 500 * 64  # of a request: evaluations x pixels
MEMORY_BYTES = 150 << 20
FAIR = {"n": 2, "steps": 4, "seed": 1, "labels": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    url = str(tmp_path_factory.mktemp("model") / "tiny")
    save_tiny(url)
    return load(url)


@pytest.fixture(scope="module")
def endpoint(model: Model) -> Iterator[Endpoint]:
    config = ServingConfig(
        model="tiny",
        max_images=MOST_IMAGES,
        max_steps=64,
        max_request_bytes=MOST_BYTES,
        max_image_pixels=1_000_000,
        deadline_s=DEADLINE_S,
        max_request_cost=MOST_COST,
    )
    with serving(model, config) as made:
        yield made


def fair(endpoint: Endpoint) -> Any:
    """The images of an honest request."""
    answer = httpx.post(f"{endpoint.url}{GENERATE}", json=FAIR, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def wrong_with(answer: httpx.Response) -> str | None:
    """What is not as it should be in the answer to a hostile request."""
    if not 400 <= answer.status_code < 500:
        return f"status {answer.status_code}: {answer.text[:200]}"
    if answer.request.method == "HEAD":
        return None
    try:
        body = answer.json()
        error = body["error"]
    except (ValueError, KeyError, TypeError):
        return f"no error schema: {answer.status_code} {answer.text[:200]}"
    fine = (
        error.keys() == {"message", "type", "param", "code"}
        and all(isinstance(error[name], str) and error[name] for name in ("message", "type", "code"))
        and (error["param"] is None or isinstance(error["param"], str))
        and body["trace_id"] == answer.headers["x-request-id"]
        and len(answer.content) < 5000
    )
    return None if fine else f"error schema: {answer.text[:300]}"


async def refused(client: httpx.AsyncClient, hostile: Hostile) -> str | None:
    request = client.build_request(hostile.method, hostile.path, content=hostile.body, headers=hostile.headers)
    started = time.monotonic()
    try:
        answer = await client.send(request)
    except httpx.HTTPError as error:
        return f"no answer: {error!r}"
    if (seconds := time.monotonic() - started) > ANSWER_S:
        return f"answered after {seconds:.1f} s"
    return None if hostile.fair and answer.status_code == 200 else wrong_with(answer)


def on_the_wire(endpoint: Endpoint, raw: bytes, fair: bool) -> str | None:
    """The bytes as they are, then the end of the connection: 4xx or no answer at all, or where it is fair 200."""
    with socket.create_connection((endpoint.host, endpoint.port), timeout=ANSWER_S) as connection:
        try:
            connection.sendall(raw)
            if not fair:  # the end of what it sends is a client that leaves
                connection.shutdown(socket.SHUT_WR)
            told = connection.recv(4096)
        except (ConnectionError, BrokenPipeError):
            return None  # the server closed it
        except TimeoutError:
            return "neither an answer nor the end of the connection"
    status = told[9:12]
    return None if not told or status[:1] == b"4" or (fair and status == b"200") else f"answered {told[:200]!r}"


def attack(endpoint: Endpoint, requests: list[Hostile]) -> dict[str, str]:
    """What went wrong, by the request's name."""

    async def all_of_them() -> dict[str, str]:
        places = asyncio.Semaphore(8)
        async with httpx.AsyncClient(base_url=endpoint.url, timeout=ANSWER_S) as client:

            async def one(hostile: Hostile) -> tuple[str, str | None]:
                async with places:
                    if hostile.raw is not None:
                        return hostile.name, await asyncio.to_thread(on_the_wire, endpoint, hostile.raw, hostile.fair)
                    return hostile.name, await refused(client, hostile)

            return {name: wrong for name, wrong in await asyncio.gather(*map(one, requests)) if wrong is not None}

    return asyncio.run(all_of_them())


def check(endpoint: Endpoint, requests: list[Hostile]) -> None:
    before, process = fair(endpoint), psutil.Process()
    memory = process.memory_info().rss
    wrong = attack(endpoint, requests)
    assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong.items())
    assert fair(endpoint) == before
    assert endpoint.alive
    assert process.memory_info().rss - memory < MEMORY_BYTES
    print(f"{len(requests)} hostile requests: 0 came to a 5xx; the next answer has the same bytes")


def test_a_share_of_the_hostile_requests_is_refused(endpoint: Endpoint) -> None:
    requests = all_requests()[::13]
    assert len(requests) >= 60
    check(endpoint, requests)


@pytest.mark.slow
def test_every_hostile_request_is_refused(endpoint: Endpoint) -> None:
    requests = all_requests()
    assert len(requests) >= 500
    repeated = [name for name, count in Counter(each.name for each in requests).items() if count > 1]
    assert not repeated
    check(endpoint, requests)


def test_numbers_at_their_extremes_come_to_no_5xx(endpoint: Endpoint) -> None:
    requests = all_numbers()[::11]
    assert len(requests) >= 100
    check(endpoint, requests)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_number_at_its_extremes_comes_to_no_5xx(endpoint: Endpoint) -> None:
    requests = all_numbers()
    assert len(requests) >= 1000
    assert len({each.name for each in requests}) == len(requests)
    check(endpoint, requests)


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        (GENERATE, {"sampler": "ddim", "eta": 1e308}, r"'eta' of sampler 'ddim' must be between 0 and 10, got 1e\+308"),
        (GENERATE, {"sampler": "adaptive", "options": {"tolerance": 1e-30}}, "'tolerance' .* between 1e-05 and 1"),
        (GENERATE, {"options": {"\ud800": 1}}, r"option.*\\ud800"),
        (ENCODE, {"latents": [base64.b64encode(b"\xff\xff\x7f\x7f" * 64).decode()]}, r"at most 1000; got 3\.4e\+38"),
    ],
)  # fmt: skip
def test_what_the_mathematics_cannot_bear_is_refused_by_name(
    endpoint: Endpoint, path: str, body: dict[str, Any], told: str
) -> None:
    answer = httpx.post(f"{endpoint.url}{path}", content=json.dumps(body), headers={"content-type": JSON_TYPE})
    assert answer.status_code == 400
    assert re.search(told, answer.json()["error"]["message"]), answer.text


def test_slow_clients_hold_up_nobody(endpoint: Endpoint) -> None:
    """100 connections that send a byte now and then; honest requests go on, and the last byte is not waited for."""
    head = b"POST %s HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: 60\r\n\r\n"
    connections = [socket.create_connection((endpoint.host, endpoint.port), timeout=10) for _ in range(100)]
    stop = threading.Event()

    def drip() -> None:
        for index, connection in enumerate(connections):
            connection.sendall(head % GENERATE.encode() if index % 2 else b"POST /v1/ima")
        while not stop.wait(0.2):
            for connection in connections:
                connection.sendall(b" ")

    slow = threading.Thread(target=drip)
    slow.start()
    try:
        expected = fair(endpoint)
        for _ in range(5):
            started = time.monotonic()
            assert fair(endpoint) == expected
            assert time.monotonic() - started < ANSWER_S
    finally:
        stop.set()
        slow.join()
        for connection in connections:
            connection.close()
    assert fair(endpoint) == expected
    assert endpoint.service.engine.load().live == 0


def test_the_check_finds_answers_that_are_wrong() -> None:
    request = httpx.Request("POST", "http://127.0.0.1")
    for status, content in ((200, b"{}"), (500, b"{}"), (404, b"not found"), (400, b'{"error": {"message": "x"}}')):
        assert wrong_with(httpx.Response(status, content=content, request=request)) is not None
