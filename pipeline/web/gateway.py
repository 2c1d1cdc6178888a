"""What every route of the API goes through: the quota before its backend is asked, the counts after."""

from collections.abc import AsyncGenerator, Mapping
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from pipeline.serving.config import ServingConfig
from pipeline.serving.rate_limits import RateLimits
from pipeline.web.guard import Metrics

LINEAGE = ("model", "model_version", "model_digest", "seed", "evaluations", "row_evaluations", "queued_s", "run_s")


class Backend(Protocol):
    """What answers: a `Service` in this process, or replicas elsewhere."""

    async def models(self) -> list[dict[str, Any]]: ...

    async def describe(self, model: str | None = None) -> dict[str, Any]: ...

    async def price(self, method: str, *arguments: Any) -> int: ...

    async def generate(self, fields: Mapping[str, Any], seed: int) -> dict[str, Any]: ...

    def stream(self, fields: Mapping[str, Any], seed: int) -> AsyncGenerator[dict[str, Any], None]: ...

    async def likelihood(self, fields: Mapping[str, Any], encoded: list[bytes], seed: int) -> dict[str, Any]: ...

    async def encode(self, fields: Mapping[str, Any]) -> dict[str, Any]: ...


class Gateway:
    """What every route of the API goes through: the quota before its backend is asked, the counts after."""

    def __init__(self, backend: Backend, config: ServingConfig, metrics: Metrics | None) -> None:
        self.backend, self.config, self.metrics = backend, config, metrics
        self.quotas = RateLimits(config.key_quota, config.ingress_replicas)

    async def charge(self, request: Request, method: str, *arguments: Any) -> None:
        """Raises Refused where the key's quota is spent."""
        if self.config.key_quota:
            self.quotas.charge(request.state.key, await self.backend.price(method, *arguments))

    def ran(self, request: Request, answer: Mapping[str, Any]) -> None:
        """An answer is complete: its stages are counted, its lineage goes into the line of the log."""
        if self.metrics is not None:
            self.metrics.ran(answer)
        request.state.lineage = {name: answer[name] for name in LINEAGE if name in answer}

    def answer(self, request: Request, body: dict[str, Any]) -> Response:
        """The body with its trace id."""
        self.ran(request, body)
        return JSONResponse({**body, "trace_id": request.state.trace_id})
