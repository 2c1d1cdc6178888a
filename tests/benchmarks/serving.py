"""Step-level against request-level batching on one network: `python -m tests.benchmarks.serving`, 10 minutes.

All answer the same requests on the same U-Net in one thread, an image each:

    step        the engine
    request     what `@serve.batch` gives, on our samplers: up to `CHUNK` waiting requests are taken together, those of
                one sampler and step count share their network calls, nobody joins until all of them are done
    diffusers   the same, on diffusers' own DDIMPipeline around the same U-Net exported to it (DDIM requests only)
    bare        no server at all: each request drives the network alone, one after another

Workloads: `mixed` (four samplers, 10 to 50 steps), `ddim` (10 to 50 steps), `alike` (DDIM of 20 steps: batching by
steps cannot help), `alone` (the same from one client that waits for each answer: nothing can be batched, the engine has
a chunk of one row), `alone_padded` (the same, engine and bare loop with calls of `CHUNK` rows). Throughput is requests
a second of processor time; the ways take turns, medians of ratios are told. Latencies are of Poisson arrivals at 0.9 of
the capacity of the request-level way: its rate is set again until it is busy for 0.87 to 0.93 of the time. The engine
has the same rate, 1.5 times it, and 0.9 of its own capacity (where the request-level way has no steady state). The
first tenth of the requests is left out. The clock counts processor time and idleness alone, so that what else runs on
the machine hardly matters. The record goes to results/serving.json.
"""

import argparse
import json
import os
import platform
import queue
import random
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.backbones.interchange import to_diffusers
from pipeline.backbones.table import Architecture
from pipeline.backbones.unet import UNetConfig
from pipeline.diffusion.procedure import drive
from pipeline.diffusion.sampling.samplers import SAMPLERS
from pipeline.model import Model, ModelConfig, Sampling, build
from pipeline.serving.engine import Engine

CHUNK = 8
LOAD, LOAD_WITHIN, TRIES = 0.9, 0.03, 3  # share of the time that the request-level way is busy
WAIT_S = 0.01  # batch_wait_timeout_s of @serve.batch
NAMES = ("heun", "ddim", "ancestral", "dpmpp_2m")
NETWORK = {"base_width": 32, "multipliers": (1, 2), "blocks": 2, "attention_at": (4,), "norm_groups": 8}
RESULTS = Path(__file__).parent / "results" / "serving.json"


@dataclass(frozen=True)
class Asked:
    seed: int
    how: Sampling


def workload(count: int, kind: str) -> list[Asked]:
    draw = random.Random(1)
    kinds: dict[str, Callable[[], Sampling]] = {
        "mixed": lambda: Sampling(draw.choice(NAMES), draw.randint(10, 50)),
        "ddim": lambda: Sampling("ddim", draw.randint(10, 50)),
        "alike": lambda: Sampling("ddim", 20),
    }
    return [Asked(seed, kinds[kind]()) for seed in range(count)]


# --- the ways to answer ----------------------------------------------------------------------------------------------


class RequestLevel:
    """A worker that takes what waits, and is done with all of it before it takes more; `make` answers a group."""

    def __init__(self, make: Callable[[Sequence[int], Sampling], Any]) -> None:
        self.make = make
        self.waiting: queue.Queue[tuple[Asked, Future[Any]] | None] = queue.Queue()
        self.thread = threading.Thread(target=self._work)
        self.thread.start()

    def submit(self, asked: Asked) -> "Future[Any]":
        future: Future[Any] = Future()
        self.waiting.put((asked, future))
        return future

    def _taken(self) -> list[tuple[Asked, Future[Any]]] | None:
        first = self.waiting.get()
        if first is None:
            return None
        taken, end = [first], time.monotonic() + WAIT_S
        while len(taken) < CHUNK:
            try:
                following = self.waiting.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                break
            if following is None:
                self.waiting.put(None)
                break
            taken.append(following)
        return taken

    def _work(self) -> None:
        torch.set_num_threads(1)
        while (taken := self._taken()) is not None:
            groups: dict[tuple[str, int], list[tuple[Asked, Future[Any]]]] = defaultdict(list)
            for asked, future in taken:
                groups[asked.how.sampler, asked.how.steps].append((asked, future))
            for members in groups.values():
                images = self.make([asked.seed for asked, _ in members], members[0][0].how)
                for image, (_, future) in zip(images, members, strict=True):
                    future.set_result(image)

    def close(self) -> None:
        self.waiting.put(None)
        self.thread.join()


