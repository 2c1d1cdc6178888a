"""Guidance and clipping: procedure -> procedure.

Guidance asks each query twice and combines the answers, clipping limits x_hat; the inner procedure, which recomputes
eps_hat from its own y, does not know. A procedure without them pays nothing.
"""

import inspect
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Annotated, TypeVar

import torch
from torch import Tensor

from pipeline.diffusion.conditioning import concatenate
from pipeline.diffusion.procedure import Answer, Procedure, Query

Result = TypeVar("Result")


def _extrapolate(reference: Answer, main: Answer, scale: float) -> Answer:
    """reference + scale (main - reference); the variance head is the main answer's."""
    products = None
    if main.products is not None and reference.products is not None:
        products = torch.lerp(reference.products, main.products, scale)
    return Answer(torch.lerp(reference.x_hat, main.x_hat, scale), main.variance, products)


def _unconditional_pair(query: Query, scale: float) -> Generator[Query, Answer, Answer]:
    """One query of 2n rows: conditional, then unconditional."""
    both = Query(
        torch.cat([query.y, query.y]),
        torch.cat([query.gamma, query.gamma]),
        concatenate([query.conditioning, query.conditioning.unconditional()]),
        query.network,
        None if query.probes is None else torch.cat([query.probes, query.probes], dim=1),
        query.shared,
    )
    answer = yield both
    n = query.rows
    return _extrapolate(answer.part(n, n), answer.part(0, n), scale)


def _guide_pair(query: Query, scale: float) -> Generator[Query, Answer, Answer]:
    """The same query to the main network and to the guide."""
    main = yield query
    guide = yield replace(query, network="guide")
    return _extrapolate(guide, main, scale)


Pair = Callable[[Query, float], Generator[Query, Answer, Answer]]


def _guided(procedure: Procedure[Result], pair: Pair, scale: float) -> Procedure[Result]:
    try:
        query = next(procedure)
        while True:
            query = procedure.send((yield from pair(query, scale)))
    except StopIteration as stop:
        return stop.value
    finally:
        procedure.close()


def classifier_free(procedure: Procedure[Result], scale: float) -> Procedure[Result]:
    """Classifier-free guidance (Ho & Salimans 2022): x_hat = x_hat(no label) + scale (x_hat(label) - x_hat(no label)).

    scale 1 is the conditional model itself, 0 the unconditional one; each query becomes 2n rows.
    """
    return _guided(procedure, _unconditional_pair, scale)


def autoguidance(procedure: Procedure[Result], scale: float) -> Procedure[Result]:
    """Auto-guidance (Karras et al. 2024): away from a weaker network, called 'guide'."""
    return _guided(procedure, _guide_pair, scale)


@dataclass(frozen=True)
class Clip:
    """How x_hat is kept in range: to [-limit, limit]; with `percentile` dynamically (Saharia et al. 2022, Imagen).

    percentile: in (0, 1]; each image is clipped to the size that this share of its pixels stays below, where that
    exceeds limit, and scaled back to limit.
    """

    limit: float = 1.0
    percentile: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.limit < math.inf:
            raise ValueError(f"clip must be above 0 and finite, got {self.limit:g}")
        if self.percentile is not None and not 0 < self.percentile <= 1:
            raise ValueError(f"clip percentile must be above 0 and at most 1, got {self.percentile:g}")

    def __call__(self, x_hat: Tensor) -> Tensor:
        """x_hat (n, ...) clipped, a new tensor."""
        if self.percentile is None:
            return x_hat.clamp(-self.limit, self.limit)
        size = torch.quantile(x_hat.flatten(1).abs(), self.percentile, dim=1).clamp(min=self.limit)
        size = size.view(-1, *[1] * (x_hat.ndim - 1))
        return x_hat.clamp(-size, size).mul_(self.limit / size)


def clipped(procedure: Procedure[Result], clip: Clip | float | None) -> Procedure[Result]:
    """The procedure told clipped x_hat only; it recomputes eps_hat from its own y. None: the procedure itself."""
    if clip is None:
        return procedure
    return _clipped(procedure, clip if isinstance(clip, Clip) else Clip(clip))


CLIP = inspect.Parameter(
    "clip",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[Clip | float | None, "x_hat is limited to [-clip, clip]; null: as the network says it"],
)  # as an option of what `clipped` is put around


def _clipped(procedure: Procedure[Result], clip: Clip) -> Procedure[Result]:
    try:
        query = next(procedure)
        while True:
            answer = yield query
            if answer.products is not None:
                raise ValueError(
                    "clip: the derivative of a clipped x_hat is not the model's; estimate likelihoods without clip"
                )
            query = procedure.send(Answer(clip(answer.x_hat), answer.variance))
    except StopIteration as stop:
        return stop.value
    finally:
        procedure.close()
