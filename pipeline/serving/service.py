"""One served model: requests in, plain values out. Ties a `Model` to its `Engine`; no Ray and no web framework.

Device work happens in the engine's thread and encoding in a pool, so an event loop that calls these is never held up.
"""

import asyncio
import base64
import contextlib
import inspect
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.conditioner import NAMES_OF
from pipeline.data.formats import codecs
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.likelihood.estimators import ESTIMATORS, Likelihood
from pipeline.diffusion.procedure import Procedure
from pipeline.diffusion.sampling.encode import ENCODERS
from pipeline.diffusion.sampling.grids import GRIDS
from pipeline.diffusion.sampling.samplers import SAMPLERS
from pipeline.model import Model
from pipeline.serving.config import ServingConfig
from pipeline.serving.engine import Engine, Progress
from pipeline.serving.held_out import HELD_OUT, held_out_scores, histogram, percentile
from pipeline.serving.outcomes import NotFinite, Outcome
from pipeline.serving.plans import (
    EncodingPlan,
    GenerationPlan,
    LikelihoodPlan,
    Plan,
    askable,
    plan_encoding,
    plan_generation,
    plan_likelihood,
)
from pipeline.serving.refusals import RequestError, unknown_model
from pipeline.serving.requests import Call, EncodingRequest, GenerationRequest, ScoringRequest
from pipeline.serving.self_test import self_test
from pipeline.size import shown

DEFAULT_PREVIEWS = 16


@dataclass(frozen=True)
class Identity:
    """Which model this is. id: what requests call it, aliases: what else they may; version: in the registry, or '';
    created: since when it is served, Unix time in seconds."""

    id: str
    version: str
    digest: str
    aliases: tuple[str, ...] = ()
    created: int = field(default_factory=lambda: int(time.time()), compare=False)

    def entry(self) -> dict[str, Any]:
        """The model as `GET /v1/models` lists it."""
        return {**asdict(self), "aliases": list(self.aliases), "object": "model", "owned_by": "raydiffusion"}

    def answers_to(self, name: str | None) -> bool:
        """Whether a request that names `name` means this model."""
        return name is None or name in (self.id, *self.aliases)


