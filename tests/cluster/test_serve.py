"""Ray Serve on this machine: one deployment asked by real clients, cancellation, and how it fails and ends."""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from pipeline.data.formats.codecs import decode, encode_png
from pipeline.serving.config import ServingConfig
from tests.cluster.endpoints import GENERATE, SCORE, Registry, import_serve, until
from tests.serving.tiny import save_tiny


@pytest.fixture(scope="module")
def client(endpoint: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=endpoint, timeout=60) as made:
        yield made


def test_the_openai_client_makes_images(endpoint: str) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{endpoint}/v1", api_key="none", max_retries=0)
    assert [(model.id, abs(model.created - time.time()) < 3600) for model in client.models.list()] == [("digits", True)]
    answer = client.images.generate(
        model="digits", prompt="3", n=2, size="auto", response_format="b64_json", extra_body={"steps": 4, "seed": 5}
    )
    assert answer.data is not None
    images = [decode(base64.b64decode(item.b64_json or ""), 1) for item in answer.data]
    assert [image.shape for image in images] == [(8, 8, 1)] * 2
    kinds: list[str] = []
    last = ""
    for event in client.images.generate(
        model="digits", prompt="3", n=2, stream=True, extra_body={"steps": 4, "seed": 5}
    ):
        kinds.append(event.type)
        last = event.b64_json
    assert kinds[-1] == "image_generation.completed"
    assert len(kinds) == 8  # Heun's 7 evaluations
    assert last == answer.data[0].b64_json
    with pytest.raises(openai.BadRequestError, match="the prompt must be the name or number of a class"):
        client.images.generate(model="digits", prompt="a cat")


def test_curl_scores_a_file(endpoint: str, tmp_path: Path, client: httpx.Client) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 1), dtype=np.uint8)
    (tmp_path / "image.png").write_bytes(encode_png(image))
    command = ["curl", "-s", f"{endpoint}{SCORE}", "-F", f"images=@{tmp_path}/image.png", "-F", 'options={"levels": 8}']
    if shutil.which("curl") is None:
        pytest.skip("needs curl: apt-get install curl")
    told = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    encoded = base64.b64encode(encode_png(image)).decode()
    as_json = client.post(SCORE, json={"images": [encoded], "options": {"levels": 8}}).json()
    assert json.loads(told)["data"] == as_json["data"]


def test_many_requests_at_once_have_the_bytes_of_each_alone(client: httpx.Client) -> None:
    samplers = ["heun", "ddim", "ancestral", "dpmpp_2m"]
    asked = [
        {
            "n": 1 + index % 3,
            "seed": index,
            "labels": index % 10,
            "sampler": samplers[index % 4],
            "steps": 3 + index % 5,
        }
        for index in range(24)
    ]

    def data(fields: dict[str, Any]) -> Any:
        answer = client.post(GENERATE, json=fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    alone = [data(fields) for fields in asked[:8]]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(data, asked))
    assert together[:8] == alone


def status() -> dict[str, Any]:
    """Process of the only replica, and load of its only model."""
    (replica,) = import_serve().status()
    return {"process": replica["process"], **replica["models"][0]}


@pytest.mark.parametrize("stream", [False, True])
def test_a_closed_connection_ends_its_work(endpoint: str, stream: bool) -> None:
    before = status()["load"]["cancelled"]
    fields = {"n": 1, "steps": 30_000, "sampler": "ddim", "stream": stream, "partial_images": 1000}
    body = json.dumps(fields).encode()
    address = endpoint.removeprefix("http://")
    host, _, port = address.partition(":")
    head = f"POST {GENERATE} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
        until(lambda: status()["load"]["live"] == 1)
        if stream:
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
    until(lambda: status()["load"]["cancelled"] == before + 1)
    assert status()["load"]["live"] == 0  # counted when it was over


def test_the_gate_stands_in_the_proxy(endpoint: str) -> None:
    host, _, port = endpoint.removeprefix("http://").partition(":")
    head = f"POST {GENERATE} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n".encode()
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head + b"x-request-id: \xff\r\ncontent-length: 12\r\n\r\n" + b'{"steps": 2}')
        assert connection.recv(12) == b"HTTP/1.1 400"  # Ray's own proxy fails: 500


