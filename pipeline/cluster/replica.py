"""An engine replica of Ray Serve: the models it holds, and the calls that an ingress makes of it."""

import hashlib
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from pipeline import storage
from pipeline.cluster import monitoring, weights
from pipeline.serving import logs
from pipeline.serving.config import ServingConfig
from pipeline.serving.model_cache import ModelCache
from pipeline.serving.refusals import Refused, refused
from pipeline.serving.requests import Call, GenerationRequest
from pipeline.serving.service import Identity, Service

T = TypeVar("T")

log = logging.getLogger("raydiffusion.serving")


@dataclass(frozen=True)
class Pinned:
    """A served model as it is now: `source` is the URL of the run file, `url` names what it stands for and never
    changes: models:/NAME/VERSION, or a model directory."""

    source: str
    url: str
    identity: Identity


def pin(source: str, tracking_uri: str | None) -> Pinned:
    """What `source` names now.

    Raises:
        ValueError, FileNotFoundError: no such model.
    """
    if not source.startswith("models:/"):
        digests = storage.join(source, "digests.json")
        if not storage.exists(digests):
            raise FileNotFoundError(f"no committed model at {source}")
        name = source.rstrip("/").rpartition("/")[2] or source
        digest = hashlib.sha256(storage.read_bytes(digests)).hexdigest()
        return Pinned(source, source, Identity(name, "", digest, (source,)))
    from pipeline.tracking import registry

    weights.must_exist(source, tracking_uri)
    version = registry.resolve(source, tracking_uri=tracking_uri)
    aliases = (source, source.removeprefix("models:/"), f"{version.name}/{version.version}")
    return Pinned(source, version.url, Identity(version.name, str(version.version), version.digest, aliases))


class Replica:
    """Engines of the models in use. Refusals are returned, not raised: Ray would wrap them.

    models: what is served, the first loaded before the replica is ready.
    """

    def __init__(self, config: Mapping[str, Any], models: list[Pinned], tracking_uri: str | None) -> None:
        self.settings, self.tracking_uri = ServingConfig(**config), tracking_uri
        self.known = {pinned.url: pinned for pinned in models}
        logs.to_stderr()
        self.metrics = monitoring.ReplicaMetrics()
        self.shelf = ModelCache(self._open, self.settings.max_model_bytes)
        self.shelf.load(models[0].url)

    def _open(self, url: str) -> Service:
        """The model on this replica's device, ready to be asked."""
        import torch

        pinned, settings = self.known[url], self.settings
        device = "cuda" if settings.gpus_per_replica > 0 and torch.cuda.is_available() else "cpu"
        folder = weights.folder_of(settings.kept_models)
        model = weights.load(url, pinned.identity.digest, device, self.tracking_uri, folder, settings.max_kept_bytes)
        return Service(model, settings, replace(pinned.identity, digest=model.digest))

    @asynccontextmanager
    async def _service(self, pinned: Pinned) -> AsyncIterator[Service]:
        self.known[pinned.url] = pinned
        async with self.shelf.using(pinned.url) as service:
            yield service

    async def prepare(self, pinned: Pinned) -> dict[str, Any] | Refused:
        """Load, warm up and test a model that is to get traffic."""
        try:
            async with self._service(pinned) as service:
                return await service.entry()
        except Exception as error:
            return refused(error)

    async def describe(self, pinned: Pinned) -> dict[str, Any] | Refused:
        return await self._told(pinned, lambda service: service.describe())

    async def answer(self, pinned: Pinned, asked: Call) -> dict[str, Any] | Refused:
        return await self._told(pinned, lambda service: service.answer(asked))

    async def price(self, pinned: Pinned, asked: Call) -> int | Refused:
        return await self._told(pinned, lambda service: service.price(asked))

    async def _told(self, pinned: Pinned, ask: Callable[[Service], Awaitable[T]]) -> T | Refused:
        try:
            async with self._service(pinned) as service:
                return await ask(service)
        except Exception as error:
            return _logged(error)

    async def stream(self, pinned: Pinned, asked: GenerationRequest) -> AsyncGenerator[dict[str, Any] | Refused, None]:
        async with AsyncExitStack() as stack:  # a cancellation may arrive at our own yield
            try:
                service = await stack.enter_async_context(self._service(pinned))
                events = service.stream(asked)
                stack.push_async_callback(events.aclose)
                async for event in events:
                    yield event
            except Exception as error:
                yield _logged(error)

    async def status(self) -> dict[str, Any]:
        """The process, and each model it holds with its engine's load."""
        held = self.shelf.services.values()
        models = [{**await each.entry(), "load": asdict(each.engine.load())} for each in held]
        return {"process": os.getpid(), "models": models}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Read by Ray Serve for `autoscaling.by_owed_work`; the Prometheus metrics are brought up to date as well."""
        loads = {each.identity.id: each.engine.load() for each in self.shelf.services.values()}
        self.metrics.update(loads)
        return {"owed_s": sum(load.queued_cost / load.rows_per_s for load in loads.values())}

    async def check_health(self) -> None:
        """Ray Serve replaces a replica whose check raises."""
        for service in self.shelf.services.values():
            if not service.engine.alive:
                raise RuntimeError(f"the engine of {service.identity.id} has ended")

    def __del__(self) -> None:
        if hasattr(self, "shelf"):
            self.shelf.close()


def _logged(error: Exception) -> Refused:
    no = refused(error)
    if no.status == 500:
        log.error("a request failed", exc_info=error)
    return no
