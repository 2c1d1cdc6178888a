"""Ray Serve: an HTTP ingress and engine replicas, autoscaled on ongoing work.

A replica is ready once its model is verified, warmed up and self-tested. A request whose replica dies is asked again
with the same seed, so it comes to the same bytes.
"""

import asyncio
import logging
import os
import time
import urllib.request
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError

from pipeline.cluster.http import make_app
from pipeline.data import storage
from pipeline.model import Model, load
from pipeline.serving.ports import free_port, is_free
from pipeline.serving.requests import Refused, ServingConfig
from pipeline.serving.service import Identity, Service, refused

log = logging.getLogger("raydiffusion.serving")

APPLICATION = "raydiffusion"
ATTEMPTS = 3  # replicas a request may outlive, less one
ONGOING_FACTOR = (
    16  # requests that may be with a replica, in units of those it should have; its engine has the real budget
)
READY_TIMEOUT_S = 60.0


# --- a replica -------------------------------------------------------------------------------------------------------


class Replica:
    """One engine. Refusals are returned, not raised: Ray would wrap them."""

    def __init__(self, config: Mapping[str, Any], tracking_uri: str | None) -> None:
        settings = ServingConfig(**config)
        model, identity = _load(settings, tracking_uri)
        self.service = Service(model, settings, identity)

    async def describe(self) -> dict[str, Any]:
        return await self.service.describe()

    async def generate(self, fields: Mapping[str, Any], seed: int) -> dict[str, Any] | Refused:
        return await _told(lambda: self.service.generate(fields, seed))

    async def likelihood(self, fields: Mapping[str, Any], encoded: list[bytes], seed: int) -> dict[str, Any] | Refused:
        return await _told(lambda: self.service.likelihood(fields, encoded, seed))

    async def stream(self, fields: Mapping[str, Any], seed: int) -> AsyncGenerator[dict[str, Any] | Refused, None]:
        async with aclosing(self.service.stream(fields, seed)) as events:  # a cancellation may arrive at our own yield
            try:
                async for event in events:
                    yield event
            except Exception as error:
                yield _logged(error)

    async def status(self) -> dict[str, Any]:
        """The process, the model and the engine's load."""
        return {"process": os.getpid(), "model": await self.service.entry(), "load": asdict(self.service.engine.load())}

    def check_health(self) -> None:
        """Ray Serve replaces a replica whose check raises."""
        if not self.service.engine.alive:
            raise RuntimeError("the engine's worker has ended")

    def __del__(self) -> None:
        if hasattr(self, "service"):
            self.service.close(drain=False, timeout_s=5.0)


async def _told(ask: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any] | Refused:
    try:
        return await ask()
    except Exception as error:
        return _logged(error)


def _logged(error: Exception) -> Refused:
    no = refused(error)
    if no.status >= 500:
        log.error("a request failed", exc_info=error)
    return no


def _load(config: ServingConfig, tracking_uri: str | None) -> tuple[Model, Identity]:
    """The model that `config.model` names, on this replica's device, and what it is called."""
    import torch

    url = config.model
    if url is None:
        raise ValueError("serving.model names no model: give models:/NAME@alias or a model directory")
    device = "cuda" if config.gpus_per_replica > 0 and torch.cuda.is_available() else "cpu"
    if not url.startswith("models:/"):
        model = load(url, device)
        name = url.rstrip("/").rpartition("/")[2] or url
        return model, Identity(name, "", model.digest, (url,))
    from pipeline.tracking import registry

    version = registry.resolve(url, tracking_uri=tracking_uri)
    model = load(registry.fetch(f"models:/{version.name}/{version.version}", tracking_uri=tracking_uri), device)
    aliases = (url, url.removeprefix("models:/"), f"{version.name}/{version.version}")
    return model, Identity(version.name, str(version.version), model.digest, aliases)


# --- the ingress -----------------------------------------------------------------------------------------------------


