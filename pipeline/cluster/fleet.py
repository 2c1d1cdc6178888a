"""The backend of the HTTP application on a cluster: which model a request means, and replicas that answer.

A request is bound to one version of its model before it is asked. So a replica that dies under it changes nothing: it
is asked again of another one, with the same seed, and comes to the same bytes. An alias that moves in the registry
gets traffic only after every replica has loaded and tested what it names.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError

from pipeline.cluster.monitoring import IngressMetrics
from pipeline.cluster.replica import Pinned, pin
from pipeline.serving.config import ServingConfig
from pipeline.serving.refusals import Refused, unknown_model

log = logging.getLogger("raydiffusion.serving")

ATTEMPTS = 3  # replicas a request may outlive, less one
PREPARE_TIMEOUT_S = 300.0


class Fleet:
    """Engine replicas behind a Ray Serve handle, and the models they serve, the default one first."""

    def __init__(
        self,
        handle: Any,
        config: ServingConfig,
        models: list[Pinned],
        tracking_uri: str | None,
        metrics: IngressMetrics,
    ) -> None:
        self.handle, self.config, self.tracking_uri, self.metrics = handle, config, tracking_uri, metrics
        self.pinned = {each.source: each for each in models}
        self.rejected: dict[str, dict[str, Any]] = {}  # by source: the newest version that got no traffic, and why
        self._watching: asyncio.Task[None] | None = None

    # --- what the HTTP side asks --------------------------------------------------------------------------------------

    async def models(self) -> list[dict[str, Any]]:
        """The served models as `GET /v1/models` lists them."""
        self._watch()
        return [self._entry(each) for each in self.pinned.values()]

    async def describe(self, model: str | None = None) -> dict[str, Any]:
        pinned = self._meant(model)
        facts = await self._ask("describe", pinned)
        return {**facts, "rejected_version": self.rejected.get(pinned.source)}

    async def generate(self, fields: Mapping[str, Any], seed: int) -> dict[str, Any]:
        return await self._ask("generate", self._meant(fields.get("model")), _asked(fields), seed)

    async def likelihood(self, fields: Mapping[str, Any], encoded: list[bytes], seed: int) -> dict[str, Any]:
        return await self._ask("likelihood", self._meant(fields.get("model")), _asked(fields), encoded, seed)

    async def encode(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return await self._ask("encode", self._meant(fields.get("model")), _asked(fields))

    async def price(self, method: str, fields: Mapping[str, Any], *arguments: Any) -> int:
        """Cost units that the call of that name is expected to take."""
        pinned = self._meant(fields.get("model"))
        return await self._ask("price", pinned, method, _asked(fields), *arguments)

    async def stream(self, fields: Mapping[str, Any], seed: int) -> AsyncGenerator[dict[str, Any], None]:
        """Events in order; where a replica dies, those already sent are made again and left out."""
        pinned = self._meant(fields.get("model"))
        sent = 0
        for attempt in range(ATTEMPTS):
            passed = 0
            events = self.handle.options(stream=True).stream.remote(pinned, _asked(fields), seed)
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

    async def _ask(self, method: str, *arguments: Any) -> Any:
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

    # --- which model --------------------------------------------------------------------------------------------------

    def _meant(self, name: str | None) -> Pinned:
        self._watch()
        for pinned in self.pinned.values():
            if pinned.identity.answers_to(name):
                return pinned
        raise unknown_model(name, [each.identity.id for each in self.pinned.values()])

    def _entry(self, pinned: Pinned) -> dict[str, Any]:
        return {**pinned.identity.entry(), "rejected_version": self.rejected.get(pinned.source)}

    # --- following the registry ---------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Watching begins with the first request: before it there is no event loop of Ray Serve's to do it in."""
        if self._watching is None:
            self._watching = asyncio.get_running_loop().create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            for source in list(self.pinned):
                try:
                    await self._look(source)
                except Exception as error:  # whatever it was, the next look may succeed; no replicas now, for one
                    log.warning("model %s: the registry or the replicas could not be asked: %r", source, error)
            await asyncio.sleep(self.config.watch_s)

    async def _look(self, source: str) -> None:
        """Follow `source` where it has moved; warm up replicas that have come since the last look."""
        held = self.pinned[source]
        found = await asyncio.to_thread(pin, source, self.tracking_uri) if "@" in source else held
        if found.url == self.rejected.get(source, {}).get("url"):
            found = held
        broken = await self._prepare(found) if found != held or held is next(iter(self.pinned.values())) else None
        if found == held:
            if broken is not None:
                log.error("model %s cannot be loaded by a replica: %s", found.url, broken)
            return
        if broken is None:
            self.pinned[source] = found
            self.rejected.pop(source, None)
            log.info("model %s: %s has the traffic, after %s", source, found.url, held.url)
        else:
            self.rejected[source] = {"url": found.url, "version": found.identity.version, "reason": broken}
            log.error("model %s: %s gets no traffic, %s keeps it: %s", source, found.url, held.url, broken)
        self.metrics.swapped(found.identity.id, broken is None)

    async def _prepare(self, pinned: Pinned) -> str | None:
        """Have every replica load and test a version; why one of them refused, or None. A replica that died is no
        verdict on the model: it is asked again at the next look."""
        answers = self.handle.broadcast("prepare", pinned)
        told = await answers.results_async(timeout_s=PREPARE_TIMEOUT_S, return_exceptions=True)
        for answer in told:
            if isinstance(answer, Refused):
                return str(answer)
            if isinstance(answer, Exception):
                raise answer
        return None


def _asked(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "model"}


def _check_attempt(attempt: int, error: Exception) -> None:
    log.warning("a replica died under a request (attempt %d): %s", attempt + 1, error)
    if attempt + 1 == ATTEMPTS:
        message = "the replicas died under this request; ask again with the same seed"
        raise Refused(message, 503, "not_available", retry_after_s=5.0) from error


def _overloaded(error: Exception) -> Refused:
    return Refused(f"too many requests wait for a replica: {error}", 429, "queue_full", retry_after_s=2.0)
