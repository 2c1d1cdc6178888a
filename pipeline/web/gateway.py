"""What every route of the API goes through: the quota before its backend is asked, the counts after."""

from collections.abc import AsyncGenerator, Mapping
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from pipeline.serving.config import ServingConfig
from pipeline.serving.rate_limits import RateLimits
from pipeline.serving.requests import Call, GenerationRequest
from pipeline.web.guard import Metrics

LINEAGE = ("model", "model_version", "model_digest", "seed", "evaluations", "row_evaluations", "queued_s", "run_s")


class Backend(Protocol):
    """What answers: a `Service` in this process, or replicas elsewhere."""

    async def models(self) -> list[dict[str, Any]]: ...

    async def describe(self, model: str | None = None) -> dict[str, Any]: ...

    async def price(self, asked: Call) -> int: ...

    async def answer(self, asked: Call) -> dict[str, Any]: ...

    def stream(self, asked: GenerationRequest) -> AsyncGenerator[dict[str, Any], None]: ...


class Gateway:
    """What every route of the API goes through: the quota before its backend is asked, the counts after."""

    def __init__(self, backend: Backend, config: ServingConfig, metrics: Metrics | None) -> None:
        self.backend, self.config, self.metrics = backend, config, metrics
        self.quotas = RateLimits(config.key_quota, config.ingress_replicas)

    async def charge(self, request: Request, asked: Call) -> None:
        """Raises Refused where the key's quota is spent."""
        if self.config.key_quota:
            self.quotas.charge(request.state.key, await self.backend.price(asked))

    def ran(self, request: Request, answer: Mapping[str, Any]) -> None:
        """An answer is complete: its stages are counted, its lineage goes into the line of the log."""
        if self.metrics is not None:
            self.metrics.ran(answer)
        request.state.lineage = {name: answer[name] for name in LINEAGE if name in answer}

    async def answer(self, request: Request, asked: Call) -> Response:
        """The backend's, with its trace id."""
        await self.charge(request, asked)
        body = await self.backend.answer(asked)
        self.ran(request, body)
        return JSONResponse({**body, "trace_id": request.state.trace_id})
