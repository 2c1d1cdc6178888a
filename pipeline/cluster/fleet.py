"""The backend of the HTTP application on a cluster: which model a request means, and replicas that answer.

A request is bound to one version of its model before it is asked. So a replica that dies under it changes nothing: it
is asked again of another one, with the same seed, and comes to the same bytes. An alias that moves in the registry
gets traffic only after every replica has loaded and tested what it names.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve._private.common import ReplicaState
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError

from pipeline.cluster.monitoring import IngressMetrics
from pipeline.cluster.replica import Pinned, pin
from pipeline.serving.config import ServingConfig
from pipeline.serving.refusals import Refused, unknown_model
from pipeline.serving.requests import Call, GenerationRequest

log = logging.getLogger("raydiffusion.serving")

CAUSES = ("ValueError:", "FileNotFoundError:", "OSError:", "PermissionError:", "RuntimeError:", "MemoryError:")
LOOK_S = 1.0  # between looks at the replicas while a request waits
PATIENCE = 0.9  # share of its deadline that a request waits for a replica to start
LATE_S = 5.0  # what a replica has beyond the deadline to say so itself
RETRY_S = 10.0
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
        self.warnings: dict[str, str] = {}  # by source: what is amiss with it in the registry
        self._looked: tuple[float, tuple[int, str]] = (0.0, (1, ""))  # when, and what was found
        self._watching: asyncio.Task[None] | None = None

    # --- what the HTTP side asks --------------------------------------------------------------------------------------

    async def models(self) -> list[dict[str, Any]]:
        """The served models as `GET /v1/models` lists them."""
        self._watch()
        return [self._entry(each) for each in self.pinned.values()]

    async def describe(self, model: str | None = None) -> dict[str, Any]:
        pinned = self._meant(model)
        facts = await self._ask("describe", pinned)
        return {**facts, **self._notes(pinned)}

    async def answer(self, asked: Call) -> dict[str, Any]:
        return await self._ask("answer", *self._bound(asked))

    async def price(self, asked: Call) -> int:
        return await self._ask("price", *self._bound(asked))

    async def stream(self, asked: GenerationRequest) -> AsyncGenerator[dict[str, Any], None]:
        """Events in order; where a replica dies, those already sent are made again and left out."""
        bound = self._bound(asked)
        sent, started = 0, time.monotonic()
        for attempt in range(ATTEMPTS):
            passed = 0
            events = self.handle.options(stream=True).stream.remote(*bound)
            try:
                event = await self._in_time(anext(aiter(events), None), started)
                while event is not None:
                    if isinstance(event, Refused):
                        raise event
                    passed += 1
                    if passed > sent:
                        yield event
                        sent = passed
                    event = await anext(events, None)
                return
            except (RayActorError, ReplicaUnavailableError) as error:
                _check_attempt(attempt, error)
            except BackPressureError as error:
                raise _overloaded(error) from error
            finally:
                events.cancel()  # of no effect on one that has ended

    async def _ask(self, method: str, *arguments: Any) -> Any:
        started = time.monotonic()
        for attempt in range(ATTEMPTS):
            asked = getattr(self.handle, method).remote(*arguments)
            try:
                answer = await self._in_time(asked, started)
            except (asyncio.CancelledError, Refused):
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

    async def _in_time(self, asked: Awaitable[Any], started: float) -> Any:
        """What a replica answers, awaited from outside so that the wait has an end: where no replica runs the refusal
        comes at once when none can start, else before the deadline; where one runs, its own deadline speaks first."""
        task = asyncio.ensure_future(_awaited(asked))
        try:
            while not (await asyncio.wait({task}, timeout=LOOK_S))[0]:
                waited, deadline_s = time.monotonic() - started, self.config.deadline_s
                running, cause = await self._replicas()
                if not running and (cause or waited > PATIENCE * deadline_s):
                    raise Refused(_no_replica(cause), 503, "not_available", retry_after_s=RETRY_S)
                if waited > deadline_s + LATE_S:
                    raise Refused(f"no answer within {deadline_s:g} s", 504, "deadline_exceeded")
            return task.result()
        finally:
            task.cancel()

    async def _replicas(self) -> tuple[int, str]:
        """How many engine replicas run, and why the others do not start, '' where Ray Serve knows no reason. Asked of
        its controller at most once in `LOOK_S`, whoever waits."""
        now = time.monotonic()
        if now - self._looked[0] >= LOOK_S:
            self._looked = now, self._looked[1]
            self._looked = now, await asyncio.to_thread(_engines, self.handle.app_name, self.handle.deployment_name)
        return self._looked[1]

    # --- which model --------------------------------------------------------------------------------------------------

    def _meant(self, name: str | None) -> Pinned:
        self._watch()
        for pinned in self.pinned.values():
            if pinned.identity.answers_to(name):
                return pinned
        raise unknown_model(name, [each.identity.id for each in self.pinned.values()])

    def _bound(self, asked: Call) -> tuple[Pinned, Call]:
        """The version that a request means, and the request without the name it gave: a replica may know another."""
        return self._meant(asked.model), asked.model_copy(update={"model": None})

    def _entry(self, pinned: Pinned) -> dict[str, Any]:
        return {**pinned.identity.entry(), **self._notes(pinned)}

    def _notes(self, pinned: Pinned) -> dict[str, Any]:
        return {"rejected_version": self.rejected.get(pinned.source), "warning": self.warnings.get(pinned.source)}

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
        found = await self._named(source) if "@" in source else held
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

    async def _named(self, source: str) -> Pinned:
        """What an alias names now; where it was deleted, what it named last, and the list of models says so."""
        held = self.pinned[source]
        try:
            found = await asyncio.to_thread(pin, source, self.tracking_uri)
        except Exception as error:
            if not _is_gone(error):
                raise
            self.warnings[source] = f"{source} is not in the registry any more; {held.url} stays until it is"
            log.warning("model %s: %s", source, error)
            return held
        self.warnings.pop(source, None)
        return found

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


def _is_gone(error: Exception) -> bool:
    from pipeline.tracking.registry import Gone  # imports MLflow, which an endpoint of model folders does not need

    return isinstance(error, Gone)


async def _awaited(asked: Awaitable[Any]) -> Any:
    return await asked


def _engines(application: str, deployment: str) -> tuple[int, str]:
    told = serve.status().applications[application].deployments[deployment]
    running = sum(count for state, count in told.replica_states.items() if state == ReplicaState.RUNNING)
    return running, cause_in(told.message)


def cause_in(message: str) -> str:
    """The error in what Ray Serve says of replicas that do not start: the last line of a traceback, or ''."""
    lines = [line.strip() for line in message.splitlines()]
    return next((line for line in reversed(lines) if line.startswith(CAUSES)), "")


def _no_replica(cause: str) -> str:
    return f"no replica of the model is ready: {cause or 'none has started yet'}"


def _check_attempt(attempt: int, error: Exception) -> None:
    log.warning("a replica died under a request (attempt %d): %s", attempt + 1, error)
    if attempt + 1 == ATTEMPTS:
        message = "the replicas died under this request; ask again with the same seed"
        raise Refused(message, 503, "not_available", retry_after_s=5.0) from error


def _overloaded(error: Exception) -> Refused:
    return Refused(f"too many requests wait for a replica: {error}", 429, "queue_full", retry_after_s=2.0)
