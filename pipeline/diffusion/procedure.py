"""Procedures ask, they never call the network.

A sampler or a likelihood estimator is a generator that yields a `Query` and receives an `Answer`. `drive` answers one
procedure to its end; an engine answers the queries of many at once through the same `answer_queries`.
"""

import math
from collections.abc import Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from pipeline.diffusion.conditioning import Conditioning, concatenate
from pipeline.diffusion.denoiser import Prediction, Shared

Result = TypeVar("Result")


@dataclass(frozen=True)
class Query:
    """A question to a network: x_hat at (y, gamma).

    y: (n, ...) in coordinates where alpha = 1; gamma: (n,), one level a row; network: 'main', or 'guide' for
    auto-guidance. probes: (k, n, ...) vectors e; the answer then holds the k products e^T d x_hat / d y.
    shared: what gamma is as a number, where the procedure knows that all rows have one; of joined queries one each row.
    A query's tensors are valid until the procedure is resumed, which may overwrite them.
    """

    y: Tensor
    gamma: Tensor
    conditioning: Conditioning = field(default_factory=Conditioning)
    network: str = "main"
    probes: Tensor | None = None
    shared: Shared = None

    @property
    def rows(self) -> int:
        return self.y.shape[0]

    @property
    def kind(self) -> Hashable:
        """Queries of one kind can share a network call."""
        probes = 0 if self.probes is None else len(self.probes)
        return self.network, probes, self.y.dtype, self.y.shape[1:], self.conditioning.told

    def part(self, start: int, count: int) -> "Query":
        """Its rows start..start+count."""
        if count == self.rows:
            return self
        rows = slice(start, start + count)
        probes = None if self.probes is None else self.probes[:, rows]
        shared = self.shared[rows] if isinstance(self.shared, Sequence) else self.shared
        return Query(self.y[rows], self.gamma[rows], self.conditioning[rows], self.network, probes, shared)

    def known(self) -> Sequence[float | None]:
        """Of each row what gamma is as a number, None where that is not known."""
        return self.shared if isinstance(self.shared, Sequence) else (self.shared,) * self.rows


@dataclass(frozen=True)
class Answer:
    """x_hat: (n, ...); variance: (n, ...) learned-variance head or None; products: (k, n, ...) for probes."""

    x_hat: Tensor
    variance: Tensor | None = None
    products: Tensor | None = None

    def part(self, start: int, count: int) -> "Answer":
        """Its rows start..start+count."""
        if count == self.x_hat.shape[0]:
            return self
        rows = slice(start, start + count)
        variance = None if self.variance is None else self.variance[rows]
        return Answer(self.x_hat[rows], variance, None if self.products is None else self.products[:, rows])


Procedure = Generator[Query, Answer, Result]


class Answerer(Protocol):
    """What queries are put to: a `Denoiser`, or an oracle of `exact`. Arguments as in `Denoiser.forward`."""

    def __call__(self, y: Tensor, gamma: Tensor, conditioning: Conditioning, shared: Shared = None) -> Prediction: ...


def _call(denoiser: Answerer, query: Query) -> Answer:
    """One network call, exactly the query's rows."""
    if query.probes is None:
        prediction = denoiser(query.y, query.gamma, query.conditioning, query.shared)
        return Answer(prediction.x_hat, prediction.variance)
    with torch.enable_grad():
        y = query.y.detach().requires_grad_()
        prediction = denoiser(y, query.gamma, query.conditioning)
        last = len(query.probes) - 1
        products = [
            torch.autograd.grad(prediction.x_hat, y, probe, retain_graph=index < last)[0]
            for index, probe in enumerate(query.probes)
        ]
    variance = None if prediction.variance is None else prediction.variance.detach()
    return Answer(prediction.x_hat.detach(), variance, torch.stack(products))


def _join(queries: Sequence[Query]) -> Query:
    """All rows of queries of one kind."""
    if len(queries) == 1:
        return queries[0]
    probes = [q.probes for q in queries if q.probes is not None]
    return Query(
        y=torch.cat([q.y for q in queries]),
        gamma=torch.cat([q.gamma for q in queries]),
        conditioning=concatenate([q.conditioning for q in queries]),
        network=queries[0].network,
        probes=torch.cat(probes, dim=1) if probes else None,
        shared=[value for q in queries for value in q.known()],
    )


def _padded(query: Query, rows: int) -> Query:
    """The last row repeated where there are fewer than `rows`."""
    missing = rows - query.rows
    return _join([query, *[query.part(query.rows - 1, 1)] * missing]) if missing else query


def join_answers(parts: Sequence[Answer]) -> Answer:
    """The answer to a query from the answers to its parts, in order."""
    if len(parts) == 1:
        return parts[0]
    variances = [p.variance for p in parts if p.variance is not None]
    products = [p.products for p in parts if p.products is not None]
    return Answer(
        torch.cat([p.x_hat for p in parts]),
        torch.cat(variances) if variances else None,
        torch.cat(products, dim=1) if products else None,
    )


