"""The HTTP application: routes, keys, size limits, errors and server-sent events, over any backend. No Ray in here."""

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from importlib.resources import files
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline.serving.quotas import Quotas
from pipeline.serving.requests import (
    LARGEST_SEED,
    EncodingRequest,
    GenerationRequest,
    LikelihoodOptions,
    LikelihoodRequest,
    Refused,
    RequestError,
    ServingConfig,
    decode_base64,
    parse_body,
    parse_form,
)
from pipeline.serving.service import refused

log = logging.getLogger("raydiffusion.serving")

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
BODY_TIMEOUT_S = 30.0
TRACE_ID = re.compile(r"^[A-Za-z0-9_.\-]{1,64}$")
PAGE = {  # route: file of the page folder, its media type
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
    "/docs": ("docs.html", "text/html"),
    "/docs.js": ("docs.js", "text/javascript"),
}
LINEAGE = ("model", "model_version", "model_digest", "seed", "evaluations", "row_evaluations", "queued_s", "run_s")
PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


class Backend(Protocol):
    """What answers: a `Service` in this process, or replicas elsewhere."""

    async def models(self) -> list[dict[str, Any]]: ...

    async def describe(self, model: str | None = None) -> dict[str, Any]: ...

    async def price(self, method: str, *arguments: Any) -> int: ...

    async def generate(self, fields: Mapping[str, Any], seed: int) -> dict[str, Any]: ...

    def stream(self, fields: Mapping[str, Any], seed: int) -> AsyncGenerator[dict[str, Any], None]: ...

    async def likelihood(self, fields: Mapping[str, Any], encoded: list[bytes], seed: int) -> dict[str, Any]: ...

    async def encode(self, fields: Mapping[str, Any]) -> dict[str, Any]: ...


class Metrics(Protocol):
    """Who counts: see `pipeline.cluster.monitoring.IngressMetrics`."""

    def answered(self, route: str, status: int, seconds: float) -> None: ...

    def ran(self, answer: Mapping[str, Any]) -> None: ...


class Door:
    """What every route of the API goes through: the quota before its backend is asked, the counts after."""

    def __init__(self, backend: Backend, config: ServingConfig, metrics: Metrics | None) -> None:
        self.backend, self.config, self.metrics = backend, config, metrics
        self.quotas = Quotas(config.key_quota / config.ingress_replicas)

    async def charge(self, request: Request, method: str, *arguments: Any) -> None:
        """Raises Refused where the key's quota is spent."""
        if self.config.key_quota:
            self.quotas.charge(request.state.key, await self.backend.price(method, *arguments))

    def ran(self, request: Request, answer: Mapping[str, Any]) -> None:
        """An answer is complete: its stages are counted, its lineage goes into the line of the log."""
        if self.metrics is not None:
            self.metrics.ran(answer)
        request.state.lineage = {name: answer[name] for name in LINEAGE if name in answer}


def make_app(backend: Backend, config: ServingConfig, metrics: Metrics | None = None) -> FastAPI:
    """The application. Its errors, whatever their cause, have the one schema of `Refused`."""
    app = FastAPI(title="raydiffusion", version="1", docs_url=None, redoc_url=None)
    app.add_middleware(Guard, config=config, metrics=metrics)
    door = Door(backend, config, metrics)
    app.add_exception_handler(Refused, _on_refused)
    app.add_exception_handler(HTTPException, _on_http)
    _add_page(app)
    _add_health(app, backend)
    _add_models(app, backend)
    _add_generation(app, door)
    _add_likelihood(app, door)
    _add_encoding(app, door)
    return app


# --- before a body is read -------------------------------------------------------------------------------------------


class Guard:
    """Trace id, keys, and requests from other sites' pages; a line in the log. The body is not touched."""

    def __init__(self, app: ASGIApp, config: ServingConfig, metrics: Metrics | None) -> None:
        self.app, self.config, self.metrics = app, config, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        trace = given if TRACE_ID.match(given) else secrets.token_hex(16)
        state = scope.setdefault("state", {})
        state.update(trace_id=trace, key="", lineage={})
        started, status = time.perf_counter(), 499  # what it stays where the client leaves before the answer

        async def send_traced(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", trace.encode())]
            await send(message)

        try:
            if (no := self._refusal(scope["path"], headers, state)) is None:
                await self.app(scope, receive, send_traced)
            else:
                await _response(no, trace)(scope, receive, send_traced)
        finally:
            self._note(scope, status, time.perf_counter() - started)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        if self.metrics is not None:
            self.metrics.answered(route, status, seconds)
        state = scope["state"]
        fields = {"trace_id": state["trace_id"], "route": route, "status": status, "seconds": round(seconds, 6)}
        log.info("request", extra={"fields": {"method": scope["method"], **fields, **state["lineage"]}})

    def _refusal(self, path: str, headers: Mapping[str, str], state: dict[str, Any]) -> Refused | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        name = host.rsplit(":", 1)[0] if re.search(r":\d+$", host) else host
        if not self.config.key_hashes and name not in LOOPBACK_HOSTS:  # a page that rebinds its name to this machine
            return Refused(f"host '{name[:64]}' is not served", 403, "forbidden")
        if origin is not None and origin.partition("://")[2] != host:
            return Refused("requests from other sites' pages are refused", 403, "forbidden")
        if path.startswith("/v1/") and self.config.key_hashes:
            state["key"] = self._key(headers.get("authorization", ""))
            if not state["key"]:
                return Refused("a valid key is needed: Authorization: Bearer KEY", 401, "invalid_api_key")
        return None

    def _key(self, authorization: str) -> str:
        """The hash of the key that was sent, or '' where it is none of ours."""
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode()).hexdigest()
        matches = [hmac.compare_digest(digest, known) for known in self.config.key_hashes]  # all, in constant time
        return digest if scheme.lower() == "bearer" and any(matches) else ""