class StepLevel:
    def __init__(self, model: Model, chunk: int = CHUNK) -> None:
        self.model = model
        self.engine = Engine(model.networks, chunk=chunk, threads=1)

    def submit(self, asked: Asked) -> "Future[Any]":
        cost = SAMPLERS[asked.how.sampler].evaluations(asked.how.steps)
        return self.engine.submit(lambda: self.model.sampling([asked.seed], None, asked.how), cost=cost)

    def close(self) -> None:
        self.engine.close()


@dataclass(frozen=True)
class Bare:
    """Answers while it is asked."""

    make: Callable[[Sequence[int], Sampling], Any]

    def submit(self, asked: Asked) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(self.make([asked.seed], asked.how))
        return future

    def close(self) -> None:
        pass


Server = RequestLevel | StepLevel | Bare
Way = Callable[[], Server]


def ours(model: Model, chunk: int | None = None) -> Callable[[Sequence[int], Sampling], Any]:
    return lambda seeds, how: drive(model.sampling(seeds, None, how), model.networks, chunk)


def theirs(model: Model) -> Callable[[Sequence[int], Sampling], Any]:
    """diffusers' DDIMPipeline around the same network."""
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    config = model.config
    architecture = Architecture(UNetConfig(**NETWORK), config.channels, config.size, 0, config.channels)
    exported = to_diffusers(architecture, model.denoiser.network.state_dict())
    unet: Any = UNet2DModel.from_config(exported.config)
    unet.eval().load_state_dict(exported.weights)
    pipe: Any = DDIMPipeline(unet, DDIMScheduler(prediction_type="v_prediction"))
    pipe.set_progress_bar_config(disable=True)

    def make(seeds: Sequence[int], how: Sampling) -> Any:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(len(seeds), generators, num_inference_steps=how.steps, output_type="np").images

    return make


# --- measuring -------------------------------------------------------------------------------------------------------


def saturated(way: Way, asked: list[Asked], at_once: bool = True) -> float:
    """Requests a second of processor time, all of them waiting, or each asked when the one before it is done."""
    server = way()
    started = time.process_time()
    if at_once:
        for future in [server.submit(each) for each in asked]:
            future.result()
    else:
        for each in asked:
            server.submit(each).result()
    elapsed = time.process_time() - started
    server.close()
    return len(asked) / elapsed


class Clock:
    """Processor time of this process, and the time that nobody had anything to do: what else runs on the machine does
    not count, an idle server does.
    """

    def __init__(self) -> None:
        self.started = time.process_time()
        self.idle = 0.0

    @property
    def busy(self) -> float:
        return time.process_time() - self.started

    def now(self) -> float:
        return self.busy + self.idle

    def wait(self, due: float, idle: Callable[[], bool]) -> None:
        while (left := due - self.now()) > 0:
            if idle():
                self.idle += left
            else:
                time.sleep(0.002)


