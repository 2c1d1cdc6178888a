"""How much a running endpoint carries: `python -m jobs.benchmark serve http://127.0.0.1:8000`.

First as many requests at a time as keep it full: its capacity, in rows a second (a row is one network evaluation of one
image, what all requests have in common). Then Poisson arrivals, which do not wait for answers, at shares of that
capacity: latencies from the moment a request was due, what was accepted and what was refused. The last line says how
many deployments of this size a given traffic needs. A bearer key is taken from the environment, RAYDIFFUSION_KEY.
"""

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp

GENERATE = "v1/images/generations"
LOADS = "0.25,0.5,0.75,0.9,1,2"
TIMEOUT_S = 600.0
REFUSALS = (429, 503)
LATE = 504  # the deadline passed
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Traffic:
    """What is asked. steps: least and most, uniform between; images: a request."""

    samplers: tuple[str, ...]
    steps: tuple[int, int]
    images: int
    model: str | None = None

    def body(self, index: int) -> dict[str, Any]:
        """The index-th request, the same each time."""
        draw = random.Random(index)
        asked = {"n": self.images, "sampler": draw.choice(self.samplers), "steps": draw.randint(*self.steps)}
        return {**asked, "seed": index} | ({"model": self.model} if self.model else {})


@dataclass(frozen=True)
class Answered:
    """One request: HTTP status (0: no answer), seconds since it was due, row evaluations it was given."""

    status: int
    seconds: float
    rows: int


@dataclass(frozen=True)
class Row:
    """One load. share: of the capacity, arrivals_per_s: requests due a second; the latencies, seconds, are of accepted
    requests, refused_p99_s of the refused; rows_per_s: row evaluations of accepted requests while they were due.
    """

    share: float
    arrivals_per_s: float
    accepted: int
    refused: int
    late: int
    failed: int
    rows_per_s: float
    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    refused_p99_s: float


