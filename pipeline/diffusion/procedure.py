"""Procedures ask, they never call the network.

A sampler or a likelihood estimator is a generator that yields a `Query` and receives an `Answer`. `drive` answers one procedure
to its end; an engine answers the queries of many at once through the same `answer_queries`.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.diffusion.conditioning import Conditioning, concatenate
from pipeline.diffusion.denoiser import Denoiser, Prediction

Result = TypeVar("Result")


@dataclass(frozen=True)
class Query:
    """A question to a network: x_hat at (y, gamma).

    y: (n, ...) in coordinates where alpha = 1; gamma: (n,), one level a row; network: 'main', or 'guide' for auto-guidance.
    probes: (k, n, ...) vectors e; the answer then holds the k vector-Jacobian products e^T d x_hat / d y.
    A query's tensors are valid until the procedure is resumed, which may overwrite them.
    """

    y: Tensor
    gamma: Tensor
    conditioning: Conditioning = field(default_factory=Conditioning)
    network: str = "main"
    probes: Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Answer:
    """x_hat: (n, ...); variance: (n, ...) learned-variance head or None; products: (k, n, ...) where probes were asked."""

    x_hat: Tensor
    variance: Tensor | None = None
    products: Tensor | None = None


Procedure = Generator[Query, Answer, Result]


def _call(denoiser: Denoiser, query: Query) -> Answer:
    """One network call, exactly the query's rows."""
    if query.probes is None:
        prediction = denoiser(query.y, query.gamma, query.conditioning)
        return Answer(prediction.x_hat, prediction.variance)
    with torch.enable_grad():
        y = query.y.detach().requires_grad_()
        prediction: Prediction = denoiser(y, query.gamma, query.conditioning)
        last = len(query.probes) - 1
        products = [
            torch.autograd.grad(prediction.x_hat, y, probe, retain_graph=index < last)[0]
            for index, probe in enumerate(query.probes)
        ]
    variance = None if prediction.variance is None else prediction.variance.detach()
    return Answer(prediction.x_hat.detach(), variance, torch.stack(products))


def _join(queries: Sequence[Query]) -> Query:
    if len(queries) == 1:
        return queries[0]
    probes = [q.probes for q in queries if q.probes is not None]
    return Query(
        y=torch.cat([q.y for q in queries]),
        gamma=torch.cat([q.gamma for q in queries]),
        conditioning=concatenate([q.conditioning for q in queries]),
        network=queries[0].network,
        probes=torch.cat(probes, dim=1) if probes else None,
    )


def _rows(query: Query, start: int, count: int) -> Query:
    """Rows start..start+count, the last row repeated where the query is shorter."""
    index = torch.arange(start, start + count, device=query.y.device).clamp(max=query.rows - 1)
    return Query(
        query.y[index],
        query.gamma[index],
        query.conditioning[index],
        query.network,
        None if query.probes is None else query.probes[:, index],
    )


def _answer_chunked(denoiser: Denoiser, query: Query, chunk: int) -> Answer:
    """The same answer through calls of exactly `chunk` rows, the last one padded."""
    parts = [_call(denoiser, _rows(query, start, chunk)) for start in range(0, query.rows, chunk)]
    n = query.rows
    variances = [p.variance for p in parts if p.variance is not None]
    products = [p.products for p in parts if p.products is not None]
    return Answer(
        torch.cat([p.x_hat for p in parts])[:n],
        torch.cat(variances)[:n] if variances else None,
        torch.cat(products, dim=1)[:, :n] if products else None,
    )


def _split(answer: Answer, queries: Sequence[Query]) -> list[Answer]:
    answers, start = [], 0
    for query in queries:
        rows = slice(start, start + query.rows)
        answers.append(
            Answer(
                answer.x_hat[rows],
                None if answer.variance is None else answer.variance[rows],
                None if answer.products is None else answer.products[:, rows],
            )
        )
        start += query.rows
    return answers


def answer_queries(networks: Mapping[str, Denoiser], queries: Sequence[Query], chunk: int | None = None) -> list[Answer]:
    """Answer many queries with as few network calls as their kinds allow (one a network and number of probes).

    chunk: call the network on exactly this many rows each time (the last padded). A row's floats then do not depend on what it is
    batched with; None calls once on all rows, fastest for one procedure.
    """
    answers: list[Answer | None] = [None] * len(queries)
    groups: dict[tuple[str, int, torch.Size], list[int]] = {}
    for index, query in enumerate(queries):
        probes = 0 if query.probes is None else len(query.probes)
        groups.setdefault((query.network, probes, query.y.shape[1:]), []).append(index)
    for (network, _, _), members in groups.items():
        if network not in networks:
            raise ValueError(f"this model has no network '{network}'; it has: {', '.join(networks)}")
        joined = _join([queries[i] for i in members])
        denoiser = networks[network]
        answer = _call(denoiser, joined) if chunk is None else _answer_chunked(denoiser, joined, chunk)
        for index, part in zip(members, _split(answer, [queries[i] for i in members]), strict=True):
            answers[index] = part
    return [answer for answer in answers if answer is not None]


@torch.no_grad()
def drive(procedure: Procedure[Result], networks: Mapping[str, Denoiser] | Denoiser, chunk: int | None = None) -> Result:
    """Answer a procedure until it returns; `chunk` as in `answer_queries`."""
    if isinstance(networks, Denoiser):
        networks = {"main": networks}
    try:
        query = next(procedure)
        while True:
            query = procedure.send(answer_queries(networks, [query], chunk)[0])
    except StopIteration as stop:
        return stop.value
    finally:
        procedure.close()
