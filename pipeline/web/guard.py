"""What is asked of a request before its body is read: where it comes from, whose key it has. And its trace id, and its
line in the log."""

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any, Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline.serving.config import ServingConfig
from pipeline.serving.refusals import Refused
from pipeline.web.errors import error_response
from pipeline.web.peers import stranger

log = logging.getLogger("raydiffusion.serving")

PROBES = ("/healthz", "/readyz")
TRACE_ID = re.compile(r"^[A-Za-z0-9_.\-]{1,64}$")


class Metrics(Protocol):
    """Who counts: see `pipeline.cluster.monitoring.IngressMetrics`."""

    def answered(self, route: str, status: int, seconds: float) -> None: ...

    def ran(self, answer: Mapping[str, Any]) -> None: ...


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
        state.update(trace_id=trace, key="", trusted=False, lineage={})
        started, status = time.perf_counter(), 499  # what it stays where the client leaves before the answer

        async def send_traced(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", trace.encode())]
            await send(message)

        try:
            if (no := self._refusal(scope, headers, state)) is None:
                await self.app(scope, receive, send_traced)
            else:
                await error_response(no, trace)(scope, receive, send_traced)
        finally:
            self._note(scope, status, time.perf_counter() - started)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        if self.metrics is not None:
            self.metrics.answered(route, status, seconds)
        state = scope["state"]
        fields = {"trace_id": state["trace_id"], "route": route, "status": status, "seconds": round(seconds, 6)}
        log.info("request", extra={"fields": {"method": scope["method"], **fields, **state["lineage"]}})

    def _refusal(self, scope: Scope, headers: Mapping[str, str], state: dict[str, Any]) -> Refused | None:
        """Why the request gets no further. Probes do whoever sends them; what they are told depends on `trusted`."""
        origin, keyed = headers.get("origin"), bool(self.config.key_hashes)
        wrong = stranger(scope.get("client"), headers)
        elsewhere = origin is not None and origin.partition("://")[2] != headers.get("host", "")
        state["key"] = self._key(headers.get("authorization", "")) if keyed else ""
        state["trusted"] = not elsewhere and (wrong is None or bool(state["key"]))
        if scope["path"] in PROBES and scope["method"] in ("GET", "HEAD"):
            return None
        if wrong is not None and not keyed:
            return Refused(wrong, 403, "forbidden")
        if elsewhere:
            return Refused("requests from other sites' pages are refused", 403, "forbidden")
        if scope["path"].startswith("/v1/") and keyed and not state["key"]:
            return Refused("a valid key is needed: Authorization: Bearer KEY", 401, "invalid_api_key")
        return None

    def _key(self, authorization: str) -> str:
        """The hash of the key that was sent, or '' where it is none of ours."""
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode()).hexdigest()
        matches = [hmac.compare_digest(digest, known) for known in self.config.key_hashes]  # all, in constant time
        return digest if scheme.lower() == "bearer" and any(matches) else ""
