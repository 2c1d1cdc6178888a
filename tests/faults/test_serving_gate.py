"""What stands in Ray Serve's proxy, here around uvicorn alone: half-sent requests hold up nobody, and bodies are
bounded in time, each and in sum."""

import asyncio
import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import uvicorn
from uvicorn.protocols.http import auto

from pipeline.cluster.gate import Connections, Gate, Limits, guarded
from pipeline.model import load
from pipeline.serving.config import ServingConfig
from pipeline.serving.service import Identity, Service
from pipeline.web.app import make_app
from tests.serving.tiny import save_tiny

LIMITS = Limits(header_s=0.5, body_s=0.5, connections=50, bodies_bytes=1 << 20)
PATH = "/v1/images/generations"
HEAD = b"POST /v1/images/generations HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = str(tmp_path_factory.mktemp("model") / "tiny")
    save_tiny(folder)
    model = load(folder)
    config = ServingConfig(model="tiny")
    service = Service(model, config, Identity("tiny", "1", model.digest))
    connections = Connections(LIMITS)
    app = Gate(make_app(service, config), connections)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        options = uvicorn.Config(
            app, http=guarded(auto.AutoHTTPProtocol, connections), log_level="critical", lifespan="off", ws="none"
        )
        server = uvicorn.Server(options)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = server.force_exit = True
        thread.join(20)
    service.close(drain=False, timeout_s=20)


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10)


def fair(url: str) -> float:
    """Seconds that an honest request takes."""
    started = time.monotonic()
    httpx.post(f"{url}{PATH}", json={"steps": 2}, timeout=30).raise_for_status()
    return time.monotonic() - started


@pytest.mark.parametrize("sent", [b"", b"POST /v1/ima", HEAD, HEAD + b'content-length: 60\r\n\r\n{"n"'])
def test_half_sent_requests_keep_nobody_out(url: str, sent: bytes) -> None:
    fair(url)
    half = [connect(url) for _ in range(200)]
    for connection in half:
        try:
            connection.sendall(sent)
        except OSError:
            continue  # already closed, to make room
    try:
        assert max(fair(url) for _ in range(3)) < 10.0
        time.sleep(LIMITS.header_s + 0.3)
        told = [_end(connection) for connection in half]
        assert set(told) <= {b"", b"HTTP/1.1 408"}
    finally:
        for connection in half:
            connection.close()


def _end(connection: socket.socket) -> bytes:
    """What the server says to a client that sends no more, up to the end of the connection."""
    try:
        return connection.recv(12)
    except ConnectionError:
        return b""


def test_a_slow_drip_has_its_time_and_no_more(url: str) -> None:
    with connect(url) as connection:
        started = time.monotonic()
        try:
            while time.monotonic() - started < 10:
                connection.sendall(b"x")
                time.sleep(0.05)
        except OSError:
            pass
        assert time.monotonic() - started < 5


def test_bodies_are_bounded_in_sum_and_the_rest_told_to_wait(url: str) -> None:
    image = base64.b64encode(bytes(400_000)).decode()

    def ask(_: int) -> httpx.Response:
        body = json.dumps({"steps": 2, "image": image, "n": 1})
        return httpx.post(f"{url}{PATH}", content=body, headers={"content-type": "application/json"}, timeout=30)

    head = HEAD + b"content-length: 900000\r\n\r\n{"
    with connect(url) as holding:
        holding.sendall(head)
        time.sleep(0.1)
        answer = ask(0)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
    with ThreadPoolExecutor(8) as pool:
        statuses = {answer.status_code for answer in pool.map(ask, range(16))}
    assert statuses <= {400, 429}  # 400: zeros are no image
    assert ask(0).status_code == 400  # nothing stays counted
    large = httpx.post(f"{url}{PATH}", content=bytes(2 << 20), headers={"content-type": "application/json"}, timeout=30)
    assert large.status_code == 413


@pytest.mark.parametrize("name", ["x-request-id", "x-session-id", "serve-multiplexed-model-id", "x-any"])
def test_a_header_that_is_no_text_is_refused(url: str, name: str) -> None:
    with connect(url) as connection:
        connection.sendall(HEAD + name.encode() + b": \xff\r\ncontent-length: 12\r\n\r\n" + b'{"steps": 2}')
        assert connection.recv(12) == b"HTTP/1.1 400"


def test_a_client_that_leaves_ends_its_request(url: str) -> None:
    async def run() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            asked = asyncio.ensure_future(client.post(PATH, json={"steps": 1000, "sampler": "ddim", "n": 16}))
            await asyncio.sleep(0.3)
            asked.cancel()

    asyncio.run(run())
    assert fair(url) < 10


async def _nothing(*_: object) -> None:
    """An application that is never asked."""


def test_ray_serve_finds_the_gate_by_its_name() -> None:
    from importlib import import_module

    from pipeline.cluster.gate import IMPORT_PATH

    module, _, name = IMPORT_PATH.partition(":")
    before = auto.AutoHTTPProtocol
    try:
        (made,) = getattr(import_module(module), name)()
        assert made.cls is Gate
        assert issubclass(auto.AutoHTTPProtocol, before)
        loaded = uvicorn.Config(made.cls(_nothing, **made.kwargs), http="auto")
        loaded.load()
        assert loaded.http_protocol_class is auto.AutoHTTPProtocol
    finally:
        auto.AutoHTTPProtocol = before