def test_a_request_outlives_its_replica(client: httpx.Client) -> None:
    fields = {"n": 2, "seed": 9, "steps": 400, "sampler": "ddim"}
    expected = client.post(GENERATE, json=fields).json()["data"]
    process = status()["process"]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, GENERATE, json=fields, timeout=120)
        until(lambda: status()["load"]["live"] == 1)
        os.kill(process, signal.SIGKILL)
        assert answer.result(120).status_code == 200, answer.result().text
    assert answer.result().json()["data"] == expected
    assert status()["process"] != process


def test_a_missing_model_is_told_in_one_line(endpoint: str) -> None:
    serve = import_serve()
    with pytest.raises(ValueError, match="names no model"):
        serve.deploy(ServingConfig())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        serve.deploy(ServingConfig(model="/nowhere/at/all", port=0))


def test_replicas_get_paths_that_hold_anywhere(tmp_path: Path) -> None:
    serve, root = import_serve(), str(tmp_path)
    assert serve._absolute("runs/model", root) == f"{root}/runs/model"
    assert serve._absolute("s3://bucket/model", root) == "s3://bucket/model"
    assert (
        serve._absolute("sqlite:///artifacts/mlflow.db", root, "sqlite:///") == f"sqlite:///{root}/artifacts/mlflow.db"
    )
    assert serve._absolute("http://mlflow:5000", root, "sqlite:///") == "http://mlflow:5000"


def test_a_declarative_deployment_says_at_once_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve = import_serve()
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    for args, told in (
        ({}, "args of the Serve config file need run_file"),
        ({"run_file": "mine.yaml"}, f"no run file mine.yaml on this node: looked from {tmp_path} and from /"),
        (
            {"run_file": "jobs/configs/digits.yaml", "overrides": ["tracking.uri=sqlite:///not/here.db"]},
            r"no registry at /.*/not/here\.db \(tracking\.uri\), so no model models:/.*@champion: train and register",
        ),
        (
            {"run_file": "jobs/configs/digits.yaml", "overrides": ["serving.model=nowhere/at/all"]},
            "no committed model at /.*/nowhere/at/all",
        ),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=told):
            serve.build(args)
    assert time.monotonic() - started < 5
    assert not list(tmp_path.iterdir())  # no empty database left behind


def test_a_registered_model_is_pinned_to_its_version(registry: Registry) -> None:
    import_serve()
    from pipeline.cluster.replica import pin
    from pipeline.tracking.registry import resolve

    pinned = pin("models:/digits@champion", registry.uri)
    assert (pinned.source, pinned.url) == ("models:/digits@champion", "models:/digits/1")
    digest = resolve("models:/digits/1", tracking_uri=registry.uri).digest
    assert (pinned.identity.id, pinned.identity.version, pinned.identity.digest) == ("digits", "1", digest)
    assert set(pinned.identity.aliases) == {"models:/digits@champion", "digits@champion", "digits/1"}


def test_the_status_names_process_version_and_load(endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    import_serve()
    from jobs.serve import show

    show()
    told = capsys.readouterr().out
    assert str(status()["process"]) in told
    assert "digits" in told
    assert "owed" in told


ENDED = """
import sys
from pipeline.cluster.session import session
from pipeline.serving.config import ServingConfig
from pipeline.serving.ports import free_port

with session(cpus=2):
    from pipeline.cluster import serve

    for _ in range(2):  # what this process kept of the first must not be in the way of the second
        serve.deploy(ServingConfig(model=sys.argv[1], kept_models=sys.argv[2], port=free_port("127.0.0.1")))
        serve.shutdown()
    serve.shutdown()  # of nothing
print("ended")
"""


@pytest.mark.slow
def test_an_endpoint_ends_without_a_word_from_ray(tmp_path: Path) -> None:
    save_tiny(str(tmp_path / "model"), 0)
    command = [sys.executable, "-W", "ignore", "-c", ENDED, str(tmp_path / "model"), str(tmp_path / "kept")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert (ended.returncode, ended.stdout) == (0, "ended\n"), ended
    assert "shutdown" not in ended.stderr
