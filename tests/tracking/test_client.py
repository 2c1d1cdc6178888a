"""Whom a server with users lets in. It stands in for MLflow's with one address; the real one is in tests/infra."""

import base64
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import mlflow
import pytest

from pipeline.tracking import client

USER = "Basic " + base64.b64encode(b"ann:secret").decode()


class Guarded(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        host = self.headers.get("Host", "").startswith("127.0.0.1")
        self.send_response(403 if not host else 200 if self.headers.get("Authorization") == USER else 401)
        self.end_headers()
        self.wfile.write(mlflow.__version__.encode())  # pyright: ignore[reportPrivateImportUsage]

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def port() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), Guarded)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_user_of_the_environment_is_let_in(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    client._answers(f"http://127.0.0.1:{port}")
    with pytest.raises(ValueError, match=re.escape("403")) as refused:
        client._answers(f"http://localhost:{port}")
    assert "--allowed-hosts" in str(refused.value)


@pytest.mark.parametrize("password", ["", "wrong"])
def test_who_is_not_is_told_what_to_set(port: int, password: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    with pytest.raises(ValueError, match="set MLFLOW_TRACKING_USERNAME") as refused:
        client._answers(f"http://127.0.0.1:{port}")
    assert not isinstance(refused.value, client.Away)  # else a run that goes on would start without it
    assert "secret" not in str(refused.value)
