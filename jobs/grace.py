"""How long `ray job stop` waits for a training to save itself, and whether a checkpoint fits in that time."""

import os
import time
from collections.abc import Mapping

from pipeline import storage
from pipeline.places import in_submitted_job

VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"  # read where `ray start` runs; what it submits inherits it
RAYS_DEFAULT_S = 3.0
BYTES_PER_PARAMETER = 16  # weights, average and two moments in float32
PROBE_BYTES = 4 << 20
PROBE = ".write-speed"


def warning(output: str, parameters: int, environment: Mapping[str, str] = os.environ) -> str | None:
    """Why a checkpoint of a model with so many parameters would not be saved before Ray kills the job; None where it
    would be, by a short write at `output`.
    """
    wait_s = float(environment.get(VARIABLE, RAYS_DEFAULT_S))
    size = parameters * BYTES_PER_PARAMETER
    needed_s = size / _bytes_per_second(output)
    if needed_s < wait_s:
        return None
    return (
        f"a checkpoint of about {size / 2**30:.2f} GiB takes some {needed_s:.0f} s to write at {output}, and "
        f"`ray job stop` kills after {wait_s:g} s: restart Ray's head with {VARIABLE}={2 * int(needed_s) + 10} "
        f"(infra/cluster.sh takes it from the environment), or lose what came after the newest checkpoint"
    )


def said_at_start(output: str, parameters: int) -> str | None:
    """`warning` in a submitted job; elsewhere nobody stops a job that way."""
    return warning(output, parameters) if in_submitted_job() else None


def _bytes_per_second(output: str) -> float:
    url = storage.join(output, PROBE)
    started = time.perf_counter()
    storage.write_bytes(url, bytes(PROBE_BYTES))
    seconds = time.perf_counter() - started
    storage.delete(url)
    return PROBE_BYTES / seconds
