"""Server-sent events: what a stream sends, where a broken one goes on, and its end when the client leaves."""

import contextlib
import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from pipeline.serving.refusals import RequestError, refused
from pipeline.serving.requests import GenerationRequest
from pipeline.web.gateway import Gateway

log = logging.getLogger("raydiffusion.serving")


def last_event(request: Request, asked: GenerationRequest) -> int:
    """The evaluation of the last event that the client has, 0 where it has none."""
    given = request.headers.get("last-event-id", "")
    if not given:
        return 0
    if not (given.isascii() and given.isdigit() and len(given) <= 9):
        raise RequestError("Last-Event-ID must be the id of an event: a whole number", "Last-Event-ID")
    if not asked.stream or asked.seed is None:
        raise RequestError("Last-Event-ID goes with a stream and the seed of the first answer", "Last-Event-ID")
    return int(given)


class EventStream(StreamingResponse):
    """Closes what it streams when it ends, however it ends: a client may leave while an event is being sent."""

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self.events):
            await super().__call__(scope, receive, send)


async def unseen(events: AsyncGenerator[dict[str, Any], None], evaluation: int) -> AsyncGenerator[dict[str, Any], None]:
    """Events but for the previews that a client has already: those up to this evaluation."""
    async with contextlib.aclosing(events):
        async for event in events:
            if event.get("evaluations", 0) > evaluation or not event["type"].endswith("partial_image"):
                yield event


async def sent_events(
    first: dict[str, Any], rest: AsyncGenerator[dict[str, Any], None], request: Request, door: Gateway
) -> AsyncGenerator[str, None]:
    """As they go over the wire."""
    trace = request.state.trace_id
    try:
        yield _sent_event(first, trace)
        last = first
        async for event in rest:
            yield _sent_event(event, trace)
            last = event
        door.ran(request, last)
    except Exception as error:  # the status line has gone out long ago: the error is an event
        no = refused(error)
        if no.status == 500:
            log.exception("trace %s: a stream failed", trace)
        yield _sent_event({"type": "error", **no.body()}, trace)
    finally:
        await rest.aclose()


def _sent_event(event: dict[str, Any], trace: str) -> str:
    number = f"id: {event['evaluations']}\n" if "evaluations" in event else ""
    return f"{number}event: {event['type']}\ndata: {json.dumps({**event, 'trace_id': trace})}\n\n"
