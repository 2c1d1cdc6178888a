"""A request inside the engine, and the queue of what the live ones ask."""

import heapq
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pipeline.diffusion.procedure import Answer, Procedure, Query


@dataclass(frozen=True)
class Progress:
    """After an evaluation of the main network: `evaluations` so far and its x_hat, (rows of the query, ...), a copy."""

    evaluations: int
    x_hat: Tensor


Entry = tuple[float, int, "Job"]  # compared as it stands: no two jobs have one number


@dataclass(eq=False, slots=True)
class Job:
    """A request. rows, cost, deadline: as in `Engine.submit`, the deadline by the engine's clock.

    What the scheduler keeps of it: when it came, started and is due (seconds of the same clock), its query and how many
    rows of that have an answer, the row evaluations it has had, and whether it is over. The rest is the engine's.
    """

    number: int
    build: Callable[[], Procedure[Any]]
    rows: int
    cost: int
    deadline: float | None = None
    on_progress: Callable[[Progress], None] | None = None
    name: str = ""
    future: Future[Any] = field(default_factory=Future)
    procedure: Procedure[Any] | None = None
    parts: list[Answer] = field(default_factory=list)  # answers to the first rows of the query
    evaluations: int = 0
    submitted_s: float = 0.0
    started_s: float | None = None  # None: it waits
    due: float = 0.0
    query: Query | None = None
    answered: int = 0
    row_evaluations: int = 0
    over: bool = False

    @property
    def entry(self) -> Entry:
        """In a heap: what is due first goes first, equals in the order they came."""
        return self.due, self.number, self

    @property
    def owed(self) -> int:
        """Row evaluations it is still expected to need."""
        return max(self.cost - self.row_evaluations, 0)


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
            if query is None:  # it has ended since
                continue
            count = min(rows, query.rows - job.answered)
            taken.append((job, query.part(job.answered, count)))
            rows -= count
        return taken
