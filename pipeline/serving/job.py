"""A request inside the engine, and the queue of what the live ones ask."""

import heapq
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.diffusion.procedure import Answer, Procedure, Query


@dataclass(frozen=True)
class Progress:
    """After an evaluation of the main network: `evaluations` so far and its x_hat, (rows of the query, ...), a copy."""

    evaluations: int
    x_hat: Tensor


Entry = tuple[float, int, "Job"]  # compared as it stands: no two jobs have one number


class Job:
    """A request; touched by the worker thread only, but for `future`. due: its place in the order, see `Engine`."""

    __slots__ = (
        "answered",
        "build",
        "cost",
        "deadline",
        "due",
        "evaluations",
        "future",
        "name",
        "number",
        "on_progress",
        "over",
        "parts",
        "procedure",
        "query",
        "row_evaluations",
        "rows",
        "started_s",
        "submitted_s",
    )

    def __init__(
        self,
        number: int,
        build: Callable[[], Procedure[Any]],
        rows: int,
        cost: int,
        deadline: float | None,
        on_progress: Callable[[Progress], None] | None,
        name: str,
    ) -> None:
        self.number, self.build, self.rows, self.cost = number, build, rows, cost
        self.deadline, self.on_progress, self.name = deadline, on_progress, name
        self.future: Future[Any] = Future()
        self.procedure: Procedure[Any] | None = None
        self.query: Query | None = None
        self.parts: list[Answer] = []  # answers to the first rows of the query
        self.answered = 0  # rows of the query that have one
        self.evaluations = self.row_evaluations = 0
        self.submitted_s = time.monotonic()
        self.started_s = self.submitted_s
        self.due = self.submitted_s
        self.over = False

    @property
    def entry(self) -> Entry:
        """In a heap: what is due first goes first, equals in the order they came."""
        return self.due, self.number, self


KINDS_KEPT = 1000
Taken = tuple[Job, Query]  # whose it is, and the rows of its query that are answered now


class OpenQueries:
    """What the live requests ask. The kinds take turns; within a kind the request that is due first goes first."""

    def __init__(self) -> None:
        self._heaps: dict[Hashable, list[Entry]] = {}
        self._served: dict[Hashable, int] = {}  # the turn in which a kind was last answered
        self._turns = 0

    def add(self, job: Job) -> None:
        """Rows of the job's query that have no answer yet wait from now on."""
        if job.query is None:
            raise AssertionError(f"request {job.number} asks nothing")
        heapq.heappush(self._heaps.setdefault(job.query.kind, []), job.entry)

    def take(self, rows: int) -> list[Taken]:
        """At most `rows` rows of one kind; a job whose query is longer gives a part of it."""
        kinds = list(self._heaps)
        if len(kinds) > 1:
            kinds.sort(key=lambda kind: self._served.get(kind, -1))
        for kind in kinds:
            taken = self._taken(self._heaps[kind], rows)
            if not self._heaps[kind]:
                del self._heaps[kind]
            if taken:
                self._turns += 1
                if len(self._served) > KINDS_KEPT:
                    self._served.clear()
                self._served[kind] = self._turns
                return taken
        return []

    @staticmethod
    def _taken(heap: list[Entry], rows: int) -> list[Taken]:
        taken: list[Taken] = []
        while heap and rows:
            job = heapq.heappop(heap)[2]
            query = job.query
            if job.over or query is None:
                continue
            count = min(rows, query.rows - job.answered)
            taken.append((job, query.part(job.answered, count)))
            rows -= count
        return taken
