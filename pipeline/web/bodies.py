"""Bodies: read within a limit of bytes and time, and as JSON whose names are given once."""

import asyncio
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from pipeline.serving.forms import loads
from pipeline.serving.refusals import RequestError

BODY_TIMEOUT_S = 30.0


async def read_body(request: Request, limit: int) -> bytes:
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


def as_json(body: bytes) -> dict[str, Any]:
    """Raises RequestError for anything but one JSON object."""
    try:
        value = loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {str(error)[:200]}", code="malformed_body") from None
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, got {type(value).__name__}", code="malformed_body")
    return value


def media_type(request: Request) -> str:
    """Of the body, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def needs(request: Request, *allowed: str) -> None:
    """Refuse another media type than these."""
    if media_type(request) not in allowed:
        got = media_type(request)[:64] or "none"
        message = f"content-type must be {' or '.join(allowed)}, got {got}"
        raise RequestError(message, status=415, code="unsupported_media_type")
