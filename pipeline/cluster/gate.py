"""What a request passes in the process of Ray Serve's HTTP proxy, before Ray hands it on: Ray itself reads a body of
any size, for any time, and its server waits for ever for the end of a header.

Ray calls `middlewares` where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it in the environment of `ray start`. A
session that we start has it there.
"""

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http import auto

from pipeline.serving.refusals import Refused, RequestError
from pipeline.web.errors import error_response

IMPORT_PATH = "pipeline.cluster.gate:middlewares"
Peer = tuple[str, int]


@dataclass(frozen=True)
class Limits:
    """header_s, body_s: seconds a client has to send them; connections: that one address may have open; bodies_bytes:
    of all requests in progress together."""

    header_s: float = 10.0
    body_s: float = 30.0
    connections: int = 512
    bodies_bytes: int = 128 << 20


class _Open:
    """A connection. timer: when its header must be there; busy: a whole request is being answered."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport, self.busy = transport, False
        self.timer: asyncio.TimerHandle | None = None

    def expect(self, seconds: float) -> None:
        if self.timer is None and not self.busy:
            self.timer = asyncio.get_running_loop().call_later(seconds, self.transport.abort)

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class Connections:
    """The open connections by address. Where one has too many, the oldest that waits for its client is closed, so that
    half-sent requests make room for whole ones; where all are being answered, the new one is."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._open: dict[str, OrderedDict[Peer, _Open]] = {}

    def opened(self, peer: Peer, transport: asyncio.Transport) -> None:
        mine = self._open.setdefault(peer[0], OrderedDict())
        if len(mine) >= self.limits.connections:
            oldest = next((key for key, each in mine.items() if not each.busy), None)
            if oldest is None:
                transport.abort()
                return
            mine.pop(oldest).transport.abort()
        mine[peer] = _Open(transport)
        mine[peer].expect(self.limits.header_s)

    def closed(self, peer: Peer) -> None:
        mine = self._open.get(peer[0], OrderedDict())
        if peer in mine:
            mine.pop(peer).stop()
        if not mine:
            self._open.pop(peer[0], None)

    def of(self, peer: Sequence[Any]) -> _Open | None:
        """The connection from (address, port), None where it is closed."""
        return self._open.get(peer[0], OrderedDict()).get((peer[0], peer[1]))


def guarded(protocol: Any, connections: Connections) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol with an eye on its connections, and without its belief in X-Forwarded-For."""

    class Guarded(protocol):
        def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
            super().__init__(config, *arguments, **options)
            while isinstance(self.app, ProxyHeadersMiddleware):
                self.app = self.app.app

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if self.client is not None:
                connections.opened(tuple(self.client), transport)

        def data_received(self, data: bytes) -> None:
            mine = None if self.client is None else connections.of(tuple(self.client))
            if mine is not None and (self.cycle is None or self.cycle.response_complete):  # a request begins
                mine.expect(connections.limits.header_s)
            super().data_received(data)

        def connection_lost(self, exc: Exception | None) -> None:
            if self.client is not None:
                connections.closed(tuple(self.client))
            super().connection_lost(exc)

    return Guarded


class Gate:
    """Reads the whole body, within its limits of time and bytes, before the request goes on."""

    def __init__(self, app: ASGIApp, connections: Connections) -> None:
        self.app, self.connections, self.limits = app, connections, connections.limits
        self._bytes = 0  # of the bodies in progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        mine = self.connections.of(scope.get("client") or ("", 0))
        if mine is not None:
            mine.stop()
        held = _Held()
        try:
            _check_headers(scope)
            body = await self._body(scope, receive, held)
            if mine is not None:
                mine.busy = True
            await self.app(scope, _replay(body, receive), send)
        except Refused as no:
            response = error_response(no, trace := secrets.token_hex(16))
            response.headers.update({"x-request-id": trace, "connection": "close"})
            await response(scope, receive, send)
        except _Left:
            return
        finally:
            self._bytes -= held.bytes
            if mine is not None:
                mine.busy = False

    async def _body(self, scope: Scope, receive: Receive, held: "_Held") -> bytes:
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        self._hold(held, int(declared) if declared.isdigit() else 0)
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise _Left
                    body += message.get("body", b"")
                    self._hold(held, len(body))
                    more = message.get("more_body", False)
        except TimeoutError:
            message = f"the body took more than {self.limits.body_s:.0f} s to arrive"
            raise RequestError(message, status=408, code="request_timeout") from None
        return bytes(body)

    def _hold(self, held: "_Held", size: int) -> None:
        """Count a body as so large; refuse it where all together would be too much."""
        more = max(0, size - held.bytes)
        if size > self.limits.bodies_bytes:
            raise RequestError(
                f"the body is more than {self.limits.bodies_bytes} bytes", status=413, code="request_too_large"
            )
        if self._bytes + more > self.limits.bodies_bytes:
            message = (
                f"the requests in progress have bodies of {self._bytes} bytes, of at most {self.limits.bodies_bytes}"
            )
            raise Refused(message, 429, "queue_full", retry_after_s=2.0)
        held.bytes += more
        self._bytes += more


class _Held:
    """The bytes that one request counts for."""

    bytes = 0


class _Left(Exception):
    """The client closed its connection before its body ended."""


def _check_headers(scope: Scope) -> None:
    """Ray's proxy reads headers as UTF-8 and fails where they are not."""
    for name, value in scope["headers"]:
        try:
            name.decode()
            value.decode()
        except UnicodeDecodeError:
            raise RequestError(f"the header {name.decode('latin-1')[:64]!r} is not UTF-8") from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one piece, then what the connection says."""
    whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return whole.pop() if whole else await receive()

    return next_message


def middlewares() -> list[Middleware]:
    """For Ray Serve's proxy: the gate around its application, and its server's connections watched. uvicorn takes its
    protocol from this name when it starts to listen, after this call; Ray offers no other way to it."""
    connections = Connections(Limits())
    auto.AutoHTTPProtocol = guarded(auto.AutoHTTPProtocol, connections)
    return [Middleware(Gate, connections=connections)]