class Replicas:
    """The backend of the HTTP application: engine replicas behind a handle."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    async def describe(self) -> dict[str, Any]:
        return await self._ask("describe")

    async def generate(self, fields: Mapping[str, Any], seed: int) -> dict[str, Any]:
        return await self._ask("generate", fields, seed)

    async def likelihood(self, fields: Mapping[str, Any], encoded: list[bytes], seed: int) -> dict[str, Any]:
        return await self._ask("likelihood", fields, encoded, seed)

    async def stream(self, fields: Mapping[str, Any], seed: int) -> AsyncGenerator[dict[str, Any], None]:
        """Events in order; where a replica dies, those already sent are made again and left out."""
        sent = 0
        for attempt in range(ATTEMPTS):
            passed = 0
            events = self.handle.options(stream=True).stream.remote(fields, seed)
            try:
                async for event in events:
                    if isinstance(event, Refused):
                        raise event
                    passed += 1
                    if passed > sent:
                        yield event
                        sent = passed
                return
            except (RayActorError, ReplicaUnavailableError) as error:
                _check_attempt(attempt, error)
            except BackPressureError as error:
                raise _overloaded(error) from error
            finally:
                events.cancel()  # of no effect on one that has ended

    async def _ask(self, method: str, *arguments: Any) -> dict[str, Any]:
        for attempt in range(ATTEMPTS):
            asked = getattr(self.handle, method).remote(*arguments)
            try:
                answer = await asked
            except asyncio.CancelledError:
                asked.cancel()
                raise
            except (RayActorError, ReplicaUnavailableError) as error:
                _check_attempt(attempt, error)
            except BackPressureError as error:
                raise _overloaded(error) from error
            else:
                if isinstance(answer, Refused):
                    raise answer
                return answer
        raise AssertionError("the last attempt either returned or raised")


def _check_attempt(attempt: int, error: Exception) -> None:
    log.warning("a replica died under a request (attempt %d): %s", attempt + 1, error)
    if attempt + 1 == ATTEMPTS:
        message = "the replicas died under this request; ask again with the same seed"
        raise Refused(message, 503, "not_available", retry_after_s=5.0) from error


def _overloaded(error: Exception) -> Refused:
    return Refused(f"too many requests wait for a replica: {error}", 429, "queue_full", retry_after_s=2.0)


@serve.ingress()
class Ingress:
    """The HTTP side. It holds no model: it reads, checks, asks a replica and answers."""

    def __init__(self, config: Mapping[str, Any], engines: Any) -> None:
        self.config, self.engines = ServingConfig(**config), engines

    def __serve_build_asgi_app__(self) -> Any:
        return make_app(Replicas(self.engines), self.config)


# --- deploying -------------------------------------------------------------------------------------------------------


def application(config: ServingConfig, tracking_uri: str | None = None) -> serve.Application:
    """The Serve application of a configuration, to run or to name in a declarative deployment."""
    model = _absolute(config.model) if config.model and not config.model.startswith("models:/") else config.model
    plain = asdict(replace(config, model=model))
    tracking_uri = None if tracking_uri is None else _absolute(tracking_uri, "sqlite:///")
    deployment: Any = serve.deployment
    engines = deployment(
        Replica,
        name="engine",
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
        max_ongoing_requests=max(64, int(ONGOING_FACTOR * config.requests_per_replica)),
        max_queued_requests=config.max_queued_requests,
        autoscaling_config=AutoscalingConfig(
            min_replicas=config.min_replicas,
            max_replicas=config.max_replicas,
            target_ongoing_requests=config.requests_per_replica,
            upscale_delay_s=5.0,
            downscale_delay_s=config.downscale_delay_s,
        ),
        graceful_shutdown_timeout_s=config.deadline_s,
        max_constructor_retry_count=2,
    ).bind(plain, tracking_uri)
    ingress = deployment(
        Ingress,
        name="ingress",
        ray_actor_options={"num_cpus": config.cpus_ingress},
        max_ongoing_requests=2 * config.max_queued_requests,
        graceful_shutdown_timeout_s=config.deadline_s,
    )
    return ingress.bind(plain, engines)


def deploy(config: ServingConfig, tracking_uri: str | None = None) -> str:
    """Serve `config.model` on the Ray cluster this process is connected to; returns the URL once a replica is ready.

    Raises:
        ValueError: no such model, a failed self-test, or a port that is taken.
    """
    if not ray.is_initialized():
        raise ValueError("deploy needs a Ray session: call it within pipeline.cluster.session.session()")
    _check_model(config, tracking_uri)
    running = APPLICATION in serve.status().applications if _serve_runs() else False
    port = config.port if config.port else free_port(config.host)
    if not running and not is_free(config.host, port):
        raise ValueError(f"serving.port {port} on {config.host} is taken: choose another, or 0 for any")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # what is going on, the caller says
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    location = "HeadOnly" if not config.key_hashes else "EveryNode"
    _start(location, {"host": config.host, "port": port}, quiet)
    try:
        serve.run(application(config, tracking_uri), name=APPLICATION, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        raise ValueError(f"the endpoint did not start: {_cause(error)}") from error
    shown = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    url = f"http://{shown}:{port}"
    _wait_until_ready(url)
    return url


def _start(location: str, http_options: dict[str, Any], logging_config: dict[str, Any]) -> None:
    """Start Ray Serve. On a busy machine its controller replaces a proxy that is slow to start, and `serve.start` takes
    that for a failure; asked again it finds the controller that is there. The new proxy is waited for at the end."""
    for attempt in range(ATTEMPTS):
        try:
            serve.start(location, http_options=http_options, logging_config=logging_config)
            return
        except RayActorError as error:
            if attempt + 1 == ATTEMPTS:
                raise ValueError(f"the HTTP proxy of Ray Serve does not start: {error}") from error
            log.warning("Ray Serve replaced a proxy that was slow to start")


def status(timeout_s: float = 30.0) -> list[dict[str, Any]]:
    """Process, model and load of a replica that answers.

    Raises:
        ValueError: nothing is served.
    """
    if not _serve_runs() or APPLICATION not in serve.status().applications:
        raise ValueError("nothing is served on this cluster: start it with jobs.serve")
    handle: Any = serve.get_deployment_handle("engine", APPLICATION)
    return [handle.status.remote().result(timeout_s=timeout_s)]


def shutdown() -> None:
    """End the endpoint and Ray Serve, all its replicas and proxies."""
    serve.shutdown()


def _absolute(url: str, prefix: str = "") -> str:
    """A local path, also one in an sqlite: URL, from the root: replicas have another working directory."""
    if not url.startswith(prefix) or "://" in url.removeprefix(prefix):
        return url
    return prefix + os.path.abspath(url.removeprefix(prefix))


def _check_model(config: ServingConfig, tracking_uri: str | None) -> None:
    """Raises ValueError or FileNotFoundError where there is no such model, before anything is started."""
    if config.model is None:
        raise ValueError("serving.model names no model: give models:/NAME@alias or a model directory")
    if config.model.startswith("models:/"):
        from pipeline.tracking import registry

        registry.resolve(config.model, tracking_uri=tracking_uri)
    elif not storage.exists(storage.join(config.model, "digests.json")):
        raise FileNotFoundError(f"no committed model at {config.model}")


def _serve_runs() -> bool:
    from ray.serve.exceptions import RayServeException

    try:
        serve.status()
    except RayServeException:
        return False
    return True


def _cause(error: RuntimeError) -> str:
    """Why a deployment failed: the last line of the replica's traceback, which Serve keeps in its status."""
    application = serve.status().applications.get(APPLICATION)
    messages = [d.message for d in application.deployments.values()] if application else []
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("ValueError:", "FileNotFoundError:", "OSError:"))]
    return (told or lines or [str(error)])[-1]


def _wait_until_ready(url: str) -> None:
    end = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                return
        except OSError as error:
            if time.monotonic() > end:
                raise ValueError(f"the endpoint at {url} does not answer: {error}") from error
            time.sleep(0.1)
