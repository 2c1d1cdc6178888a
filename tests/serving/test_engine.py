"""The engine: the same floats in any company, requests that come, go, fail and expire without touching the others."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from concurrent.futures import wait as wait_for
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.likelihood.estimators import ESTIMATORS
from pipeline.diffusion.procedure import Procedure, Query, drive
from pipeline.diffusion.sampling.samplers import SAMPLERS
from pipeline.model import Model, Sampling, Scoring
from pipeline.serving.engine import Engine, Progress
from pipeline.serving.job import Job, OpenQueries
from pipeline.serving.outcomes import DeadlineExceeded, EngineBusy, EngineClosed, NotFinite, Outcome

CHUNK = 4


@pytest.fixture
def engine(tiny: Model) -> Iterator[Engine]:
    with Engine(tiny.networks, chunk=CHUNK, threads=1) as made:
        yield made


@pytest.fixture
def calls(tiny: Model) -> Iterator[list[tuple[int, bool]]]:
    """(rows, with gradient) of each network call."""
    seen: list[tuple[int, bool]] = []
    handle = tiny.denoiser.network.register_forward_hook(
        lambda _, inputs, __: seen.append((len(inputs[0]), inputs[0].requires_grad))
    )
    yield seen
    handle.remove()


def steady(rows: int, evaluations: int, log: list[str] | None = None, value: float = 0.5) -> Procedure[int]:
    """A procedure that asks `evaluations` times and returns how many answers it had; `log` tells when it is closed."""
    y, gamma = torch.full((rows, 1, 8, 8), value), torch.zeros(rows, dtype=torch.float64)
    done = 0
    try:
        for _ in range(evaluations):
            yield Query(y, gamma, Conditioning(torch.zeros(rows, dtype=torch.int64)))
            done += 1
        return done
    finally:
        if log is not None:
            log.append("closed")


class Gate:
    """A request that holds the worker in its build until opened, so that others can gather behind it."""

    def __init__(self, engine: Engine) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        self.future: Future[Outcome[int]] = engine.submit(self._build)
        assert self.entered.wait(10)

    def _build(self) -> Procedure[int]:
        self.entered.set()
        assert self.open.wait(10)
        return steady(1, 1)


def sampled(model: Model, seed: int, n: int, how: Sampling) -> Callable[[], Procedure[Tensor]]:
    return lambda: model.sampling([1000 * seed + index for index in range(n)], model.conditioner.in_turn(range(n)), how)


def scored(model: Model, seed: int, n: int, how: Scoring) -> Callable[[], Procedure[Any]]:
    pixels = torch.randint(0, 256, (n, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return lambda: model.scoring(
        pixels, [1000 * seed + index for index in range(n)], model.conditioner.in_turn(range(n)), how
    )


def mixed_requests(model: Model, count: int) -> list[tuple[int, Callable[[], Procedure[Any]]]]:
    """(images, build) of all kinds of samplers, guided and not, and of estimators, with many step counts and sizes."""
    draw = random.Random(0)
    requests: list[tuple[int, Callable[[], Procedure[Any]]]] = []
    for seed in range(count):
        n = draw.choice([1, 1, 2, 5])
        if seed % 4 == 3:
            how = Scoring("vlb", {"levels": 5}) if seed % 16 != 7 else Scoring("ode", {"tolerance": 0.5})
            requests.append((n, scored(model, seed, n, how)))
        else:
            how = Sampling(draw.choice(list(SAMPLERS)), draw.randint(2, 4), guidance=draw.choice([1.0, 1.0, 1.0, 2.5]))
            requests.append((n, sampled(model, seed, n, how)))
    return requests


def floats(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.stack([value.nats, *value.parts.values()])


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mixes", [2, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_request_has_the_same_floats_alone_and_in_any_mix(tiny: Model, engine: Engine, mixes: int) -> None:
    """Also in another engine, as after a restart, and by the offline driver."""
    requests = mixed_requests(tiny, 20)
    alone = [floats(engine.submit(build, rows=n).result(60).value) for n, build in requests]
    offline = [floats(drive(build(), tiny.networks, chunk=CHUNK)) for _, build in requests[:8]]
    assert all(torch.equal(a, b) for a, b in zip(alone, offline, strict=False)), "engine and offline driver disagree"
    draw, answers, different = random.Random(1), 0, list[tuple[int, int]]()
    with Engine(tiny.networks, chunk=CHUNK, threads=1) as other:
        for mix in range(mixes):
            order = draw.sample(range(len(requests)), draw.randint(2, 6) if mix else len(requests))
            asked = engine if mix % 2 else other
            futures = {index: asked.submit(requests[index][1], rows=requests[index][0]) for index in order}
            answered = {index: floats(future.result(60).value) for index, future in futures.items()}
            different += [(mix, index) for index, value in answered.items() if not torch.equal(value, alone[index])]
            answers += len(order)
    print(f"{mixes} mixes, {answers} answers, {len(different)} of them different from the one alone")
    assert not different
    load = engine.load()
    assert load.failed == load.queued_cost == load.live_rows == 0


def test_every_sampler_and_estimator_is_served(tiny: Model, engine: Engine) -> None:
    futures: list[Future[Any]] = []
    for index, name in enumerate(SAMPLERS):
        futures.append(engine.submit(sampled(tiny, index, 2, Sampling(name, 3)), rows=2))
    small: dict[str, dict[str, Any]] = {"ode": {"tolerance": 0.1}, "vlb": {"levels": 4}}
    for index, name in enumerate(ESTIMATORS):
        futures.append(engine.submit(scored(tiny, index, 1, Scoring(name, small.get(name, {"steps": 5})))))
    assert all(torch.isfinite(floats(future.result(60).value)).all() for future in futures)


def test_the_network_is_called_on_whole_chunks_shared_by_all_requests(
    engine: Engine, calls: list[tuple[int, bool]]
) -> None:
    gate = Gate(engine)
    futures = [engine.submit(steady(1, evaluations)) for evaluations in (3, 5, 5, 2)]
    gate.open.set()
    assert [future.result(10).value for future in futures] == [3, 5, 5, 2]
    gate.future.result(10)
    assert {rows for rows, _ in calls} == {CHUNK}
    # 16 row evaluations: 4 calls of 4 rows, a little more where only the long ones are left; one by one 16 calls
    assert len(calls) <= 6
    load = engine.load()
    assert load.rows == 16
    assert load.padded_rows == CHUNK * len(calls) - 16


def test_a_small_request_passes_a_large_one_which_is_not_starved(engine: Engine) -> None:
    engine.submit(steady(CHUNK, 20), rows=CHUNK).result(10)  # the engine learns how long a call takes
    gate = Gate(engine)
    large = engine.submit(steady(24, 10), rows=24, cost=240)
    small = engine.submit(steady(1, 3), cost=3)
    gate.open.set()
    small.result(10)
    assert not large.done()
    before = engine.load().rows
    while not large.done():  # small ones without a pause
        wait_for([engine.submit(steady(2, 4), rows=2, cost=8) for _ in range(4)], 10)
    outcome = large.result(0)
    assert (outcome.value, outcome.evaluations, outcome.row_evaluations) == (10, 10, 240)
    assert engine.load().rows - before < 8 * 240


def test_equal_requests_are_served_in_order(engine: Engine) -> None:
    gate = Gate(engine)
    order: list[int] = []
    futures = [engine.submit(steady(2, 5), rows=2, cost=10) for _ in range(12)]
    for index, future in enumerate(futures):
        future.add_done_callback(lambda _, index=index: order.append(index))
    gate.open.set()
    wait_for(futures, 20)
    assert order == sorted(order)


def test_what_cannot_share_a_call_takes_turns(tiny: Model, engine: Engine, calls: list[tuple[int, bool]]) -> None:
    gate = Gate(engine)
    futures: list[Future[Any]] = [engine.submit(steady(CHUNK, 12), rows=CHUNK, cost=12 * CHUNK)]
    futures += [engine.submit(scored(tiny, 1, 1, Scoring("ode", {"tolerance": 0.3})), cost=10_000)]
    gate.open.set()
    wait_for(futures, 60)
    kinds = [grad for _, grad in calls[1:]]
    assert kinds[:20] == [False, True] * 10 or kinds[:20] == [True, False] * 10


@pytest.mark.parametrize("kinds", [2, 3])
def test_kinds_take_turns_also_where_each_has_more_rows_than_a_call_takes(kinds: int) -> None:
    open_queries = OpenQueries()
    for number in range(kinds):
        for index in range(2):
            job = Job(10 * number + index, lambda: steady(1, 1), 5 * CHUNK, 1, None, None, "")
            query = next(steady(5 * CHUNK, 1))
            job.query = replace(query, network=f"net {number}")
            open_queries.add(job)
    served = list[str]()
    for _ in range(4 * kinds):
        taken = open_queries.take(CHUNK)
        served.append(taken[0][1].network)
        for job, query in taken:
            job.answered += query.rows
            open_queries.add(job)
    assert all(len(set(served[start : start + kinds])) == kinds for start in range(0, len(served), kinds)), served


def test_a_query_with_probes_forms_its_own_call_and_sampling_never_pays_for_it(
    tiny: Model, engine: Engine, calls: list[tuple[int, bool]]
) -> None:
    gate = Gate(engine)
    futures: list[Future[Any]] = [engine.submit(scored(tiny, 1, 2, Scoring("ode", {"tolerance": 0.1})), rows=2)]
    futures += [engine.submit(sampled(tiny, 2, 2, Sampling(steps=5)), rows=2)]
    gate.open.set()
    wait_for(futures, 60)
    assert sum(not grad for _, grad in calls) == 1 + 9  # the gate's and Heun's
    assert any(grad for _, grad in calls)
    assert not futures[1].result().value.is_inference()


@pytest.mark.parametrize("rows", [1, 13])
def test_a_cancelled_request_has_at_most_one_more_call(tiny: Model, engine: Engine, rows: int) -> None:
    draw = random.Random(rows)
    for _ in range(15):
        log: list[str] = []
        started = threading.Event()
        future = engine.submit(steady(rows, 10_000, log), rows=rows, on_progress=lambda _, s=started: s.set())
        assert started.wait(10)
        time.sleep(draw.random() * 0.003)
        before = engine.load().calls
        assert future.cancel()
        after_told = engine.load().calls
        while engine.load().live:
            time.sleep(0.0005)
        assert log == ["closed"]
        assert engine.load().calls - after_told <= 1
        assert before <= after_told
        with pytest.raises(CancelledError):
            future.result(0)
    assert engine.load().cancelled == 15
    assert engine.load().queued_cost == 0


def test_cancelling_a_waiting_request_never_builds_it(tiny: Model) -> None:
    built: list[int] = []

    def build() -> Procedure[int]:
        built.append(1)
        return steady(1, 1)

    with Engine(tiny.networks, chunk=CHUNK, max_live_rows=1, threads=1) as engine:
        gate = Gate(engine)
        waiting = engine.submit(build)
        assert waiting.cancel()
        after = engine.submit(steady(1, 2))
        gate.open.set()
        assert after.result(10).value == 2
    assert not built


def test_a_deadline_ends_a_live_request_and_a_waiting_one_takes_no_step(tiny: Model) -> None:
    with Engine(tiny.networks, chunk=CHUNK, max_live_rows=1, threads=1) as engine:
        live = engine.submit(steady(1, 10**9), deadline_s=0.3)
        waiting = engine.submit(steady(1, 1), deadline_s=0.2)
        with pytest.raises(DeadlineExceeded, match="after 0 network evaluations"):
            waiting.result(10)
        with pytest.raises(DeadlineExceeded, match=r"after [1-9]\d* network evaluations"):
            live.result(10)
        assert engine.load().expired == 2
        assert engine.load().queued_cost == 0


def test_a_request_without_a_chance_holds_up_no_small_one(engine: Engine) -> None:
    engine.submit(steady(CHUNK, 10)).result(10)  # tells it how fast it is
    hopeless = int(10 * engine.load().rows_per_s)
    large = engine.submit(steady(CHUNK, 10**9), rows=CHUNK, cost=hopeless, deadline_s=2.0)
    engine.submit(steady(1, 20), cost=20, deadline_s=2.0).result(10)
    assert not large.done()
    large.cancel()


def failing(kind: str) -> Procedure[int]:
    query = Query(
        torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.float64), Conditioning(torch.zeros(2, dtype=torch.int64))
    )
    yield query
    if kind == "nan":
        yield Query(torch.full_like(query.y, float("nan")), query.gamma, query.conditioning)
    elif kind == "label":
        yield Query(query.y, query.gamma, Conditioning(torch.full((2,), 99)))
    elif kind == "network":
        yield Query(query.y, query.gamma, query.conditioning, network="missing")
    raise ZeroDivisionError("in the procedure")


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("nan", NotFinite, "not finite"),
        ("label", IndexError, "index out of range"),
        ("network", ValueError, "no network 'missing'"),
        ("raise", ZeroDivisionError, "in the procedure"),
    ],
)
def test_a_failing_request_fails_alone(
    tiny: Model, engine: Engine, kind: str, error: type[Exception], text: str
) -> None:
    how = Sampling("ddim", 6)
    reference = engine.submit(sampled(tiny, 3, 1, how)).result(30).value
    gate = Gate(engine)
    good = [engine.submit(sampled(tiny, 3, 1, how)) for _ in range(3)]
    bad = engine.submit(failing(kind), rows=2, name="the bad one")
    more = [engine.submit(sampled(tiny, 3, 1, how)) for _ in range(3)]
    gate.open.set()
    with pytest.raises(error, match=text) as caught:
        bad.result(30)
    assert "the bad one, evaluation 2" in caught.value.__notes__[0]
    assert all(torch.equal(future.result(30).value, reference) for future in (*good, *more))
    assert engine.load().failed == 1
    assert engine.alive


def test_a_request_that_cannot_be_built_fails_with_its_own_error(engine: Engine) -> None:
    def build() -> Procedure[int]:
        next(iter(()))  # a StopIteration, which ends no procedure
        return steady(1, 1)

    future = engine.submit(build)
    with pytest.raises(StopIteration):
        future.result(10)
    assert engine.load().failed == 1
    assert engine.submit(steady(1, 2)).result(10).value == 2


def test_a_full_queue_refuses_and_says_when_to_come_again(tiny: Model) -> None:
    with Engine(tiny.networks, chunk=CHUNK, max_queued_cost=100, threads=1) as engine:
        gate = Gate(engine)
        first = engine.submit(steady(1, 90), cost=90)
        with pytest.raises(EngineBusy, match="91 row evaluations are queued; 20 more would pass 100") as caught:
            engine.submit(steady(1, 20), cost=20)
        assert caught.value.retry_after_s >= 1
        gate.open.set()
        first.result(30)
        assert engine.submit(steady(1, 20), cost=20).result(30).value == 20
        assert engine.load().queued_cost == 0


def test_images_in_progress_stay_within_their_limit(tiny: Model) -> None:
    most = 0
    with Engine(tiny.networks, chunk=CHUNK, max_live_rows=10, threads=1) as engine:

        def look(_: Progress) -> None:
            nonlocal most
            most = max(most, engine.load().live_rows)

        futures = [engine.submit(steady(4, 5), rows=4, on_progress=look) for _ in range(8)]
        futures.append(engine.submit(steady(30, 2), rows=30, on_progress=lambda _: None))
        assert [future.result(30).value for future in futures] == [5] * 8 + [2]
    assert most == 8


def test_progress_counts_evaluations_and_shows_x_hat(tiny: Model, engine: Engine) -> None:
    seen: list[Progress] = []
    value = engine.submit(sampled(tiny, 1, 3, Sampling("ddim", 5)), rows=3, on_progress=seen.append).result(30).value
    assert [progress.evaluations for progress in seen] == [1, 2, 3, 4, 5]
    assert torch.equal(seen[-1].x_hat, value)  # DDIM's last move goes to x_hat


def test_closing_drains_or_stops(tiny: Model) -> None:
    engine = Engine(tiny.networks, chunk=CHUNK, threads=1)
    gate = Gate(engine)
    accepted = engine.submit(steady(1, 30))
    closer = threading.Thread(target=engine.close, kwargs={"drain": True})
    closer.start()
    time.sleep(0.05)
    with pytest.raises(EngineClosed, match="closing"):
        engine.submit(steady(1, 1))
    gate.open.set()
    closer.join(20)
    assert accepted.result(0).value == 30
    assert not engine.alive

    engine, log = Engine(tiny.networks, chunk=CHUNK, threads=1), []
    future = engine.submit(steady(1, 10**9, log))
    time.sleep(0.05)
    assert engine.close(timeout_s=20)
    with pytest.raises(EngineClosed, match="before the request was done"):
        future.result(0)
    assert log == ["closed"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_defect_of_the_engine_leaves_nobody_waiting(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny.networks, chunk=CHUNK, threads=1)
    monkeypatch.setattr(engine, "_turn", lambda: 1 / 0)
    future = engine.submit(steady(1, 5))
    with pytest.raises(EngineClosed, match="the engine has failed: ZeroDivisionError"):
        future.result(10)
    engine.close(timeout_s=10)
    assert not engine.alive
    with pytest.raises(EngineClosed, match="has failed"):
        engine.submit(steady(1, 1))
