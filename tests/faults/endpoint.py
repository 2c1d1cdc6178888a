"""The HTTP application over a real service, by uvicorn on a free port of loopback, in a thread of this process."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from pipeline.model import Model
from pipeline.serving.config import ServingConfig
from pipeline.serving.ports import free_port
from pipeline.serving.service import Identity, Service
from pipeline.web.app import make_app


@dataclass(frozen=True)
class Endpoint:
    """What runs, and where."""

    host: str
    port: int
    service: Service
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def alive(self) -> bool:
        return self.thread.is_alive() and self.service.engine.alive


@contextmanager
def serving(model: Model, config: ServingConfig, host: str = "127.0.0.1") -> Iterator[Endpoint]:
    service = Service(model, config, Identity("tiny", "1", model.digest))
    port = free_port(host)
    options = uvicorn.Config(make_app(service, config), host=host, port=port, log_level="critical", lifespan="off")
    server = uvicorn.Server(options)
    thread = threading.Thread(target=server.run, name="uvicorn", daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < end
        time.sleep(0.01)
    try:
        yield Endpoint("127.0.0.1", port, service, thread)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)
        service.close(drain=False, timeout_s=20)
