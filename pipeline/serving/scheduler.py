"""Which requests are in progress, and which of their rows the next network call answers: the policy alone.

Time is given to it, and it starts, waits for and computes nothing: it can be read and tested without a thread, a clock
or a network.
"""

import heapq
import math

from pipeline.diffusion.procedure import Query
from pipeline.serving.job import Entry, Job, OpenQueries, Taken
from pipeline.serving.outcomes import EngineBusy

STRETCH = 4.0
RATE_MEMORY = 0.05  # share of the newest network call in the running mean of their seconds
FIRST_GUESS_S = 0.01


class Scheduler:
    """The requests of an engine, from `add` to `drop`. `now` is in seconds of one clock that never goes back.

    Which rows go first: a request is due at its submission plus `STRETCH` times the seconds its cost takes, earlier
    where its deadline then leaves no time, but never before those seconds have passed once; what is due first goes
    first. So small requests pass large ones, also one that needs all the time it has, equal ones are served in order,
    and none waits for ever. Queries that cannot share a call (with probes, of another network) take turns.

    chunk: rows of a network call. max_live_rows: images in progress at once; a larger request runs alone. max_owed: row
    evaluations that all requests may be expected to need, but for a single one.
    """

    def __init__(self, chunk: int, max_live_rows: int, max_owed: int) -> None:
        self.chunk, self.max_live_rows, self.max_owed = chunk, max_live_rows, max_owed
        self.jobs: dict[int, Job] = {}  # that are not over
        self.live = self.live_rows = 0  # of them started, and their images
        self.owed = 0  # row evaluations they are still expected to need
        self.rows = self.padded_rows = 0  # of all network calls so far
        self.call_s, self.fastest_s = FIRST_GUESS_S, math.inf  # a network call's: running mean, least
        self._waiting: list[Entry] = []  # heap
        self._deadlines: list[tuple[float, int]] = []  # heap of (deadline, number)
        self._open = OpenQueries()

    def add(self, job: Job, now: float) -> None:
        """A request comes, and is told when it is due.

        Raises:
            EngineBusy: as much is owed as may be.
        """
        if self.owed and self.owed + job.cost > self.max_owed:
            raise EngineBusy(
                f"{self.owed} row evaluations are queued; {job.cost} more would pass {self.max_owed}",
                retry_after_s=max(1.0, 0.5 * self.owed * self.call_s / self.chunk),
            )
        alone_s = job.cost * self.call_s / self.chunk
        job.submitted_s, job.due = now, now + STRETCH * alone_s
        if job.deadline is not None:
            job.due = min(job.due, max(job.deadline - alone_s, now + alone_s))
            heapq.heappush(self._deadlines, (job.deadline, job.number))
        heapq.heappush(self._waiting, job.entry)
        self.jobs[job.number] = job
        self.owed += job.cost

    def drop(self, job: Job) -> bool:
        """A request ends, however and at whatever stage. Whether it had not ended before."""
        if self.jobs.pop(job.number, None) is None:
            return False
        job.over, job.query = True, None  # the heaps that hold it pass over it
        self.owed -= job.owed
        if job.started_s is not None:
            self.live, self.live_rows = self.live - 1, self.live_rows - job.rows
        return True

    def expire(self, now: float) -> list[Job]:
        """The requests whose deadline has passed, each told once: to be dropped."""
        late: list[Job] = []
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][1] not in self.jobs):
            number = heapq.heappop(self._deadlines)[1]
            if number in self.jobs:
                late.append(self.jobs[number])
        return late

    def admit(self, now: float) -> list[Job]:
        """The requests that start now: what is due first, while their images fit beside those in progress."""
        started: list[Job] = []
        while self._waiting:
            job = self._waiting[0][2]
            if not job.over and self.live and self.live_rows + job.rows > self.max_live_rows:
                break
            heapq.heappop(self._waiting)
            if not job.over:
                job.started_s = now
                self.live, self.live_rows = self.live + 1, self.live_rows + job.rows
                started.append(job)
        return started

    def ask(self, job: Job, query: Query) -> None:
        """The rows of a live request's next query wait for their answers from now on."""
        job.query, job.answered = query, 0
        self._open.add(job)

    def take(self) -> list[Taken]:
        """The rows of the next network call, of one kind; none where nobody asks. A long query gives a part."""
        return self._open.take(self.chunk)

    def answered(self, taken: list[Taken], seconds: float, *, at_once: bool = True) -> None:
        """A network call on what was taken took so long; what is left of the queries goes on waiting. at_once: it was
        one call, and none of its requests failed by it."""
        rows = sum(query.rows for _, query in taken)
        self.call_s += RATE_MEMORY * (seconds - self.call_s) if self.rows else seconds - self.call_s
        if at_once:
            self.fastest_s = min(self.fastest_s, seconds)
        self.rows, self.padded_rows = self.rows + rows, self.padded_rows + self.chunk - rows
        for job, part in taken:
            self.owed -= job.owed
            job.row_evaluations += part.rows
            self.owed += job.owed
            job.answered += part.rows
            if job.query is not None and job.answered < job.query.rows:
                self._open.add(job)
