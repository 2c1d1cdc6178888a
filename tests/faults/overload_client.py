"""The clients of an overload, in a process of their own and nicer than the endpoint. Prints `Told` as JSON."""

import argparse
import asyncio
import json
import os
import time
from dataclasses import asdict, dataclass

import aiohttp

from jobs.benchmark.serve import Answered, Traffic, client_of, closed_loop, open_loop

NICER = 5
LIVE = 3  # requests at a time that keep the endpoint full


@dataclass(frozen=True)
class Told:
    """capacity, goodput: row evaluations a second without overload and in it, taken in turns; answers: of the overload;
    noop: seconds of the health route meanwhile, as the answers' counted from when a request was due.
    """

    capacity: list[float]
    goodput: list[float]
    answers: list[Answered]
    noop: list[float]


async def noop(client: aiohttp.ClientSession, seconds: float) -> list[float]:
    """Ten a second."""

    async def one(due: float) -> float:
        async with client.get("healthz") as answer:
            await answer.read()
        assert answer.status == 200
        return time.perf_counter() - due

    tasks: list[asyncio.Task[float]] = []
    started = time.perf_counter()
    for index in range(int(10 * seconds)):
        due = started + index / 10
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(due)))
    return list(await asyncio.gather(*tasks))


async def overload(url: str, traffic: Traffic, load: float, rounds: int, seconds: float) -> Told:
    """`load` times the capacity for `rounds` times `seconds`."""
    told = Told([], [], [], [])
    async with client_of(url) as client:
        for number in range(rounds):
            rows_per_s, requests_per_s = await closed_loop(client, traffic, seconds, LIVE, lambda *_: None)
            told.capacity.append(rows_per_s)
            started = time.perf_counter()
            arriving = open_loop(client, traffic, load * requests_per_s, seconds, first=1000 * (number + 1))
            answers, health = await asyncio.gather(arriving, noop(client, seconds))
            told.goodput.append(sum(each.rows for each in answers) / (time.perf_counter() - started))
            told.answers.extend(answers)
            told.noop.extend(health)
    return told


def main() -> None:
    os.nice(NICER)
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--images", type=int)
    parser.add_argument("--load", type=float)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float)
    args = parser.parse_args()
    traffic = Traffic(("ddim",), (args.steps, args.steps), args.images)
    told = asyncio.run(overload(args.url, traffic, args.load, args.rounds, args.seconds))
    print(json.dumps(asdict(told)))


if __name__ == "__main__":
    main()
