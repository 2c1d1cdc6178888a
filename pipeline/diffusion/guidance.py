"""Guidance: procedure -> procedure. Each query is asked twice and the answers are combined; the inner procedure, which recomputes
eps_hat from its own y, does not know. An unguided procedure pays nothing."""

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import TypeVar

import torch

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
    )
    answer = yield both
    n = query.rows

    def half(rows: slice) -> Answer:
        return Answer(
            answer.x_hat[rows],
            None if answer.variance is None else answer.variance[rows],
            None if answer.products is None else answer.products[:, rows],
        )

    return _extrapolate(half(slice(n, None)), half(slice(n)), scale)


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