async def _body(request: Request, limit: int) -> bytes:
    """The body, given up as soon as it passes the limit."""
    too_large = RequestError(f"the body is more than {limit} bytes", status=413, code="request_too_large")
    declared = request.headers.get("content-length", "0")
    if declared.isascii() and declared.isdigit() and int(declared) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        message = f"the body took more than {BODY_TIMEOUT_S:.0f} s to arrive"
        raise RequestError(message, status=408, code="request_timeout") from None
    except ClientDisconnect:
        raise RequestError("the client left before the body ended", code="malformed_body") from None
    return bytes(body)


def _json(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {str(error)[:200]}", code="malformed_body") from None
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, got {type(value).__name__}", code="malformed_body")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object each of whose names is given once: of two values a reader before us may have checked the other."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"'{twice[:64]}' is given twice")
    return found


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _needs(request: Request, *allowed: str) -> None:
    if _media_type(request) not in allowed:
        got = _media_type(request)[:64] or "none"
        message = f"content-type must be {' or '.join(allowed)}, got {got}"
        raise RequestError(message, status=415, code="unsupported_media_type")


# --- errors ----------------------------------------------------------------------------------------------------------


def _response(no: Refused, trace: str) -> JSONResponse:
    headers = {} if no.retry_after_s is None else {"retry-after": str(max(1, round(no.retry_after_s)))}
    return JSONResponse({**no.body(), "trace_id": trace}, no.status, headers)


async def _on_refused(request: Request, error: Exception) -> Response:
    return _response(refused(error), request.state.trace_id)