class Service:
    """A model and its engine, warmed up and tested before the constructor returns.

    Raises:
        ValueError: the self-test failed: the model answers NaN, or an image depends on the requests beside it.
    """

    def __init__(self, model: Model, config: ServingConfig, identity: Identity) -> None:
        self.model, self.config, self.identity = model, config, identity
        pixels = model.config.pixels
        self.engine = Engine(
            model.networks,
            chunk=config.chunk,
            max_live_rows=config.max_live_images,
            max_queued_cost=max(1, config.max_queued_cost // pixels),
            threads=max(1, int(config.cpus_per_replica)),
            name=f"engine {identity.id}",
        )
        self.bytes = sum(p.numel() * p.element_size() for net in model.networks.values() for p in net.parameters())
        self.held_out = held_out_scores(model.card)
        try:
            self.self_test = self_test(self.engine, model)
        except BaseException:
            self.engine.close()
            raise

    def close(self, drain: bool = True, timeout_s: float | None = None) -> bool:
        """Take no more requests; see `Engine.close`."""
        return self.engine.close(drain, timeout_s)

    # --- what the model is --------------------------------------------------------------------------------------------

    async def entry(self) -> dict[str, Any]:
        """The model as `GET /v1/models` lists it."""
        return self.identity.entry()

    async def models(self) -> list[dict[str, Any]]:
        """The list of `GET /v1/models`."""
        return [await self.entry()]

    async def describe(self, model: str | None = None) -> dict[str, Any]:
        """The model as `GET /v1/models/{id}` shows it: its card, and all that a form needs to ask it."""
        self._check_name(model)
        config = self.model.config
        return {
            **await self.entry(),
            "size": config.size,
            "height": config.image_shape[1],
            "width": config.image_shape[2],
            "channels": config.channels,
            "condition": self.model.config.condition,
            **self._names(),
            "samplers": {
                name: {"grid": sampler.grid, "stochastic": sampler.stochastic, "options": _options(sampler.options)}
                for name, sampler in SAMPLERS.items()
            },
            "encoders": list(ENCODERS),
            "estimators": {name: {"options": _options(estimator.options)} for name, estimator in ESTIMATORS.items()},
            "grids": list(GRIDS),
            "guided": self._guided(),
            "bytes": self.bytes,
            "defaults": {"sampler": self.config.sampler, "steps": self.config.steps},
            "limits": {"images": self.config.max_images, "steps": self.config.max_steps},
            "held_out": {name: histogram(scores) for name, scores in self.held_out.items()},
            "self_test": asdict(self.self_test),
            "card": {name: value for name, value in self.model.card.items() if name != HELD_OUT},
        }

    def _guided(self) -> str | None:
        """What guidance needs: nothing, by a weaker network ("always"), or a class; None where the model refuses it."""
        if self.model.guide is not None:
            return "always"
        return "by class" if self.model.config.classes and self.model.card.get("label_dropout") != 0 else None

    # --- what it is asked -----------------------------------------------------------------------------------------

    async def answer(self, asked: Call) -> dict[str, Any]:
        """The body of an answer of the route that takes such requests. Without a seed its seed is 0.

        Raises:
            RequestError: what the request may not ask. EngineBusy, EngineClosed, DeadlineExceeded, NotFinite.
        """
        plan = await self._planned(asked)
        with _whose(plan.unusual):
            return await asyncio.to_thread(self._told, plan, await self._run(plan))

    async def price(self, asked: Call) -> int:
        """Cost units (images x network evaluations x pixels) that the answer is expected to take.

        Raises:
            RequestError: as `answer`.
        """
        return (await self._planned(asked)).cost * self.model.config.pixels

    async def stream(self, asked: GenerationRequest) -> AsyncGenerator[dict[str, Any], None]:
        """The same as events: previews of x_hat as they come, then the whole answer. Closing it cancels the request."""
        plan = await self._planned(asked)
        if not isinstance(plan, GenerationPlan):
            raise AssertionError(f"a request for images came to {type(plan).__name__}")
        every = _spread(plan.evaluations, DEFAULT_PREVIEWS if asked.partial_images is None else asked.partial_images)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Progress | None]()

        def on_progress(progress: Progress) -> None:
            if progress.evaluations in every:
                loop.call_soon_threadsafe(events.put_nowait, progress)

        task = asyncio.ensure_future(self._run(plan, on_progress if every else None))
        task.add_done_callback(lambda _: events.put_nowait(None))
        shown = 0
        try:
            while (progress := await events.get()) is not None:
                event = await asyncio.to_thread(self._previewed, plan, progress)
                yield {**event, "partial_image_index": shown}
                shown += 1
            with _whose(plan.unusual):
                body = await asyncio.to_thread(self._told, plan, await task)
            event = {**self._event("image_generation.completed"), "b64_json": body["data"][0]["b64_json"], **body}
            yield {**event, "usage": {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}}
        finally:
            task.cancel()

    def _told(self, plan: Plan, outcome: Outcome[Any]) -> dict[str, Any]:
        match plan:
            case GenerationPlan():
                return self._generated(plan, outcome)
            case LikelihoodPlan():
                return self._scored(plan, outcome)
            case EncodingPlan():
                return self._encoded(plan, outcome)

    # --- generation -----------------------------------------------------------------------------------------------

    def _generated(self, plan: GenerationPlan, outcome: Outcome[Tensor]) -> dict[str, Any]:
        if not bool(torch.isfinite(outcome.value).all()):
            raise NotFinite("the sampler came to a value that is not finite")
        data = [
            {"b64_json": encoded, "index": index, **self.model.conditioner.echo(plan.conditioning, index)}
            for index, encoded in enumerate(self._pngs(outcome.value))
        ]
        how = {"sampler": plan.how.sampler, "steps": plan.how.steps, "guidance": plan.how.guidance}
        head = {
            "created": int(time.time()),
            "data": data,
            "size": shown(self.model.config.size),
            "output_format": "png",
        }
        return {**head, **self._lineage(plan.seed, outcome), **how, "options": plan.how.options}

    def _previewed(self, plan: GenerationPlan, progress: Progress) -> dict[str, Any]:
        x_hat = progress.x_hat
        if len(x_hat) == 2 * plan.n:  # a guided query asks conditional rows, then unconditional ones
            x_hat = torch.lerp(x_hat[plan.n :], x_hat[: plan.n], plan.how.guidance)
        encoded = self._pngs(x_hat)
        return {
            **self._event("image_generation.partial_image"),
            "b64_json": encoded[0],
            "data": [{"b64_json": each, "index": index} for index, each in enumerate(encoded)],
            "evaluations": progress.evaluations,
            "expected_evaluations": plan.evaluations,
        }

    def _pngs(self, z: Tensor) -> list[str]:
        """Base64 PNG of each of n images, as they came from the sampler."""
        pixels = self.model.space.decode(z).permute(0, 2, 3, 1).cpu().numpy()
        return [base64.b64encode(codecs.encode_png(np.ascontiguousarray(each))).decode() for each in pixels]

    def _event(self, kind: str) -> dict[str, Any]:
        fixed = {"background": "opaque", "output_format": "png", "quality": "auto"}
        return {"type": kind, "created_at": int(time.time()), "size": shown(self.model.config.size), **fixed}

    # --- likelihood -----------------------------------------------------------------------------------------------

    def _scored(self, plan: LikelihoodPlan, outcome: Outcome[Likelihood]) -> dict[str, Any]:
        asked = self.model.conditioner
        data = [
            {
                "index": index,
                **asked.echo(plan.conditioning, index),
                **_score(outcome.value, index, self._peers(plan.how.estimator, plan.conditioning[index : index + 1])),
            }
            for index in range(plan.n)
        ]
        how = {"estimator": plan.how.estimator, "options": plan.how.options}
        return {"object": "list", "data": data, **self._lineage(plan.seed, outcome), **how}

    def _names(self) -> dict[str, list[str]]:
        """What the model can be asked for, by kind."""
        conditioner = self.model.conditioner
        return {
            name: list(conditioner.names) if kind == conditioner.condition else [] for kind, name in NAMES_OF.items()
        }

    def _peers(self, estimator: str, asked: Conditioning) -> list[float] | None:
        """The held-out scores that an image may be compared with: where the model is told something they were scored
        with theirs, and without its own an image has more bits."""
        untold = self.model.conditioner.names and asked.same(asked.unconditional())
        return None if untold else self.held_out.get(estimator)

    # --- encodings ------------------------------------------------------------------------------------------------

    def _encoded(self, plan: EncodingPlan, outcome: Outcome[Tensor]) -> dict[str, Any]:
        if not bool(torch.isfinite(outcome.value).all()):
            raise NotFinite("the solver came to a value that is not finite")
        if plan.pixels is None:
            made = [{"b64_json": encoded} for encoded in self._pngs(outcome.value)]
        else:
            made = [{"latent": _floats(latent), "shape": list(latent.shape)} for latent in outcome.value]
        echo = self.model.conditioner.echo
        data = [{"index": index, **echo(plan.conditioning, index), **each} for index, each in enumerate(made)]
        how = {"sampler": plan.how.sampler, "steps": plan.how.steps, "dtype": "float32-le"}
        return {"object": "list", "data": data, **self._lineage(0, outcome), **how}

    # --- all of them ----------------------------------------------------------------------------------------------

    async def _planned(self, asked: Call) -> Plan:
        """At once, so that a full queue is told at once; in a thread where there is an image to decode."""
        if isinstance(asked, GenerationRequest) and asked.image is None:
            return self._plan(asked)
        return await asyncio.to_thread(self._plan, asked)

    def _plan(self, asked: Call) -> Plan:
        self._check_name(asked.model)
        match asked:
            case GenerationRequest():
                return plan_generation(asked, self.model, self._limits(), asked.seed or 0)
            case EncodingRequest():
                return plan_encoding(asked, self.model, self._limits())
            case ScoringRequest():
                return plan_likelihood(asked, asked.files, self.model, self._limits(), asked.seed or 0)

    async def _run(self, plan: Plan, on_progress: Callable[[Progress], None] | None = None) -> Outcome[Any]:
        """Through the engine; cancelling the awaiting task cancels the request."""

        def build() -> Procedure[Any]:
            return plan.build(self.model)

        deadline_s = self.config.deadline_s
        future = self.engine.submit(build, rows=plan.n, cost=plan.cost, deadline_s=deadline_s, on_progress=on_progress)
        return await asyncio.wrap_future(future)

    def _limits(self) -> ServingConfig:
        """The configured ones, and no more than the engine at its best does until a request's deadline."""
        able = int(self.engine.load().best_rows_per_s * self.config.deadline_s) * self.model.config.pixels
        return replace(self.config, max_request_cost=max(1, min(self.config.max_request_cost, able)))

    def _check_name(self, name: str | None) -> None:
        if not self.identity.answers_to(name):
            raise unknown_model(name, [self.identity.id])

    def _lineage(self, seed: int, outcome: Outcome[Any]) -> dict[str, Any]:
        return {
            "model": self.identity.id,
            "model_version": self.identity.version,
            "model_digest": self.identity.digest,
            "seed": seed,
            "evaluations": outcome.evaluations,
            "row_evaluations": outcome.row_evaluations,
            "queued_s": round(outcome.queued_s, 6),
            "run_s": round(outcome.run_s, 6),
        }


