"""An endpoint without keys, asked from another machine: it answers probes with a bare status, and nothing else."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from pipeline.model import load
from pipeline.serving.config import ServingConfig
from tests.faults.endpoint import Endpoint, serving
from tests.faults.netns import HERE, MISSING, Neighbour, neighbour, possible
from tests.faults.strange_requests import CLIENT, as_argument, requests
from tests.serving.tiny import save_tiny

PROBES = ("/healthz", "/readyz")
KEY = "open sesame"


@pytest.fixture(scope="module")
def there() -> Iterator[Neighbour]:
    if not possible():
        pytest.skip(MISSING)
    with neighbour() as made:
        yield made


@pytest.fixture(params=[False, True], ids=["as it is", "with FORWARDED_ALLOW_IPS=*"])
def endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Endpoint]:
    """Listening on every address, as `http_options.host: 0.0.0.0` would have it, with no keys."""
    if request.param:
        monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")  # then the server itself believes X-Forwarded-For
    save_tiny(str(tmp_path / "tiny"))
    with serving(load(str(tmp_path / "tiny")), ServingConfig(model="tiny"), host="0.0.0.0") as made:
        yield made


def ask(there: Neighbour, port: int, asked: list[tuple[str, str, dict[str, str]]]) -> list[tuple[int, str]]:
    told = json.loads(there.python(CLIENT, HERE, str(port), as_argument(asked)))
    return [(status, body) for status, body in told]


def test_no_header_lets_another_machine_in(endpoint: Endpoint, there: Neighbour) -> None:
    asked = requests()
    answers = ask(there, endpoint.port, asked)
    let_in = [(each, status, body[:100]) for each, (status, body) in zip(asked, answers, strict=True) if status != 403]
    assert not let_in
    assert all(json.loads(body)["error"]["code"] == "forbidden" for _, body in answers)
    print(f"{len(asked)} requests of another machine: all 403")
    assert httpx.get(f"{endpoint.url}/v1/models").status_code == 200  # and this one is served


def test_probes_answer_anybody_with_a_bare_status(endpoint: Endpoint, there: Neighbour) -> None:
    asked = [("GET", path, {"Host": host}) for path in PROBES for host in ("localhost", HERE, "pod-7.ns.svc")]
    assert ask(there, endpoint.port, asked) == [(200, "")] * len(asked)
    assert httpx.get(f"{endpoint.url}/readyz").json()["status"] == "ready"  # here with its facts
    endpoint.service.close()
    answers = ask(there, endpoint.port, asked)
    assert answers == [(200, "")] * 3 + [(200, "")] * 3 or all(body == "" for _, body in answers)


@pytest.mark.parametrize("listening", ["0.0.0.0", "127.0.0.1"])
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_serve_on_every_address_is_refused_without_keys(tmp_path: Path, there: Neighbour, listening: str) -> None:
    save_tiny(str(tmp_path / "tiny"))
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "FORWARDED_ALLOW_IPS": "*"}
    command = [sys.executable, "-m", "tests.faults.open_endpoint", str(tmp_path / "tiny"), listening, KEY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as driver:
        assert driver.stdout is not None
        assert driver.stdin is not None

        def told() -> str:
            assert driver.stdout is not None
            for line in driver.stdout:
                if line.startswith("told: "):
                    return line.removeprefix("told: ").strip()
            raise AssertionError("the driver ended")

        refused, port = told(), int(told())
        try:
            if listening == "127.0.0.1":
                assert refused == "deployed"
                return
            assert "which others can reach: set serving.key_hashes" in refused
            asked = requests()
            answers = ask(there, port, asked)  # the guard alone: the driver has deployed past the refusal
            assert not [pair for pair in zip(asked, answers, strict=True) if pair[1][0] != 403]
            probes = [("GET", path, {"Host": HERE}) for path in PROBES]
            assert ask(there, port, probes) == [(200, ""), (200, "")]
            assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 200
            driver.stdin.write("keys\n")
            driver.stdin.flush()
            assert told() == "deployed"
            key = {"Host": HERE, "Authorization": f"Bearer {KEY}"}
            told_keys = ask(there, port, [("GET", "/v1/models", {"Host": HERE}), ("GET", "/v1/models", key)])
            assert [status for status, _ in told_keys] == [401, 200]
        finally:
            driver.stdin.close()
            driver.wait(120)


def test_keys_open_the_endpoint_and_its_reasons(endpoint: Endpoint, there: Neighbour, tmp_path: Path) -> None:
    hashes = (hashlib.sha256(KEY.encode()).hexdigest(),)
    config = replace(endpoint.service.config, key_hashes=hashes, host="0.0.0.0")
    with serving(endpoint.service.model, config, host="0.0.0.0") as keyed:
        key = {"Host": "gpu.example", "Authorization": f"Bearer {KEY}"}
        wrong = {**key, "Authorization": "Bearer no"}
        asked = [("GET", path, headers) for path in ("/v1/models", "/readyz") for headers in (key, wrong)]
        answers = ask(there, keyed.port, asked)
    assert [status for status, _ in answers] == [200, 401, 200, 200]
    assert [bool(body) for _, body in answers[2:]] == [True, False]
