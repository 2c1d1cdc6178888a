"""Step-level continuous batching: one worker thread answers the open queries of all live requests together.

A request is a procedure (any sampler, any likelihood estimator). At each turn the engine takes the rows that are
most urgent, whatever their request, sampler, step count or progress, calls the network once on exactly `chunk` rows
(padded where fewer are open) and resumes the procedures whose query is complete. So requests join and leave between two
network calls, a long query is answered over several turns, and a request's floats do not depend on its company. No Ray
and no web framework here.
"""

import heapq
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Denoiser, Prediction, Shared
from pipeline.diffusion.procedure import Answer, Procedure, Query, answer_queries, join_answers
from pipeline.serving.job import Entry, Job, OpenQueries, Progress, Taken
from pipeline.serving.outcomes import DeadlineExceeded, EngineBusy, EngineClosed, NotFinite, Outcome

T = TypeVar("T")

RATE_MEMORY = 0.05  # share of the newest network call in the running mean of their seconds
FIRST_GUESS_S = 0.01
STRETCH = 4.0


@dataclass(frozen=True)
class Load:
    """The engine's state now and its counts since it started.

    waiting, live: requests not yet started, and started; live_rows: images of the live ones; queued_cost: row
    evaluations still owed to all of them; rows_per_s: the rate of full network calls, best_rows_per_s that of the
    fastest; calls, rows, padded_rows: network calls, rows answered and rows wasted; network_s, turn_s: seconds inside
    the network, and in whole turns.
    """

    waiting: int
    live: int
    live_rows: int
    queued_cost: int
    rows_per_s: float
    best_rows_per_s: float
    calls: int
    rows: int
    padded_rows: int
    finished: int
    failed: int
    cancelled: int
    expired: int
    network_s: float
    turn_s: float


@dataclass(frozen=True)
class Inferring:
    """A denoiser in torch's inference mode, 3% faster for a small network; nothing made in it leaves but a copy."""

    denoiser: Denoiser

    def __call__(self, y: Tensor, gamma: Tensor, conditioning: Conditioning, shared: Shared = None) -> Prediction:
        if y.requires_grad:
            return self.denoiser(y, gamma, conditioning, shared)
        with torch.inference_mode():
            made = self.denoiser(y, gamma, conditioning, shared)
        return Prediction(made.x_hat.clone(), None if made.variance is None else made.variance.clone())


