"""The models that one process holds: loaded when they are asked for, within a budget of bytes."""

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from pipeline.serving.refusals import Refused
from pipeline.serving.service import Service

log = logging.getLogger("raydiffusion.serving")

CLOSING_S = 5.0


class ModelCache:
    """Services by the exact URL of their model. A model that is in use stays; of the others the one that was used
    longest ago goes first when all of them pass `max_bytes`.

    open_service: builds the warmed-up, self-tested service of a URL; called in a thread, one at a time.
    """

    def __init__(self, open_service: Callable[[str], Service], max_bytes: int) -> None:
        self._open_service, self.max_bytes = open_service, max_bytes
        self._services: OrderedDict[str, Service] = OrderedDict()  # the newest use last
        self._users: Counter[str] = Counter()
        self._opening = asyncio.Lock()

    def load(self, url: str) -> None:
        """Load a model and wait for it: for what must be here before any request.

        Raises:
            ValueError: it cannot be loaded, or fails its self-test.
        """
        self._services[url] = self._open_service(url)

    @property
    def services(self) -> dict[str, Service]:
        """Those that are loaded, by URL."""
        return dict(self._services)

    @asynccontextmanager
    async def using(self, url: str) -> AsyncIterator[Service]:
        """The service of that model, loaded first where it is not here, and kept for as long as the block runs.

        Raises:
            ValueError: it cannot be loaded, or fails its self-test. Refused: no memory for it now.
        """
        self._users[url] += 1
        try:
            if url not in self._services:
                async with self._opening:
                    if url not in self._services:
                        await self._add(url)
            self._services.move_to_end(url)
            yield self._services[url]
        finally:
            self._users[url] -= 1
            if not self._users[url]:
                del self._users[url]

    async def _add(self, url: str) -> None:
        service = await asyncio.to_thread(self._open_service, url)
        others = [(each, held) for each, held in self._services.items() if not self._users[each]]
        held_bytes = sum(held.bytes for held in self._services.values())
        leaving: list[str] = []
        for each, held in others:
            if held_bytes + service.bytes <= self.max_bytes:
                break
            held_bytes -= held.bytes
            leaving.append(each)
        if held_bytes + service.bytes > self.max_bytes:
            await asyncio.to_thread(service.close, False, CLOSING_S)
            raise Refused(
                f"model {url} needs {service.bytes} bytes and {held_bytes} of {self.max_bytes} are in use "
                "(serving.max_model_bytes)",
                503,
                "not_available",
                retry_after_s=5.0,
            )
        self._services[url] = service
        for each in leaving:
            log.info("model %s leaves the memory of this replica", each)
            await asyncio.to_thread(self._services.pop(each).close, False, CLOSING_S)

    def close(self) -> None:
        """End every engine; what still runs fails."""
        for service in self._services.values():
            service.close(drain=False, timeout_s=CLOSING_S)
        self._services.clear()
