"""Step-level against request-level batching on one network: `python -m tests.benchmarks.serving [--seconds 20]`.

Both answer the same requests (samplers mixed, 10 to 50 steps) on the same network in one thread. Request-level batching
is what `@serve.batch` gives: up to `CHUNK` waiting requests are taken together, and those of one sampler and step count
share their network calls; nobody joins until all of them are done. The two alternate; the record is one line of JSON.
"""

import argparse
import json
import platform
import queue
import random
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.diffusion.procedure import drive
from pipeline.diffusion.samplers import SAMPLERS
from pipeline.model import Model, ModelConfig, Sampling, build
from pipeline.serving.engine import Engine

CHUNK = 8
WAIT_S = 0.01  # batch_wait_timeout_s of @serve.batch
NAMES = ("heun", "ddim", "ancestral", "dpmpp_2m")


@dataclass(frozen=True)
class Asked:
    seed: int
    how: Sampling


def workload(count: int, uniform: bool) -> list[Asked]:
    draw = random.Random(1)
    return [
        Asked(seed, Sampling("ddim", 20) if uniform else Sampling(draw.choice(NAMES), draw.randint(10, 50)))
        for seed in range(count)
    ]


class RequestLevel:
    """The baseline: a worker that takes what waits, and is done with all of it before it takes more."""

    def __init__(self, model: Model) -> None:
        self.model = model
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
                seeds = [asked.seed for asked, _ in members]
                images = drive(self.model.sampling(seeds, [0] * len(seeds), members[0][0].how), self.model.networks)
                for image, (_, future) in zip(images, members, strict=True):
                    future.set_result(image)

    def close(self) -> None:
        self.waiting.put(None)
        self.thread.join()


class StepLevel:
    def __init__(self, model: Model) -> None:
        self.model = model
        self.engine = Engine(model.networks, chunk=CHUNK, threads=1)

    def submit(self, asked: Asked) -> "Future[Any]":
        cost = SAMPLERS[asked.how.sampler].evaluations(asked.how.steps)
        return self.engine.submit(lambda: self.model.sampling([asked.seed], [0], asked.how), cost=cost)

    def close(self) -> None:
        self.engine.close()


Way = Callable[[Model], "RequestLevel | StepLevel"]


def saturated(way: Way, model: Model, asked: list[Asked]) -> float:
    """Requests a second of processor time, all of them waiting: what else runs on the machine hardly changes it."""
    server = way(model)
    started = time.process_time()
    for future in [server.submit(each) for each in asked]:
        future.result()
    elapsed = time.process_time() - started
    server.close()
    return len(asked) / elapsed


def poisson(way: Way, model: Model, asked: list[Asked], rate: float) -> list[float]:
    """Latencies, seconds, of requests that arrive at `rate` a second."""
    server, draw, latencies = way(model), random.Random(2), [0.0] * len(asked)
    due = time.perf_counter()
    futures: list[Future[Any]] = []
    for index, each in enumerate(asked):
        due += draw.expovariate(rate)
        time.sleep(max(0.0, due - time.perf_counter()))

        def done(_: Future[Any], index: int = index, arrived: float = due) -> None:
            latencies[index] = time.perf_counter() - arrived

        future = server.submit(each)
        future.add_done_callback(done)
        futures.append(future)
    for future in futures:
        future.result()
    server.close()
    return latencies


def compare(model: Model, uniform: bool, seconds: float) -> dict[str, Any]:
    few = workload(24, uniform)
    rates: dict[str, list[float]] = {"step": [], "request": []}
    for _ in range(3):
        rates["step"].append(saturated(StepLevel, model, few))
        rates["request"].append(saturated(RequestLevel, model, few))
    step, request = (statistics.median(rates[name]) for name in ("step", "request"))
    many = workload(max(20, int(seconds * 0.9 * request)), uniform)
    if not seconds:
        return {"requests_per_cpu_s": {"step": step, "request": request, "ratio": step / request}}
    found: dict[str, Any] = {"requests_per_cpu_s": {"step": step, "request": request, "ratio": step / request}}
    for name, way in (("step", StepLevel), ("request", RequestLevel)):
        latencies = sorted(poisson(way, model, many, 0.9 * request))
        found[f"latency_{name}_s"] = {
            "mean": statistics.fmean(latencies),
            "p50": latencies[len(latencies) // 2],
            "p95": latencies[int(0.95 * len(latencies))],
        }
    found["mean_latency_ratio"] = found["latency_step_s"]["mean"] / found["latency_request_s"]["mean"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="length of each open-loop run (needs a quiet machine); 0: none"
    )
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = {"name": "unet", "base_width": 32, "multipliers": (1, 2), "blocks": 2, "attention_at": (4,)}
    config = ModelConfig(size=8, channels=1, classes=10, prediction="v", network=network)
    model = Model(config, build(config))
    record = {
        "what": "step-level against request-level batching, digits U-Net, one thread",
        "mixed": compare(model, uniform=False, seconds=seconds),
        "uniform": compare(model, uniform=True, seconds=seconds),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
