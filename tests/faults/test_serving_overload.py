"""Four times what the endpoint can do, from clients that do not wait: it goes on doing what it can, within its limit.

The least that is asked of any machine is in the default run; the bars, which need one that does nothing else, are slow.
"""

import asyncio
import contextlib
import json
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import httpx
import psutil
import pytest

from jobs.benchmark.serve import REFUSALS, Answered, Traffic, quantile
from pipeline.model import Model, Sampling, load
from pipeline.serving.config import ServingConfig
from pipeline.serving.engine import Engine
from tests.faults.endpoint import Endpoint, serving
from tests.faults.overload_client import Told
from tests.serving.tiny import save_tiny

OVERLOAD = 4.0
DEADLINE_S = 4.0  # the stated limit
REQUEST_S = 0.2  # of network time, whatever the machine
QUEUED = 4  # requests that may be owed
IMAGES = 8
MEMORY_BYTES = 60 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    url = str(tmp_path_factory.mktemp("model") / "tiny")
    save_tiny(url)
    return load(url)


@pytest.fixture
def traffic(model: Model) -> Traffic:
    """Requests of `REQUEST_S` each on this machine, as it is now."""
    with Engine(model.networks, threads=1) as engine:
        for seed in range(2):
            engine.submit(lambda seed=seed: model.sampling([seed] * IMAGES, None, Sampling("ddim", 40))).result()
        steps = max(5, int(REQUEST_S * engine.load().rows_per_s / IMAGES))
    return Traffic(("ddim",), (steps, steps), IMAGES)


@pytest.fixture
def endpoint(model: Model, traffic: Traffic) -> Iterator[Endpoint]:
    owed = QUEUED * IMAGES * traffic.steps[0] * math.prod(model.config.image_shape[1:])
    with serving(model, ServingConfig(model="tiny", deadline_s=DEADLINE_S, max_queued_cost=owed)) as made:
        yield made


@dataclass(frozen=True)
class Seen(Told):
    """memory: bytes of the endpoint's process, every 0.2 s."""

    memory: list[int]

    @property
    def share(self) -> float:
        """The goodput as a share of the capacity, the median of the rounds."""
        return median(good / whole for good, whole in zip(self.goodput, self.capacity, strict=True))


def overloaded(endpoint: Endpoint, traffic: Traffic, rounds: int, seconds: float) -> Seen:
    asked = {
        "steps": traffic.steps[0],
        "images": traffic.images,
        "load": OVERLOAD,
        "rounds": rounds,
        "seconds": seconds,
    }
    options = [f"--{name}={value}" for name, value in asked.items()]
    command = [sys.executable, "-m", "tests.faults.overload_client", endpoint.url, *options]
    memory, process = list[int](), psutil.Process()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as clients:
        while True:
            try:
                told = json.loads(clients.communicate(timeout=0.2)[0])
                break
            except subprocess.TimeoutExpired:
                memory.append(process.memory_info().rss)
    answers = [Answered(**each) for each in told.pop("answers")]
    return Seen(**told, answers=answers, memory=memory[len(memory) // 4 :])


def shown(seen: Seen) -> str:
    accepted = [each.seconds for each in seen.answers if each.status == 200]
    refused = [each.seconds for each in seen.answers if each.status in REFUSALS]
    p50, p99 = (f"{quantile(refused, q):.4f} s (no-op {quantile(seen.noop, q):.4f} s)" for q in (0.5, 0.99))
    return (
        f"{dict(Counter(each.status for each in seen.answers))}; goodput {median(seen.goodput):.0f} rows/s, "
        f"{seen.share:.2f} of the capacity; accepted p99 {quantile(accepted, 0.99):.2f} s of {DEADLINE_S} s; "
        f"refused p50 {p50}, p99 {p99}; memory +{(max(seen.memory) - seen.memory[0]) >> 20} MiB"
    )


def check(endpoint: Endpoint, seen: Seen) -> None:
    """What holds on any machine."""
    print(shown(seen))
    assert {each.status for each in seen.answers} <= {200, 504, *REFUSALS}
    accepted = [each.seconds for each in seen.answers if each.status == 200]
    assert accepted
    assert sum(each.status in REFUSALS for each in seen.answers) > 0.4 * len(seen.answers), "there was no overload"
    assert quantile(accepted, 0.99) < DEADLINE_S + 1.0  # and the time of the network around it
    assert max(seen.memory) - seen.memory[0] < MEMORY_BYTES
    load = endpoint.service.engine.load()
    assert (load.live, load.waiting, load.queued_cost) == (0, 0, 0)
    assert endpoint.alive


def test_an_overload_is_refused_and_the_rest_is_answered(endpoint: Endpoint, traffic: Traffic) -> None:
    check(endpoint, overloaded(endpoint, traffic, 1, 1.5))


@pytest.mark.slow
def test_goodput_and_refusals_of_an_overload_meet_the_bars(endpoint: Endpoint, traffic: Traffic) -> None:
    seen = overloaded(endpoint, traffic, 5, 6.0)
    check(endpoint, seen)
    refused = [each.seconds for each in seen.answers if each.status in REFUSALS]
    assert seen.share >= 0.9, shown(seen)
    for q in (0.5, 0.99):
        assert quantile(refused, q) <= 2 * quantile(seen.noop, q), shown(seen)


def test_a_request_whose_deadline_passes_in_the_queue_takes_no_step(model: Model) -> None:
    """It slows down as it begins: a request that it knows to be too long it refuses at once."""
    config = ServingConfig(model="tiny", deadline_s=0.5, max_live_images=8)
    with serving(model, config) as endpoint, contextlib.ExitStack() as stack:
        engine = endpoint.service.engine
        slowed = model.denoiser.network.register_forward_hook(lambda *_: time.sleep(0.05))
        stack.callback(slowed.remove)

        async def run() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=endpoint.url, timeout=60) as client:
                body = {"n": 8, "sampler": "ddim", "steps": 50}
                asked = [client.post("/v1/images/generations", json=body) for _ in range(6)]
                return list(await asyncio.gather(*asked))

        calls = engine.load().calls
        answers = asyncio.run(run())
        assert {answer.status_code for answer in answers} == {504}
        told = [answer.json()["error"]["message"] for answer in answers]
        taken = [int(each.split("after ")[1].split()[0]) for each in told]
        waiting = sum(sorted(taken)[:-1])  # the last may begin in the instant between the first's deadline and its own
        assert waiting <= 3, told
        assert engine.load().calls - calls <= sum(taken) + 1
        assert engine.load().expired == 6
