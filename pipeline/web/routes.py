"""The routes: the page, health, models, and the three that ask a model."""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from pipeline.serving.forms import parse_form
from pipeline.serving.refusals import Refused, RequestError
from pipeline.serving.requests import (
    LARGEST_SEED,
    Asked,
    EncodingRequest,
    GenerationRequest,
    LikelihoodOptions,
    LikelihoodRequest,
    ScoringRequest,
    decode_base64,
    parse_body,
)
from pipeline.web.bodies import as_json, media_type, needs, read_body
from pipeline.web.errors import ERRORS, error_response, refusing
from pipeline.web.events import EventStream, last_event, sent_events, unseen
from pipeline.web.gateway import Backend, Gateway

log = logging.getLogger("raydiffusion.serving")

READY_S = 5.0  # a probe has little patience
PAGE = {  # route: file of the page folder, its media type
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
    "/docs": ("docs.html", "text/html"),
    "/docs.js": ("docs.js", "text/javascript"),
}
PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """The playground and the API's description."""
    folder = files("pipeline.web") / "page"

    def serving(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
        async def page() -> Response:
            return Response(content, media_type=f"{kind}; charset=utf-8", headers=PAGE_HEADERS)

        return page

    for route, (name, kind) in PAGE.items():
        page = serving((folder / name).read_bytes(), kind)
        app.api_route(route, methods=["GET", "HEAD"], include_in_schema=False)(page)


def add_health(app: FastAPI, backend: Backend) -> None:
    """For what watches: alive, and ready. Anybody may ask and gets the status alone; a key or this machine the rest."""

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", summary="The HTTP side answers")
    async def healthz(request: Request) -> Response:
        return JSONResponse({"status": "ok"}) if request.state.trusted else Response()

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", summary="A replica is warmed up and has passed its self-test", responses=ERRORS)
    async def readyz(request: Request) -> Response:
        try:
            with refusing(request):
                facts = await _within(READY_S, backend.describe())
        except Refused as no:
            log.warning("trace %s: not ready: %s", request.state.trace_id, no)
            no.status = 503
            return error_response(no, request.state.trace_id) if request.state.trusted else Response(status_code=503)
        ready = {"status": "ready", "model": facts["id"], "self_test": facts["self_test"]}
        return JSONResponse(ready) if request.state.trusted else Response()


async def _within(seconds: float, facts: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    try:
        return await asyncio.wait_for(facts, seconds)
    except TimeoutError:
        raise Refused(f"no replica answers within {seconds:g} s", 503, "not_available", retry_after_s=seconds) from None


def add_models(app: FastAPI, backend: Backend) -> None:
    """What is served."""
    listed = ("id", "object", "created", "owned_by", "version", "digest", "aliases", "warning")

    @app.get("/v1/models", summary="The served models", responses=ERRORS)
    async def models(request: Request) -> dict[str, Any]:
        with refusing(request):
            found = await backend.models()
        return {"object": "list", "data": [{name: each.get(name) for name in listed} for each in found]}

    @app.get("/v1/models/{model_id:path}", summary="A model: its card, samplers, estimators, limits", responses=ERRORS)
    async def model(request: Request, model_id: str) -> dict[str, Any]:
        with refusing(request):
            return await backend.describe(model_id)


def add_generation(app: FastAPI, door: Gateway) -> None:
    """Images, whole or as a stream."""

    @app.post(
        "/v1/images/generations",
        summary="Make images",
        description="With `stream`, an event's id is its evaluation: asked again with the same seed and that id in "
        "Last-Event-ID, a broken stream goes on after it.",
        responses=ERRORS,
        openapi_extra=_request_body({"application/json": GenerationRequest.model_json_schema()}),
    )
    async def generations(request: Request) -> Response:
        with refusing(request):
            asked = await _json(request, GenerationRequest, door)
            after = last_event(request, asked)
            if asked.seed is None:  # here, so that whoever answers, again too, has the same one
                asked = asked.model_copy(update={"seed": secrets.randbelow(LARGEST_SEED + 1)})
            if not asked.stream:
                return await door.answer(request, asked)
            await door.charge(request, asked)
            events = unseen(door.backend.stream(asked), after)
            first = await anext(events)  # what is refused at once is refused with its own status
        return EventStream(sent_events(first, events, request, door))


def add_likelihood(app: FastAPI, door: Gateway) -> None:
    """Bits/dim, of JSON or of a form's files."""
    form = LikelihoodOptions.model_json_schema()
    form["properties"]["images"] = {"type": "array", "items": {"type": "string", "format": "binary"}}
    bodies = {"application/json": LikelihoodRequest.model_json_schema(), "multipart/form-data": form}

    @app.post(
        "/v1/likelihood",
        summary="Score images: bits/dim, its parts and standard error",
        responses=ERRORS,
        openapi_extra=_request_body(bodies),
    )
    async def likelihood(request: Request) -> Response:
        with refusing(request):
            needs(request, "application/json", "multipart/form-data")
            body = await read_body(request, door.config.max_request_bytes)
            if media_type(request) == "application/json":
                asked = parse_body(LikelihoodRequest, as_json(body))
                files = decode_base64(asked.images)
            else:
                fields, files = parse_form(request.headers["content-type"], body)
                asked = parse_body(LikelihoodOptions, fields)
                if not files:
                    raise RequestError("no file was sent as 'images'", "images", code="missing_parameter")
            return await door.answer(request, ScoringRequest.of(asked, files))


def add_encoding(app: FastAPI, door: Gateway) -> None:
    """Latents and back."""

    @app.post(
        "/v1/encodings",
        summary="Images to latents along the probability flow, and back",
        responses=ERRORS,
        openapi_extra=_request_body({"application/json": EncodingRequest.model_json_schema()}),
    )
    async def encodings(request: Request) -> Response:
        with refusing(request):
            return await door.answer(request, await _json(request, EncodingRequest, door))


async def _json(request: Request, kind: type[Asked], door: Gateway) -> Asked:
    """A body that must be JSON, as a request of this kind."""
    needs(request, "application/json")
    return parse_body(kind, as_json(await read_body(request, door.config.max_request_bytes)))


def _request_body(schemas: Mapping[str, Any]) -> dict[str, Any]:
    content = {kind: {"schema": schema} for kind, schema in schemas.items()}
    return {"requestBody": {"required": True, "content": content}}
