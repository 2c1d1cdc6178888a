"""Every refusal and every failure as an answer of the one error schema, and what the OpenAPI document says of them."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from pipeline.serving.refusals import Refused, refused

log = logging.getLogger("raydiffusion.serving")


def error_response(no: Refused, trace: str) -> JSONResponse:
    """With Retry-After where it is known."""
    headers = {} if no.retry_after_s is None else {"retry-after": str(max(1, round(no.retry_after_s)))}
    return JSONResponse({**no.body(), "trace_id": trace}, no.status, headers)


async def on_refused(request: Request, error: Exception) -> Response:
    """A handler of FastAPI: ours."""
    return error_response(refused(error), request.state.trace_id)


_FROM_A_PICTURE = (
    "not offered; POST /v1/images/generations starts from a picture by its 'image' (base64) and 'strength', with the "
    "openai client images.generate(prompt='', extra_body={'image': ..., 'strength': 0.6})"
)
INSTEAD = {"/v1/images/edits": _FROM_A_PICTURE, "/v1/images/variations": _FROM_A_PICTURE}


async def on_http(request: Request, error: Exception) -> Response:
    """A handler of FastAPI: those of its own, no route or another method."""
    if not isinstance(error, HTTPException):
        raise error
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    message = f"{request.method} {request.url.path[:200]}: {INSTEAD.get(request.url.path, error.detail)}"
    response = error_response(Refused(message, error.status_code, code), request.state.trace_id)
    response.headers.update(error.headers or {})
    return response


@contextlib.contextmanager
def refusing(request: Request) -> Iterator[None]:
    """Every exception becomes a `Refused`; what is our own defect is logged with its trace id."""
    try:
        yield
    except Exception as error:
        no = refused(error)
        if no.status == 500 and not isinstance(error, Refused):
            log.exception("trace %s: %s failed", request.state.trace_id, request.url.path)
        raise no from error


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
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "Refused", "content": {"application/json": {"schema": _ERROR_SCHEMA}}},
    "5XX": {"description": "Failed", "content": {"application/json": {"schema": _ERROR_SCHEMA}}},
}