@contextlib.contextmanager
def _whose(field: str) -> Iterator[None]:
    """A model that passed its self-test and comes to NaN by what a request chose, in `field`: the request's fault."""
    try:
        yield
    except NotFinite as error:
        if not field:
            raise
        raise RequestError(f"{error}: choose less extreme {field}", field, code="not_finite") from error


def _spread(evaluations: int, wanted: int) -> set[int]:
    """At most `wanted` evaluation numbers, evenly over 1..evaluations, the last one among them."""
    count = min(evaluations, wanted)
    return {round(evaluations * (index + 1) / count) for index in range(count)}


def _floats(latent: Tensor) -> str:
    """Base64 of the tensor's float32 values, little-endian, row by row."""
    return base64.b64encode(latent.cpu().contiguous().numpy().astype("<f4").tobytes()).decode()


def _score(scores: Likelihood, index: int, held_out: list[float] | None) -> dict[str, Any]:
    bits = float(scores.bits_per_dim[index])
    return {
        "bits_per_dim": bits,
        "standard_error": _number(float(scores.bits_per_dim_standard_error[index])),
        "nats": float(scores.nats[index]),
        "parts_nats": {name: float(value[index]) for name, value in scores.parts.items()},
        "standard_errors_nats": {name: _number(float(v[index])) for name, v in scores.standard_errors.items()},
        "evaluations": int(scores.evaluations[index]),
        "percentile": None if held_out is None else percentile(held_out, bits),
    }


def _number(value: float) -> float | None:
    """JSON has no NaN: a standard error that one draw cannot tell is null."""
    return value if np.isfinite(value) else None


def _options(options: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Options with defaults that JSON can carry."""
    known = askable(options)
    return {k: v if not isinstance(v, float) or np.isfinite(v) else None for k, (_, v) in known.items()}