async def _on_http(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    response = _response(Refused(message, error.status_code, code), request.state.trace_id)
    response.headers.update(error.headers or {})
    return response


@contextlib.contextmanager
def _refusing(request: Request) -> Any:
    """Every exception becomes a `Refused`; what is our own defect is logged with its trace id."""
    try:
        yield
    except Exception as error:
        no = refused(error)
        if no.status == 500 and not isinstance(error, Refused):
            log.exception("trace %s: %s failed", request.state.trace_id, request.url.path)
        raise no from error


# --- routes ----------------------------------------------------------------------------------------------------------


def _add_page(app: FastAPI) -> None:
    folder = files("pipeline.serving") / "page"

    def serving(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
        async def page() -> Response:
            return Response(content, media_type=f"{kind}; charset=utf-8", headers=PAGE_HEADERS)

        return page

    for route, (name, kind) in PAGE.items():
        app.get(route, include_in_schema=False)(serving((folder / name).read_bytes(), kind))


def _add_health(app: FastAPI, backend: Backend) -> None:
    @app.get("/healthz", summary="The HTTP side answers")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="A replica is warmed up and has passed its self-test", responses=_ERRORS)
    async def readyz(request: Request) -> dict[str, Any]:
        with _refusing(request):
            facts = await backend.describe()
        return {"status": "ready", "model": facts["id"], "self_test": facts["self_test"]}


def _add_models(app: FastAPI, backend: Backend) -> None:
    listed = ("id", "object", "created", "owned_by", "version", "digest", "aliases")

    @app.get("/v1/models", summary="The served models", responses=_ERRORS)
    async def models(request: Request) -> dict[str, Any]:
        with _refusing(request):
            found = await backend.models()
        return {"object": "list", "data": [{name: each[name] for name in listed} for each in found]}

    @app.get("/v1/models/{model_id:path}", summary="A model: its card, samplers, estimators, limits", responses=_ERRORS)
    async def model(request: Request, model_id: str) -> dict[str, Any]:
        with _refusing(request):
            return await backend.describe(model_id)


def _add_generation(app: FastAPI, door: Door) -> None:
    @app.post(
        "/v1/images/generations",
        summary="Make images",
        description="With `stream`, an event's id is its evaluation: asked again with the same seed and that id in "
        "Last-Event-ID, a broken stream goes on after it.",
        responses=_ERRORS,
        openapi_extra=_request_body({"application/json": GenerationRequest.model_json_schema()}),
    )
    async def generations(request: Request) -> Response:
        with _refusing(request):
            _needs(request, "application/json")
            asked = parse_body(GenerationRequest, _json(await _body(request, door.config.max_request_bytes)))
            fields = asked.model_dump(exclude_defaults=True)
            after = _last_event(request, asked)
            seed = secrets.randbelow(LARGEST_SEED + 1) if asked.seed is None else asked.seed
            await door.charge(request, "generate", fields, seed)
            if not asked.stream:
                return _answer(await door.backend.generate(fields, seed), request, door)
            events = _after(door.backend.stream(fields, seed), after)
            first = await anext(events)  # what is refused at once is refused with its own status
        return EventStream(_sent_events(first, events, request, door))


def _last_event(request: Request, asked: GenerationRequest) -> int:
    """The evaluation of the last event that the client has, 0 where it has none."""
    given = request.headers.get("last-event-id", "")
    if not given:
        return 0
    if not (given.isascii() and given.isdigit() and len(given) <= 9):
        raise RequestError("Last-Event-ID must be the id of an event: a whole number", "Last-Event-ID")
    if not asked.stream or asked.seed is None:
        raise RequestError("Last-Event-ID goes with a stream and the seed of the first answer", "Last-Event-ID")
    return int(given)


def _add_likelihood(app: FastAPI, door: Door) -> None:
    form = LikelihoodOptions.model_json_schema()
    form["properties"]["images"] = {"type": "array", "items": {"type": "string", "format": "binary"}}
    bodies = {"application/json": LikelihoodRequest.model_json_schema(), "multipart/form-data": form}

    @app.post(
        "/v1/likelihood",
        summary="Score images: bits/dim, its parts and standard error",
        responses=_ERRORS,
        openapi_extra=_request_body(bodies),
    )
    async def likelihood(request: Request) -> Response:
        with _refusing(request):
            _needs(request, "application/json", "multipart/form-data")
            body = await _body(request, door.config.max_request_bytes)
            if _media_type(request) == "application/json":
                asked = parse_body(LikelihoodRequest, _json(body))
                encoded = decode_base64(asked.images)
            else:
                fields, encoded = parse_form(request.headers["content-type"], body)
                asked = parse_body(LikelihoodOptions, fields)
                if not encoded:
                    raise RequestError("no file was sent as 'images'", "images", code="missing_parameter")
            fields = asked.model_dump(exclude_defaults=True, exclude={"images"})
            await door.charge(request, "likelihood", fields, encoded, asked.seed or 0)
            return _answer(await door.backend.likelihood(fields, encoded, asked.seed or 0), request, door)


def _add_encoding(app: FastAPI, door: Door) -> None:
    @app.post(
        "/v1/encodings",
        summary="Images to latents along the probability flow, and back",
        responses=_ERRORS,
        openapi_extra=_request_body({"application/json": EncodingRequest.model_json_schema()}),
    )
    async def encodings(request: Request) -> Response:
        with _refusing(request):
            _needs(request, "application/json")
            asked = parse_body(EncodingRequest, _json(await _body(request, door.config.max_request_bytes)))
            fields = asked.model_dump(exclude_defaults=True)
            await door.charge(request, "encode", fields)
            return _answer(await door.backend.encode(fields), request, door)


def _answer(body: dict[str, Any], request: Request, door: Door) -> Response:
    door.ran(request, body)
    return JSONResponse({**body, "trace_id": request.state.trace_id})


class EventStream(StreamingResponse):
    """Closes what it streams when it ends, however it ends: a client may leave while an event is being sent."""

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self.events):
            await super().__call__(scope, receive, send)


async def _after(events: AsyncGenerator[dict[str, Any], None], evaluation: int) -> AsyncGenerator[dict[str, Any], None]:
    """Events but for the previews that a client has already: those up to this evaluation."""
    async with contextlib.aclosing(events):
        async for event in events:
            if event.get("evaluations", 0) > evaluation or not event["type"].endswith("partial_image"):
                yield event


async def _sent_events(
    first: dict[str, Any], rest: AsyncGenerator[dict[str, Any], None], request: Request, door: Door
) -> AsyncGenerator[str, None]:
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


# --- the OpenAPI document --------------------------------------------------------------------------------------------


def _request_body(schemas: Mapping[str, Any]) -> dict[str, Any]:
    content = {kind: {"schema": schema} for kind, schema in schemas.items()}
    return {"requestBody": {"required": True, "content": content}}


_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error", "trace_id"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        },
        "trace_id": {"type": "string"},
    },
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "Refused", "content": {"application/json": {"schema": _ERROR_SCHEMA}}},
    "5XX": {"description": "Failed", "content": {"application/json": {"schema": _ERROR_SCHEMA}}},
}