@dataclass(frozen=True)
class Arrivals:
    """What requests that came at their own times had. rate: arrivals a second; busy: share of the time with work."""

    rate: float
    busy: float
    latencies: list[float]

    def told(self) -> dict[str, float]:
        ordered = sorted(self.latencies[len(self.latencies) // 10 :])
        quantiles = {f"p{q}_s": ordered[q * len(ordered) // 100] for q in (50, 95, 99)}
        return {"arrivals_per_s": self.rate, "busy": self.busy, "mean_s": statistics.fmean(ordered), **quantiles}


def poisson(way: Way, asked: list[Asked], rate: float) -> Arrivals:
    """Requests that arrive at `rate` a second."""
    server, draw, latencies = way(), random.Random(2), dict[int, float]()
    clock, due = Clock(), 0.0
    futures: list[Future[Any]] = []
    for index, each in enumerate(asked):
        due += draw.expovariate(rate)
        clock.wait(due, lambda: len(latencies) == len(futures))

        def done(_: Future[Any], index: int = index, arrived: float = due) -> None:
            latencies[index] = clock.now() - arrived

        future = server.submit(each)
        futures.append(future)
        future.add_done_callback(done)
    for future in futures:
        future.result()
    busy = clock.busy / clock.now()
    server.close()
    return Arrivals(len(asked) / due, busy, [latencies[index] for index in range(len(asked))])


def at_load(way: Way, asked: list[Asked]) -> Arrivals:
    """Arrivals at a rate that keeps `way` busy for `LOAD` of the time, or nearly so: how busy it was is told."""
    found = poisson(way, asked, LOAD * saturated(way, asked[:48]))
    for _ in range(TRIES):
        if abs(found.busy - LOAD) <= LOAD_WITHIN:
            break
        found = poisson(way, asked, found.rate * LOAD / found.busy)
    return found


def throughput(ways: dict[str, Way], kind: str, rounds: int, count: int, at_once: bool = True) -> dict[str, Any]:
    """Of each way, and the median of the rounds' ratios of the engine to each other."""
    asked = workload(count, kind)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name in list(ways) if turn % 2 else list(reversed(ways)):
            rates[name].append(saturated(ways[name], asked, at_once))
    found: dict[str, Any] = {f"{name}_requests_per_cpu_s": statistics.median(rates[name]) for name in ways}
    for name in ways:
        if name != "step":
            ratios = sorted(a / b for a, b in zip(rates["step"], rates[name], strict=True))
            found[f"step_over_{name}"] = {"median": statistics.median(ratios), "rounds": [round(r, 3) for r in ratios]}
    return found


def open_loop(ways: dict[str, Way], kind: str, requests: int) -> dict[str, Any]:
    """Latencies of both where the request-level way is at `LOAD`, and of the engine at 1.5 times that rate and at
    `LOAD` of its own capacity.
    """
    asked = workload(requests, kind)
    request = at_load(ways["request"], asked)
    rates = {"step": request.rate, "step_at_1.5_times_the_rate": 1.5 * request.rate}
    runs = {"request": request, **{name: poisson(ways["step"], asked, rate) for name, rate in rates.items()}}
    runs["step_at_its_own"] = poisson(ways["step"], asked, LOAD * saturated(ways["step"], asked[:48]))
    found = {name: run.told() for name, run in runs.items()}
    ratios = {
        "mean_latency": found["step"]["mean_s"] / found["request"]["mean_s"],
        "p95_at_1.5_times_the_rate": found["step_at_1.5_times_the_rate"]["p95_s"] / found["request"]["p95_s"],
    }
    return {"requests": requests, "load": request.busy, "ways": found, "step_over_request": ratios}


def overhead(model: Model, live: int = 32, calls: int = 400) -> dict[str, float]:
    """Milliseconds of processor time a call with `live` requests of one image, the network answering at once."""
    assert model.device.type == "cpu"  # known from now on: the free network has no parameters to tell it
    network, model.denoiser.network = model.denoiser.network, _Free()
    steps = calls * CHUNK // live
    asked = [Asked(seed, Sampling("ddim", steps)) for seed in range(live)]
    found: list[float] = []
    for _ in range(5):
        server = StepLevel(model)
        started = time.process_time()
        for future in [server.submit(each) for each in asked]:
            future.result()
        found.append((time.process_time() - started) / server.engine.load().calls * 1e3)
        server.close()
    model.denoiser.network = network
    return {"live": live, "ms_a_call": statistics.median(found[1:])}


class _Free(torch.nn.Module):
    def forward(self, z: torch.Tensor, *_: Any) -> torch.Tensor:
        return z


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=300, help="of each open loop")
    parser.add_argument("--rounds", type=int, default=7, help="of throughput")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = ModelConfig(size=8, channels=1, classes=0, prediction="v", network={"name": "unet", **NETWORK})
    model = Model(config, build(config))
    make, padded, pipe = ours(model), ours(model, CHUNK), theirs(model)
    both: dict[str, Way] = {"step": lambda: StepLevel(model), "request": lambda: RequestLevel(make)}
    three: dict[str, Way] = {**both, "diffusers": lambda: RequestLevel(pipe)}
    one_row: dict[str, Way] = {"step": lambda: StepLevel(model, 1), "bare": lambda: Bare(make)}
    padding: dict[str, Way] = {"step": lambda: StepLevel(model), "bare": lambda: Bare(padded)}
    record: dict[str, Any] = {
        "what": "step-level against request-level batching, digits U-Net, one thread",
        "chunk": CHUNK,
        "parameters": sum(p.numel() for p in model.denoiser.network.parameters()),
        "torch": torch.__version__,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()},
        "overhead": overhead(model),
        "throughput": {
            **{kind: throughput(three, kind, args.rounds, 24) for kind in ("alike", "ddim")},
            "mixed": throughput(both, "mixed", args.rounds, 24),
            "alone": throughput(one_row, "alike", args.rounds, 8, at_once=False),
            "alone_padded": throughput(padding, "alike", args.rounds, 8, at_once=False),
        },
        "open_loop": {kind: open_loop(both, kind, args.requests) for kind in ("mixed", "ddim")},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
