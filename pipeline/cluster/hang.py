"""What is done with workers that stand still: their stacks go to the run's logs, and they are killed, so that Ray Train
starts the group anew from its newest checkpoint.
"""

import signal
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import storage
from pipeline.cluster.channel import EVERY_S
from pipeline.cluster.watch import Sign, Verdict

TELL_S = 15.0  # for the stacks of the workers that still give signs
KILL_S = 30.0
WORKER = "RayTrainWorker"  # in the title of such a process: its number may be another's by now


def end(channel: Any, verdict: Verdict, output: str) -> str | None:
    """Kills the workers of a verdict; where their stacks are, None where no such process was left to kill."""
    told = _told(channel, {worker.rank for worker in verdict.workers} - verdict.silent)
    states = kill(verdict.workers)
    if not any(states.values()):
        return None
    parts = [verdict.reason]
    for worker in verdict.workers:
        state = states[worker.rank] or "gone"
        parts.append(f"rank {worker.rank}, process {worker.pid}, {state}, at step {worker.step} ({worker.doing})")
        parts.append(told.get(worker.rank, "it told nothing\n"))
    name = f"hung-{verdict.workers[0].step:09d}-{datetime.now(UTC):%Y%m%dT%H%M%S}.txt"
    url = storage.join(output, f"logs/{name}")
    try:
        storage.write_bytes(url, "\n".join(parts).encode())
    except OSError as error:  # a full disk must not keep the workers from starting anew
        return f"nowhere ({error})"
    return url


def _told(channel: Any, ranks: set[int]) -> dict[int, str]:
    """rank -> stacks."""
    deadline = time.monotonic() + TELL_S
    while time.monotonic() < deadline and not ranks.issubset(ray.get(channel.told_by.remote())):
        time.sleep(EVERY_S)
    return ray.get(channel.settle.remote())


def kill(workers: Sequence[Sign]) -> dict[int, str]:
    """Kills each on its node, also a stopped one; rank -> the state it was found in, '' where it was gone."""
    asked = {worker.rank: _kill_there(worker) for worker in workers}
    done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=KILL_S)
    return {rank: _state(reference) if reference in done else "" for rank, reference in asked.items()}


def _kill_there(worker: Sign) -> Any:
    there = NodeAffinitySchedulingStrategy(worker.node, soft=False)
    return ray.remote(_kill).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(worker.pid)


def _kill(pid: int) -> str:
    try:
        process = psutil.Process(pid)
        if WORKER not in " ".join(process.cmdline()):
            return ""
        state = process.status()
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return ""
    return "" if state == psutil.STATUS_ZOMBIE else state


def _state(reference: Any) -> str:
    try:
        return ray.get(reference)
    except RayError:  # its node is gone, and so is it
        return ""