def _answer_chunked(denoiser: Answerer, query: Query, chunk: int) -> Answer:
    """The same answer through calls of exactly `chunk` rows, the last one padded."""
    query = replace(query, shared=query.known())  # one way to a row's coefficients, whatever the row is called with
    starts = range(0, query.rows, chunk)
    parts = [query.part(start, min(chunk, query.rows - start)) for start in starts]
    return join_answers([_call(denoiser, _padded(part, chunk)) for part in parts]).part(0, query.rows)


def _split(answer: Answer, queries: Sequence[Query]) -> list[Answer]:
    if len(queries) == 1:
        return [answer]
    sizes = [query.rows for query in queries]
    x_hats = torch.split(answer.x_hat, sizes)
    variances, products = _cut(answer.variance, sizes), _cut(answer.products, sizes, dim=1)
    return [Answer(*each) for each in zip(x_hats, variances, products, strict=True)]


def _cut(values: Tensor | None, sizes: list[int], dim: int = 0) -> Sequence[Tensor | None]:
    return [None] * len(sizes) if values is None else torch.split(values, sizes, dim)


def _answer(networks: Mapping[str, Answerer], query: Query, chunk: int | None) -> Answer:
    if query.network not in networks:
        raise ValueError(f"this model has no network '{query.network}'; it has: {', '.join(networks)}")
    denoiser = networks[query.network]
    return _call(denoiser, query) if chunk is None else _answer_chunked(denoiser, query, chunk)


def answer_queries(
    networks: Mapping[str, Answerer], queries: Sequence[Query], chunk: int | None = None
) -> list[Answer]:
    """Answer many queries with as few network calls as their kinds allow.

    chunk: call the network on exactly this many rows each time (the last padded). A row's floats then do not depend on
    what it is batched with; None calls once on all rows, fastest for one procedure.

    Raises:
        ValueError: a query names a network that the model has not.
    """
    answers: dict[int, Answer] = {}
    groups: dict[Hashable, list[int]] = {}
    for index, query in enumerate(queries):
        groups.setdefault(query.kind, []).append(index)
    for members in groups.values():
        group = [queries[i] for i in members]
        answers.update(zip(members, _split(_answer(networks, _join(group), chunk), group), strict=True))
    return [answers[index] for index in range(len(queries))]


_OTHERS = tuple(tuple(range(1, n)) for n in range(9))  # all dimensions but the first, by how many there are
_BLOCK = 64


class FiniteWatch:
    """Remembers, without waiting for the device, whether the answers of a procedure were finite.

    `check` waits once, at the end, and names the first that was not. What it remembers lies in blocks: small tensors
    that stay, each made between two images that go, would keep the allocator from giving the same memory again (three
    times the time of a step, where that happens).
    """

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._free: list[Tensor] = []

    def _place(self, like: Tensor) -> Tensor:
        """Where the sums (n,) of `like` (n, ...) may be kept."""
        free, n = self._free, like.shape[0]
        if not free or free[-1].shape[0] != n or free[-1].dtype != like.dtype:
            self._free = free = list(like.new_empty(_BLOCK, n).unbind(0))
        return free.pop()

    def note(self, query: Query, answer: Answer) -> None:
        """Keeps one sum an image, (n,): not finite where anything in it is not."""
        x_hat = answer.x_hat
        total = torch.sum(x_hat, _OTHERS[x_hat.ndim], out=self._place(x_hat))
        if answer.products is not None:
            total += answer.products.flatten(2).sum(2).sum(0)
        self._seen.append((total, query.gamma))

    def check(self) -> None:
        """Raises ValueError, naming query, level and image, where an answer was not finite."""
        if not self._seen or bool(torch.cat([total for total, _ in self._seen]).isfinite().all()):
            return
        for index, (total, gamma) in enumerate(self._seen):
            bad = (~total.isfinite()).nonzero()
            if len(bad):
                row = int(bad[0])
                value = float(gamma[row])
                raise ValueError(
                    f"the network's answer is not finite at query {index} of {len(self._seen)} (gamma {value:.4f}, "
                    f"sigma/alpha {math.exp(value / 2):.4g}), image {row}: its weights or its input are broken"
                )


@torch.no_grad()
def drive(
    procedure: Procedure[Result], networks: Mapping[str, Answerer] | Answerer, chunk: int | None = None
) -> Result:
    """Answer a procedure until it returns; `chunk` as in `answer_queries`.

    Raises:
        ValueError: an answer was not finite, named with its query and gamma; found at the end, in one look.
    """
    named: Mapping[str, Answerer] = networks if isinstance(networks, Mapping) else {"main": networks}
    watch = FiniteWatch()
    note, send = watch.note, procedure.send
    try:
        query = next(procedure)
        while True:
            answer = _answer(named, query, chunk)
            note(query, answer)
            query = send(answer)
    except StopIteration as stop:
        watch.check()
        return stop.value
    finally:
        procedure.close()