def quantile(values: Sequence[float], q: float) -> float:
    """NaN where there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else math.nan


async def ask(client: aiohttp.ClientSession, body: dict[str, Any], due: float) -> Answered:
    """One request; `due` by time.perf_counter."""
    try:
        async with client.post(GENERATE, json=body) as answer:
            told = await answer.read()
    except (aiohttp.ClientError, TimeoutError):
        return Answered(0, time.perf_counter() - due, 0)
    seconds = time.perf_counter() - due
    return Answered(answer.status, seconds, int(json.loads(told)["row_evaluations"]) if answer.status == 200 else 0)


async def closed_loop(
    client: aiohttp.ClientSession, traffic: Traffic, seconds: float, live: int, progress: Progress
) -> tuple[float, float]:
    """Rows and requests a second with `live` requests at any time; those that begin and end within the seconds count.

    Raises:
        ValueError: not one was answered; says what the endpoint said.
    """
    started = time.perf_counter()
    warm_s, numbers = 0.2 * seconds, iter(range(1 << 62))
    done: list[tuple[float, Answered]] = []

    async def keep_asking() -> None:
        while time.perf_counter() - started < seconds:
            answered = await ask(client, traffic.body(next(numbers)), time.perf_counter())
            done.append((time.perf_counter() - started, answered))
            progress("capacity", min(int(100 * done[-1][0] / seconds), 100), 100)
            if answered.status != 200:
                await asyncio.sleep(0.05)

    await asyncio.gather(*(keep_asking() for _ in range(live)))
    counted = [(at, each) for at, each in done if each.status == 200 and at >= warm_s]
    if len(counted) < 2:
        said = sorted({each.status for _, each in done})
        raise ValueError(f"no request was answered in {seconds:g} s (HTTP {said}): give more --seconds or fewer --live")
    first, last = min(at for at, _ in counted), max(at for at, _ in counted)
    span = max(last - first, 1e-9)
    share = (len(counted) - 1) / len(counted)  # of n ends, n - 1 fall between the first and the last
    return sum(each.rows for _, each in counted) * share / span, len(counted) * share / span


async def open_loop(
    client: aiohttp.ClientSession,
    traffic: Traffic,
    rate: float,
    seconds: float,
    progress: Callable[[int, int], None] | None = None,
    first: int = 0,
) -> list[Answered]:
    """Requests that arrive at `rate` a second, whatever becomes of them; returns when each has ended."""
    draw, tasks = random.Random(first), list[asyncio.Task[Answered]]()
    due, end = time.perf_counter(), time.perf_counter() + seconds
    while (due := due + draw.expovariate(rate)) < end:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(client, traffic.body(first + len(tasks)), due)))
        if progress is not None:
            progress(len(tasks), max(len(tasks), round(rate * seconds)))
    return list(await asyncio.gather(*tasks))


def row(share: float, rate: float, seconds: float, answers: Sequence[Answered]) -> Row:
    """What a load came to."""
    accepted = [each for each in answers if each.status == 200]
    refused = [each.seconds for each in answers if each.status in REFUSALS]
    late = sum(each.status == LATE for each in answers)
    times = [each.seconds for each in accepted]
    return Row(
        share=share,
        arrivals_per_s=rate,
        accepted=len(accepted),
        refused=len(refused),
        late=late,
        failed=len(answers) - len(accepted) - len(refused) - late,
        rows_per_s=sum(each.rows for each in accepted) / max(seconds, max(times, default=0.0)),
        mean_s=statistics.fmean(times) if times else math.nan,
        p50_s=quantile(times, 0.5),
        p95_s=quantile(times, 0.95),
        p99_s=quantile(times, 0.99),
        refused_p99_s=quantile(refused, 0.99),
    )


def client_of(url: str) -> aiohttp.ClientSession:
    """As many connections as are asked for, the key of the environment; to be made where an event loop runs.

    Raises:
        ValueError: not the URL of an endpoint.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"the URL of an endpoint starts with http:// or https://, got '{url}'")
    key = os.environ.get("RAYDIFFUSION_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=TIMEOUT_S)
    return aiohttp.ClientSession(f"{url.rstrip('/')}/", headers=headers, timeout=timeout, connector=connector)


async def measure(
    url: str, traffic: Traffic, shares: Sequence[float], seconds: float, live: int, progress: Progress
) -> dict[str, Any]:
    """The record: endpoint, traffic, capacity, a row a load.

    Raises:
        ValueError: no endpoint there, or it answers nothing.
    """
    async with client_of(url) as client:
        models = await _models(client, url)
        rows_per_s, requests_per_s = await closed_loop(client, traffic, seconds, live, progress)
        table: list[Row] = []
        for number, share in enumerate(shares):
            rate = share * requests_per_s

            def show(done: int, total: int, share: float = share) -> None:
                progress(f"load {share:g}", done, total)

            answers = await open_loop(client, traffic, rate, seconds, show, first=(number + 1) << 32)
            table.append(row(share, rate, seconds, answers))
    return {
        "benchmark": "serve",
        "models": models,
        "traffic": asdict(traffic),
        "seconds": seconds,
        "live": live,
        "capacity": {"rows_per_s": rows_per_s, "requests_per_s": requests_per_s},
        "loads": [asdict(each) for each in table],
    }


async def _models(client: aiohttp.ClientSession, url: str) -> list[str]:
    try:
        async with client.get("v1/models") as answer:
            told = await answer.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ValueError(f"no endpoint answers at {url}: {error}") from error
    if answer.status != 200:
        raise ValueError(f"{url}/v1/models answers {answer.status}: {told[:200]}")
    return [entry["id"] for entry in json.loads(told)["data"]]


def sizing(record: dict[str, Any], p95_s: float | None) -> str:
    """How many deployments of this size a traffic needs, from the largest load that was carried."""
    loads = [each for each in record["loads"] if not (each["refused"] or each["late"] or each["failed"])]
    if p95_s is not None:
        loads = [each for each in loads if each["p95_s"] <= p95_s]
    asked = "nothing refused" if p95_s is None else f"nothing refused and p95 within {p95_s:g} s"
    if not loads:
        return f"no measured load had {asked}: measure smaller ones (--loads)"
    best = max(loads, key=lambda each: each["share"])
    rows = best["share"] * record["capacity"]["rows_per_s"]
    return (
        f"with {asked} it carries {rows:,.0f} rows/s (p95 {best['p95_s']:.2f} s): for A requests a second of n images "
        f"and E network evaluations each, A n E / {rows:,.0f} deployments of this size"
    )


# --- the command -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.benchmark serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", help="of the endpoint, for example http://127.0.0.1:8000")
    parser.add_argument("--loads", default=LOADS, metavar="X,...", help=f"shares of the capacity [{LOADS}]")
    parser.add_argument("--seconds", type=float, default=20.0, metavar="S", help="of each measurement [20]")
    parser.add_argument("--live", type=int, default=32, metavar="N", help="requests at a time for the capacity [32]")
    parser.add_argument("--samplers", default="heun,ddim,dpmpp_2m", metavar="NAME,...", help="[heun,ddim,dpmpp_2m]")
    parser.add_argument("--steps", default="10-50", metavar="A-B", help="of a request, or one number [10-50]")
    parser.add_argument("--images", type=int, default=1, metavar="N", help="of a request [1]")
    parser.add_argument("--model", help="which of the served models [the default one]")
    parser.add_argument("--p95", type=float, metavar="S", help="latency that is demanded of the sizing line")
    parser.add_argument("--json", action="store_true", help="the record as one line of JSON, and nothing else")
    return parser


def _traffic(args: argparse.Namespace) -> tuple[Traffic, list[float]]:
    low, _, high = args.steps.partition("-")
    try:
        steps = int(low), int(high or low)
        shares = [float(part) for part in args.loads.split(",")]
    except ValueError as error:
        raise ValueError(f"--steps takes a number or A-B, --loads numbers with commas between them: {error}") from None
    if not 1 <= steps[0] <= steps[1]:
        raise ValueError(f"--steps must be A-B with 1 <= A <= B, got {args.steps}")
    if not all(0 < share < math.inf for share in shares):
        raise ValueError(f"--loads must be positive, got {args.loads}")
    for name, value in (("--seconds", args.seconds), ("--live", args.live), ("--images", args.images)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    return Traffic(tuple(args.samplers.split(",")), steps, args.images, args.model), shares


def _show(record: dict[str, Any], p95_s: float | None) -> None:
    from rich.table import Table

    from jobs.cli import console

    capacity = record["capacity"]
    console.print(f"capacity {capacity['rows_per_s']:,.0f} rows/s, {capacity['requests_per_s']:.2f} requests/s")
    heads = ("load", "requests/s", "rows/s", "mean", "p50", "p95", "p99", "accepted", "refused", "late", "failed")
    table = Table(*heads, show_edge=False)
    for each in record["loads"]:
        seconds = [f"{each[name]:.3f} s" for name in ("mean_s", "p50_s", "p95_s", "p99_s")]
        counts = [str(each[name]) for name in ("accepted", "refused", "late", "failed")]
        head = (f"{each['share']:g}", f"{each['arrivals_per_s']:.2f}", f"{each['rows_per_s']:,.0f}")
        table.add_row(*head, *seconds, *counts)
    console.print(table)
    console.print(sizing(record, p95_s), soft_wrap=True)


def main(argv: list[str]) -> int:
    """The exit code. Raises ValueError, OSError for what a user can mend."""
    from jobs.progress import phases

    args = _parser().parse_args(argv)
    traffic, shares = _traffic(args)

    def run(progress: Progress) -> dict[str, Any]:
        return asyncio.run(measure(args.url, traffic, shares, args.seconds, args.live, progress))

    if args.json:
        print(json.dumps(run(lambda *_: None)))
        return 0
    with phases("requests") as progress:
        record = run(progress)
    _show(record, args.p95)
    return 0
