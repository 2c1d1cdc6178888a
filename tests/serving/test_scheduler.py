"""The scheduler alone, by a clock that the tests turn: fairness, limits and accounts are properties of its answers."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.diffusion.procedure import Procedure, Query
from pipeline.serving.job import Job, Taken
from pipeline.serving.outcomes import EngineBusy
from pipeline.serving.scheduler import FIRST_GUESS_S, STRETCH, Scheduler

CHUNK = 4
CALL_S = 0.5  # what a network call takes by the clock of these tests


def query(rows: int, network: str = "main") -> Query:
    """Its rows are numbered, so that a part tells which they are."""
    return Query(torch.arange(rows, dtype=torch.float32), torch.zeros(rows), network=network)


@dataclass
class Clock:
    """An engine whose every network call takes `CALL_S`: it asks as `Engine` does, and has no thread."""

    scheduler: Scheduler
    now: float = 1000.0
    calls: list[list[Taken]] = field(default_factory=list)
    ended: dict[int, float] = field(default_factory=dict)  # when each request ended, by number
    late: list[int] = field(default_factory=list)
    left: dict[int, int] = field(default_factory=dict)  # evaluations that a request has still to ask
    networks: dict[int, str] = field(default_factory=dict)
    count: int = 0

    def submit(
        self, rows: int, evaluations: int, network: str = "main", deadline_s: float | None = None, cost: int = 0
    ) -> Job:
        deadline = None if deadline_s is None else self.now + deadline_s
        job = Job(self.count, _unbuilt, rows, cost or rows * evaluations, deadline)
        self.count += 1
        self.scheduler.add(job, self.now)
        self.left[job.number], self.networks[job.number] = evaluations, network
        return job

    def turn(self) -> list[Taken]:
        """A turn of the engine; what was called."""
        for job in self.scheduler.expire(self.now):
            self.late.append(job.number)
            self.end(job)
        for job in self.scheduler.admit(self.now):
            self.scheduler.ask(job, query(job.rows, self.networks[job.number]))
        taken = self.scheduler.take()
        if taken:
            self.calls.append(taken)
            self.now += CALL_S
            self.scheduler.answered(taken, CALL_S)
        for job, _ in taken:
            if job.query is not None and job.answered == job.query.rows:
                self.left[job.number] -= 1
                if self.left[job.number]:
                    self.scheduler.ask(job, query(job.rows, self.networks[job.number]))
                else:
                    self.end(job)
        return taken

    def end(self, job: Job) -> None:
        assert self.scheduler.drop(job)
        self.ended[job.number] = self.now

    def run(self) -> None:
        while self.scheduler.jobs:
            served, waited = self.turn(), self.scheduler.jobs
            assert served or not waited, "somebody waits and nobody is served"


def _unbuilt() -> Procedure[None]:
    raise AssertionError("the scheduler builds nothing")


@pytest.fixture
def clock() -> Clock:
    made = Clock(Scheduler(CHUNK, max_live_rows=256, max_owed=10**6))
    made.submit(CHUNK, 1)
    made.run()  # it knows how long a call takes
    assert made.scheduler.call_s == CALL_S
    return made


def rows_of(taken: Iterable[Taken]) -> int:
    return sum(part.rows for _, part in taken)


def networks_of(calls: Iterable[list[Taken]]) -> list[str]:
    return [taken[0][1].network for taken in calls]


# --- who goes first ---------------------------------------------------------------------------------------------------


def test_a_small_request_passes_a_large_one(clock: Clock) -> None:
    large, small = clock.submit(24, 10), clock.submit(1, 3)
    clock.run()
    # three calls, and each of them answers the large one as well
    assert clock.ended[small.number] == pytest.approx(1000 + 4 * CALL_S)
    assert clock.ended[large.number] == clock.now
    assert clock.scheduler.padded_rows < CHUNK


def test_none_waits_for_ever(clock: Clock) -> None:
    """From the moment a request is due, every call serves it first, whatever comes, also while it has not started."""
    for rows in (24, 300):  # 300 images start alone
        clock.run()
        large, came = clock.submit(rows, 5), clock.now
        due = came + STRETCH * 5 * rows * CALL_S / CHUNK
        assert large.due == pytest.approx(due)
        while large.number not in clock.ended:  # small ones without a pause
            clock.submit(2, 2)
            taken = clock.turn()
            if large.started_s is not None and clock.now > due + CALL_S:
                assert taken[0][0] is large
        assert clock.ended[large.number] - due <= (5 * rows + 256 * 2) * CALL_S / CHUNK


def test_equal_requests_end_in_the_order_they_came(clock: Clock) -> None:
    jobs = [clock.submit(2, 5) for _ in range(30)]
    clock.run()
    assert [number for number in clock.ended if number >= jobs[0].number] == [job.number for job in jobs]


def test_a_deadline_hastens_but_never_a_request_without_a_chance(clock: Clock) -> None:
    alone_s = 100 * CALL_S / CHUNK
    due = {
        after: clock.submit(1, 100, deadline_s=after * alone_s).due - clock.now for after in (0.5, 1.5, 3, 4.5, 6, 100)
    }
    # as early as leaves its own time before the deadline, yet not before that time has passed once, nor later than any
    assert due == pytest.approx({a: alone_s * min(STRETCH, max(1.0, a - 1)) for a in due})


@pytest.mark.parametrize("kinds", [2, 3, 5])
@pytest.mark.parametrize("rows", [1, CHUNK, 5 * CHUNK])
def test_what_cannot_share_a_call_takes_turns_however_much_each_asks(clock: Clock, kinds: int, rows: int) -> None:
    """Also where each kind has more rows than a call takes, and where one of them is due long before the others."""
    clock.calls.clear()
    for kind in range(kinds):
        for _ in range(1 + kind):
            clock.submit(rows, 40, network=f"net {kind}", deadline_s=10**6 if kind else 10**4)
    served = networks_of(clock.turn() for _ in range(6 * kinds))
    for start in range(0, len(served), kinds):
        assert len(set(served[start : start + kinds])) == kinds, served


def test_a_kind_that_comes_later_is_not_behind_those_that_were_served(clock: Clock) -> None:
    for _ in range(3):
        clock.submit(5 * CHUNK, 100, network="first")
        clock.submit(5 * CHUNK, 100, network="second")
    for _ in range(7):
        clock.turn()
    clock.submit(1, 2, network="third")
    served = networks_of(clock.turn() for _ in range(4))
    assert served[0] == "third"
    assert served.count("third") == 2


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_request_is_refused_where_too_much_is_owed_and_never_for_its_own_size() -> None:
    scheduler = Scheduler(CHUNK, 256, max_owed=100)
    clock = Clock(scheduler)
    first = clock.submit(1, 1000)
    with pytest.raises(EngineBusy, match="1000 row evaluations are queued; 1 more would pass 100") as caught:
        clock.submit(1, 1)
    assert caught.value.retry_after_s == pytest.approx(max(1.0, 0.5 * 1000 * FIRST_GUESS_S / CHUNK))
    clock.turn()
    clock.end(first)
    assert scheduler.owed == 0
    clock.submit(1, 60)
    clock.submit(1, 40)
    with pytest.raises(EngineBusy):
        clock.submit(1, 1)
    assert len(scheduler.jobs) == 2


def test_images_in_progress_stay_within_their_limit_and_a_larger_request_runs_alone() -> None:
    clock = Clock(Scheduler(CHUNK, max_live_rows=10, max_owed=10**6))
    draw = random.Random(0)
    for _ in range(60):
        clock.submit(draw.choice([1, 3, 4, 10, 11, 30]), draw.randint(1, 4))
    while clock.scheduler.jobs:
        taken = clock.turn()
        assert clock.scheduler.live_rows <= 10 or clock.scheduler.live == 1
        assert taken, "somebody waits and nobody is served"


def test_deadlines_end_waiting_and_live_requests_once_at_their_time() -> None:
    clock = Clock(Scheduler(CHUNK, max_live_rows=1, max_owed=10**6))
    live = clock.submit(1, 1000, deadline_s=6.2)
    clock.turn()
    waiting, other = clock.submit(1, 1, deadline_s=2.7), clock.submit(1, 2, deadline_s=10**6)
    clock.run()
    assert clock.late == [waiting.number, live.number]
    assert clock.ended[waiting.number] - 1000 == pytest.approx(3.5)  # the first turn after 3.2
    assert clock.ended[live.number] - 1000 == pytest.approx(6.5)
    assert waiting.started_s is None
    assert clock.ended[other.number] == clock.now
    assert clock.scheduler.expire(clock.now + 10**7) == []


def test_the_pace_follows_the_calls_and_the_fastest_is_one_whole_call(clock: Clock) -> None:
    scheduler = clock.scheduler
    job = clock.submit(CHUNK, 3)
    scheduler.ask(scheduler.admit(clock.now)[0], query(CHUNK))
    scheduler.answered(scheduler.take(), 0.1, at_once=False)
    assert scheduler.fastest_s == CALL_S
    assert scheduler.call_s == pytest.approx(0.95 * CALL_S + 0.05 * 0.1)
    scheduler.ask(job, query(CHUNK))
    scheduler.answered(scheduler.take(), 0.1)
    assert scheduler.fastest_s == 0.1


# --- accounts ---------------------------------------------------------------------------------------------------------

EVENTS = st.one_of(
    st.tuples(
        st.just("submit"),
        st.integers(1, 11),
        st.integers(1, 4),
        st.sampled_from(["main", "guide"]),
        st.one_of(st.none(), st.floats(0, 10)),
        st.integers(0, 60),
    ),
    st.tuples(st.just("turn")),
    st.tuples(st.just("cancel"), st.integers(0, 10**6)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(EVENTS, max_size=60))
def test_whatever_happens_the_accounts_are_right_and_every_row_is_answered_once(events: list[tuple[Any, ...]]) -> None:
    clock = Clock(Scheduler(CHUNK, max_live_rows=9, max_owed=10**6))
    scheduler, answered = clock.scheduler, dict[int, list[float]]()
    asked: dict[int, int] = {}

    def turn() -> None:
        taken = clock.turn()
        assert rows_of(taken) <= CHUNK
        assert len({part.kind for _, part in taken}) <= 1
        assert taken or not scheduler.jobs, "somebody waits and nobody is served"
        assert [job.due for job, _ in taken] == sorted(job.due for job, _ in taken)
        for job, part in taken:
            assert part.network == clock.networks[job.number]
            answered.setdefault(job.number, []).extend(part.y.tolist())
            asked[job.number] = job.rows

    def check() -> None:
        live = [job for job in scheduler.jobs.values() if job.started_s is not None]
        assert scheduler.owed == sum(max(job.cost - job.row_evaluations, 0) for job in scheduler.jobs.values())
        assert (scheduler.live, scheduler.live_rows) == (len(live), sum(job.rows for job in live))
        assert scheduler.live_rows <= 9 or scheduler.live == 1

    for kind, *told in events:
        if kind == "submit":
            rows, evaluations, network, deadline_s, cost = told
            clock.submit(rows, evaluations, network, deadline_s, cost)
        elif kind == "cancel" and scheduler.jobs:
            jobs = list(scheduler.jobs.values())
            clock.end(jobs[told[0] % len(jobs)])
        else:
            turn()
        check()
    while scheduler.jobs:
        turn()
        check()
    assert scheduler.owed == 0
    assert scheduler.rows == sum(map(len, answered.values()))
    assert scheduler.rows + scheduler.padded_rows == CHUNK * len(clock.calls)
    for number, rows in answered.items():
        whole = [float(row) for row in range(asked[number])]
        assert rows == (whole * (len(rows) // len(whole) + 1))[: len(rows)], "a row was left out or answered twice"
        if clock.left[number] == 0:
            assert len(rows) % len(whole) == 0