class Engine:
    """Answers procedures until it is closed; owns one worker thread.

    Which rows go first: a request is due at its submission plus `STRETCH` times the seconds its cost takes, earlier
    where its deadline then leaves no time, but never before those seconds have passed once; what is due first goes
    first. So small requests pass large ones, also one that needs all the time it has, equal ones are served in order,
    and none waits for ever. Queries that cannot share a call (with probes, of another network) take turns.

    networks: by name, as `Model.networks`. chunk: rows of every network call. max_live_rows: images in progress at once
    (the memory of their states); a larger request runs alone. max_queued_cost: row evaluations that may be owed before
    `submit` refuses. threads: torch threads of the worker; None keeps torch's setting.
    """

    def __init__(
        self,
        networks: Mapping[str, Denoiser],
        *,
        chunk: int = 8,
        max_live_rows: int = 256,
        max_queued_cost: int = 10_000_000,
        threads: int | None = None,
        name: str = "engine",
    ) -> None:
        if chunk < 1 or max_live_rows < 1 or max_queued_cost < 1:
            got = f"{chunk}, {max_live_rows}, {max_queued_cost}"
            raise ValueError(f"chunk, max_live_rows and max_queued_cost must be at least 1, got {got}")
        self.networks, self.chunk = {name: Inferring(network) for name, network in networks.items()}, chunk
        self.max_live_rows, self.max_queued_cost = max_live_rows, max_queued_cost
        self._threads = threads if threads is not None else torch.get_num_threads()
        self._wake = threading.Condition()
        self._numbers = itertools.count()
        # shared with callers, guarded by _wake
        self._submitted: deque[Job] = deque()
        self._left: deque[Job] = deque()  # cancelled by their owner
        self._closing: str | None = None  # "drain" or "now"
        self._broken: BaseException | None = None
        # the worker's own
        self._waiting: list[Entry] = []  # heap
        self._live: dict[int, Job] = {}
        self._open = OpenQueries()
        self._deadlines: list[tuple[float, int]] = []  # heap of (deadline, number)
        self._timed: dict[int, Job] = {}  # those of them that are not over
        self._live_rows = self._queued_cost = 0
        self._calls = self._rows = self._padded = 0
        self._finished = self._failed = self._cancelled = self._expired = 0
        self._network_s = self._turn_s = 0.0
        self._call_s = FIRST_GUESS_S  # running mean of a network call
        self._fastest_s = math.inf
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    # --- what callers use --------------------------------------------------------------------------------------------

    def submit(
        self,
        procedure: Procedure[T] | Callable[[], Procedure[T]],
        *,
        rows: int = 1,
        cost: int = 1,
        deadline_s: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        name: str = "",
    ) -> "Future[Outcome[T]]":
        """Hand over a procedure, or a function that builds it (called in the worker's thread when its turn comes).

        rows: images it makes or scores; cost: row evaluations it is expected to need; deadline_s: from now.
        on_progress is called in the worker's thread and must be quick. Cancel the returned future to close the
        procedure: it is in at most the network call that runs at that moment. A failing request fails alone, with its
        own exception.

        Raises:
            EngineBusy: the queue is full. EngineClosed: the engine was closed or has failed.
        """
        build = procedure if callable(procedure) else lambda: procedure
        deadline = None if deadline_s is None else time.monotonic() + deadline_s
        with self._wake:
            if self._broken is not None:
                raise EngineClosed(f"the engine has failed: {self._broken!r}")
            if self._closing:
                raise EngineClosed("the engine is closing and takes no more requests")
            if self._queued_cost and self._queued_cost + cost > self.max_queued_cost:
                raise EngineBusy(
                    f"{self._queued_cost} row evaluations are queued; {cost} more would pass {self.max_queued_cost}",
                    retry_after_s=max(1.0, 0.5 * self._queued_cost * self._call_s / self.chunk),
                )
            job = Job(next(self._numbers), build, rows, cost, deadline, on_progress, name)
            alone_s = cost * self._call_s / self.chunk
            job.due += STRETCH * alone_s
            if deadline is not None:
                job.due = min(job.due, max(deadline - alone_s, job.submitted_s + alone_s))
            self._queued_cost += cost
            self._submitted.append(job)
            job.future.add_done_callback(lambda future: self._leave(job) if future.cancelled() else None)
            self._wake.notify()
        return job.future

    def load(self) -> Load:
        """A snapshot; may be a turn old."""
        with self._wake:
            return Load(
                waiting=len(self._submitted) + len(self._waiting),
                live=len(self._live),
                live_rows=self._live_rows,
                queued_cost=self._queued_cost,
                rows_per_s=self.chunk / self._call_s,
                best_rows_per_s=self.chunk / min(self._fastest_s, self._call_s),
                calls=self._calls,
                rows=self._rows,
                padded_rows=self._padded,
                finished=self._finished,
                failed=self._failed,
                cancelled=self._cancelled,
                expired=self._expired,
                network_s=self._network_s,
                turn_s=self._turn_s,
            )

    @property
    def alive(self) -> bool:
        """Whether the worker runs."""
        return self._thread.is_alive() and self._broken is None

    def close(self, drain: bool = False, timeout_s: float | None = None) -> bool:
        """Take no more requests; with `drain` finish those accepted, else fail them. Returns whether all has ended."""
        with self._wake:
            self._closing = "drain" if drain and self._closing != "now" else "now"
            self._wake.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _leave(self, job: Job) -> None:
        with self._wake:
            self._left.append(job)
            self._wake.notify()

    # --- the worker --------------------------------------------------------------------------------------------------

    @torch.no_grad()  # not inference_mode: tensors made there could not be differentiated for likelihoods
    def _work(self) -> None:
        torch.set_num_threads(self._threads)  # a new thread starts with OpenMP's default, not with torch's setting
        try:
            while self._gather():
                started = time.perf_counter()
                self._turn()
                self._turn_s += time.perf_counter() - started
        except BaseException as error:  # a defect of the engine itself: nobody may wait for ever
            self._broken = error
            self._abandon(EngineClosed(f"the engine has failed: {error!r}"))
            raise
        self._abandon(EngineClosed("the engine was closed before the request was done"))

    def _gather(self) -> bool:
        """Wait for work; take in what arrived and drop what left. False when the engine is to stop."""
        with self._wake:
            while not (self._submitted or self._left or self._live or self._waiting or self._closing):
                self._wake.wait()
            for job in self._submitted:
                heapq.heappush(self._waiting, job.entry)
                if job.deadline is not None:
                    heapq.heappush(self._deadlines, (job.deadline, job.number))
                    self._timed[job.number] = job
            self._submitted.clear()
            left = list(self._left)
            self._left.clear()
            closing = self._closing
        for job in left:
            self._drop(job)
        if closing == "now":
            return False
        self._expire()
        self._admit()
        return bool(self._live or self._waiting or not closing)

    def _expire(self) -> None:
        now = time.monotonic()
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][1] not in self._timed):
            job = self._timed.get(heapq.heappop(self._deadlines)[1])
            if job is not None:
                self._fail(job, DeadlineExceeded(f"the deadline passed after {job.evaluations} network evaluations"))

    def _admit(self) -> None:
        """Start waiting requests, what is due first, while their images fit beside those in progress."""
        while self._waiting:
            job = self._waiting[0][2]
            if not job.over and self._live and self._live_rows + job.rows > self.max_live_rows:
                return
            heapq.heappop(self._waiting)
            if not job.over:
                self._start(job)

    def _start(self, job: Job) -> None:
        job.started_s = time.monotonic()
        self._live[job.number] = job
        self._live_rows += job.rows
        try:
            procedure = job.procedure = job.build()
        except Exception as error:  # a StopIteration out of it is no end of the procedure
            self._fail(job, error)
            return
        try:
            query = next(procedure)
        except StopIteration as stop:
            self._finish(job, stop.value)
        except Exception as error:
            self._fail(job, error)
        else:
            self._ask(job, query)

    def _ask(self, job: Job, query: Query) -> None:
        job.query, job.answered = query, 0
        self._open.add(job)

    def _turn(self) -> None:
        """One network call."""
        taken = self._open.take(self.chunk)
        if not taken:
            return
        started = time.perf_counter()
        answers = self._answers(taken)
        elapsed = time.perf_counter() - started
        self._call_s += RATE_MEMORY * (elapsed - self._call_s) if self._rows else elapsed - self._call_s
        if all(isinstance(answer, Answer) for answer in answers):
            self._fastest_s = min(self._fastest_s, elapsed)
        self._network_s += elapsed
        self._count(taken)
        for (job, _), answer in zip(taken, answers, strict=True):
            if job.over:
                continue
            if isinstance(answer, Exception):
                self._fail(job, answer)
            else:
                self._receive(job, answer)

    def _answers(self, taken: list[Taken]) -> Sequence[Answer | Exception]:
        """All in one call; where that fails, one by one, so that a bad request fails alone."""
        self._calls += 1
        try:
            answers = answer_queries(self.networks, [query for _, query in taken], self.chunk)
        except Exception as error:
            if len(taken) == 1:
                return [error]
            return [self._answers([each])[0] for each in taken]
        if _finite(answers):
            return answers
        wrong = "the network answered with a value that is not finite"
        return [answer if _finite([answer]) else NotFinite(wrong) for answer in answers]

    def _receive(self, job: Job, answer: Answer) -> None:
        """Rows of a job's query are answered: go on with the rest of them, or resume the procedure."""
        query, procedure = job.query, job.procedure
        if query is None or procedure is None:
            raise AssertionError(f"request {job.number} was answered without having asked")
        job.answered += answer.x_hat.shape[0]
        job.parts.append(answer)
        if job.answered < query.rows:
            self._open.add(job)
            return
        answer, job.parts = join_answers(job.parts), []
        job.evaluations += 1
        try:
            if job.on_progress is not None and query.network == "main" and query.probes is None:
                job.on_progress(Progress(job.evaluations, answer.x_hat.clone()))
            following = procedure.send(answer)
        except StopIteration as stop:
            self._finish(job, stop.value)
        except Exception as error:
            self._fail(job, error)
        else:
            self._ask(job, following)

    # --- endings -----------------------------------------------------------------------------------------------------

    def _count(self, taken: list[Taken]) -> None:
        rows = owed = 0
        for job, query in taken:
            rows += query.rows
            if not job.over:
                owed += min(query.rows, max(job.cost - job.row_evaluations, 0))
                job.row_evaluations += query.rows
        self._rows, self._padded = self._rows + rows, self._padded + self.chunk - rows
        with self._wake:
            self._queued_cost -= owed

    def _end(self, job: Job) -> None:
        """Forget a job and close its procedure; its future is the caller's to settle."""
        if job.over:
            return
        job.over = True
        procedure, job.procedure, job.query, job.parts = job.procedure, None, None, []
        if procedure is not None:
            try:
                procedure.close()
            except Exception as error:  # its own fault, and told to nobody else
                _settle(job.future, error)
        self._timed.pop(job.number, None)
        if self._live.pop(job.number, None) is not None:
            self._live_rows -= job.rows
        with self._wake:
            self._queued_cost -= max(job.cost - job.row_evaluations, 0)

    def _finish(self, job: Job, value: Any) -> None:
        now = time.monotonic()
        queued_s, run_s = job.started_s - job.submitted_s, now - job.started_s
        outcome = Outcome(value, job.evaluations, job.row_evaluations, queued_s, run_s)
        self._end(job)
        self._finished += 1
        _settle(job.future, outcome)

    def _fail(self, job: Job, error: Exception) -> None:
        if job.name:
            error.add_note(f"request {job.name}, evaluation {job.evaluations + 1}")
        self._end(job)
        if isinstance(error, DeadlineExceeded):
            self._expired += 1
        else:
            self._failed += 1
        _settle(job.future, error)

    def _drop(self, job: Job) -> None:
        if not job.over:
            self._end(job)
            self._cancelled += 1

    def _abandon(self, error: Exception) -> None:
        with self._wake:
            self._closing = "now"
            jobs = [*self._submitted, *(job for _, _, job in self._waiting), *self._live.values()]
            self._submitted.clear()
        self._waiting.clear()
        for job in jobs:
            self._end(job)
            _settle(job.future, error)


def _finite(answers: Sequence[Answer]) -> bool:
    """Whether all x_hat and products are, of answers of one kind: by one look at their sum."""
    total = torch.cat([answer.x_hat for answer in answers]).sum()
    for answer in answers:
        if answer.products is not None:
            total += answer.products.sum()
    return math.isfinite(float(total))


def _settle(future: "Future[Any]", result: object) -> None:
    try:
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
    except InvalidStateError:  # its owner cancelled it in this instant
        pass
