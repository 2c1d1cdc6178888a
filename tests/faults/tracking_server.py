"""A real MLflow server that can be killed and whose disk can be filled, behind a proxy that can answer 500 or hang."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from pipeline.serving.ports import free_port

START_S = 180.0
ERROR = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
QUOTA = 8 << 20  # of the disk that holds the server's database


class Server:
    """`mlflow server` on a database and a folder of its own; `start` and `kill` as often as one likes."""

    def __init__(self, disk: Path) -> None:
        self.disk, self.port = disk, free_port("127.0.0.1")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        store = [
            "--backend-store-uri",
            f"sqlite:///{self.disk}/mlflow.db",
            "--artifacts-destination",
            f"{self.disk}/files",
        ]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.disk.parent / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *store, "--workers", "1"], env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            assert time.monotonic() < deadline, "the MLflow server does not start"
            time.sleep(0.5)

    def kill(self) -> None:
        """SIGKILL to the server and its worker processes."""
        assert self.process is not None
        os.killpg(self.process.pid, 9)
        self.process.wait()

    def fill(self) -> None:
        with contextlib.suppress(OSError), (self.disk / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def empty(self) -> None:
        (self.disk / "ballast").unlink()


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """A file system of QUOTA bytes; needs root."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={QUOTA}", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


class Proxy:
    """Passes connections on to a port; `mode` 'error' answers 500, 'hang' never answers. `counts`: pieces of requests
    that were treated so.
    """

    def __init__(self, target: int) -> None:
        self.target, self.mode = target, "pass"
        self.counts = {"pass": 0, "error": 0, "hang": 0}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._closed = threading.Event()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.target)) as server:
            threading.Thread(target=_copy, args=(server, client), daemon=True).start()
            while data := client.recv(65536):
                mode = self.mode
                self.counts[mode] += 1
                if mode == "error":
                    client.sendall(
                        b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                    )
                    return
                if mode == "hang":
                    self._closed.wait()
                    return
                server.sendall(data)

    def close(self) -> None:
        self._listener.close()
        self._closed.set()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
