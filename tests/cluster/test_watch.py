"""When workers stand still, and when they only take their time."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cluster.watch import PATIENCE, STEPPING, Sign, Watch, stacks

FACTOR, FLOOR_S = 20.0, 5.0


def sign(rank: int = 0, steps: int = 0, doing: str = STEPPING, pid: int | None = None) -> Sign:
    return Sign(rank, 100 + rank if pid is None else pid, "node", steps, 1000 + steps, doing)


def stepping(ranks: int = 2, step_s: float = 1.0, steps: int = 20) -> tuple[Watch, float]:
    """A group that moved until the time that is returned."""
    watch = Watch(FACTOR, FLOOR_S)
    for step in range(1, steps + 1):
        for rank in range(ranks):
            watch.see(sign(rank, step), step * step_s)
    return watch, steps * step_s


def keep_signing(watch: Watch, start: float, until: float, *signs: Sign) -> None:
    now = start
    while now <= until:
        for one in signs:
            watch.see(one, now)
        now += 1.0


def test_no_step_for_the_factor_times_the_median() -> None:
    watch, now = stepping(step_s=1.0)
    keep_signing(watch, now, now + FACTOR, sign(0, 20), sign(1, 20))
    assert watch.verdict(now + FACTOR) is None
    keep_signing(watch, now + FACTOR, now + FACTOR + 1, sign(0, 20), sign(1, 20))
    found = watch.verdict(now + FACTOR + 1)
    assert found is not None
    assert found.reason == "no step for 21 s; a step takes 1 s; rank 0 in step 1020, rank 1 in step 1020"
    assert {worker.pid for worker in found.workers} == {100, 101}


def test_short_steps_are_given_the_floor() -> None:
    watch, now = stepping(step_s=0.01)
    keep_signing(watch, now, now + FLOOR_S, sign(0, 20), sign(1, 20))
    assert watch.verdict(now + FLOOR_S) is None
    assert watch.verdict(now + FLOOR_S + 0.1) is not None


def test_a_stopped_process_is_named() -> None:
    watch, now = stepping()
    keep_signing(watch, now, now + FLOOR_S + 1, sign(0, 20))
    found = watch.verdict(now + FLOOR_S + 1)
    assert found is not None
    assert found.reason == "rank 1 gave no sign for 6 s"


@pytest.mark.parametrize("doing", ["evaluate", "sample", "save"])
def test_one_rank_that_does_something_else_is_waited_for(doing: str) -> None:
    watch, now = stepping(step_s=0.1)
    busy = sign(0, 20, doing)
    keep_signing(watch, now, now + PATIENCE * FLOOR_S, busy, sign(1, 20))
    assert watch.verdict(now + PATIENCE * FLOOR_S - 1) is None
    assert watch.verdict(now + PATIENCE * FLOOR_S + 1) is not None
    watch, now = stepping(step_s=0.1)
    keep_signing(watch, now, now + 40, busy, sign(1, 20))
    keep_signing(watch, now + 40, now + 40 + FLOOR_S - 1, sign(0, 20), sign(1, 20))  # done: the clock starts anew
    assert watch.verdict(now + 40 + FLOOR_S - 1) is None


def test_the_first_steps_may_take_long() -> None:
    watch = Watch(FACTOR, FLOOR_S)
    keep_signing(watch, 0, PATIENCE * FLOOR_S, sign(0, 0, "start"))
    assert watch.verdict(PATIENCE * FLOOR_S) is None


def test_a_new_group_and_one_that_ended_are_not_judged_by_the_old() -> None:
    watch, now = stepping()
    watch.left(0)
    watch.left(1)
    assert watch.verdict(now + 1e6) is None
    watch, now = stepping(ranks=3)
    watch.see(sign(0, 0, "start", pid=7), now + 1e6)  # the group came back with one rank less
    watch.see(sign(1, 0, "start", pid=8), now + 1e6)
    assert watch.verdict(now + 1e6 + 1) is None
    assert set(watch.signs) == {0, 1}


def test_a_floor_of_0_never_judges() -> None:
    watch = Watch(FACTOR, 0.0)
    watch.see(sign(), 0.0)
    assert watch.verdict(1e9) is None


@given(st.lists(st.floats(0.01, 10.0), min_size=3, max_size=60), st.integers(1, 4))
def test_a_group_whose_steps_stay_within_the_limit_is_never_judged(step_s: list[float], ranks: int) -> None:
    """Whatever the course of its step times, as long as each is below floor and factor."""
    watch, now = Watch(1000.0, 10.1), 0.0
    times = [0.0]
    for seconds in step_s:
        times.append(times[-1] + seconds)
    for step, (begin, end) in enumerate(pairwise(times), 1):
        now = begin
        while now < end:
            for rank in range(ranks):
                watch.see(sign(rank, step), now)
            assert watch.verdict(now) is None
            now += 0.5


def test_stacks_name_threads_and_lines() -> None:
    told: Any = stacks()
    assert "MainThread:" in told
    assert "test_stacks_name_threads_and_lines" in told
