"""Scale by simulation: listing millions of entries, and what a resume costs."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.data.reading import blocks, stream
from pipeline.data.reading.stream import StreamConfig
from pipeline.data.sets.manifest import Manifest

LISTING = """
import sys, time
from pathlib import Path
from pipeline import storage
from pipeline.data.making import shards
from pipeline.data.config import ShardConfig

count = int(sys.argv[1])

def peak_mib():  # of this process alone: what getrusage says is inherited from the parent
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) >> 10

def listed(url, odd=False):
    for i in range(count):
        yield storage.Entry(f"class{i % 1000:04d}/image-{i:012d}.jpg", 100_000 + i % 1000)

before = peak_mib()
storage.list_files = listed
began = time.monotonic()
work = shards.plan(ShardConfig(sys.argv[2], sys.argv[2] + "/set", image_size=64))
seconds = time.monotonic() - began
assert work.listed == count
task = work.slice(work.indices[-1] // 2)
assert len(task.units) == work.config.slice_size, len(task.units)
seen = set()
for index in range(0, len(work.indices), max(1, len(work.indices) // 20)):
    for unit in work.slice(index).units:
        assert unit.path not in seen
        seen.add(unit.path)
work.close()
print(before, peak_mib(), round(seconds, 1))
"""


@pytest.mark.parametrize("count", [100_000, pytest.param(10_000_000, marks=pytest.mark.slow)])
def test_listing_and_planning_stream(tmp_path: Path, count: int) -> None:
    command = [sys.executable, "-c", LISTING, str(count), str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=580).stdout.split()
    before, peak, seconds = int(told[0]), int(told[1]), float(told[2])
    print(f"{count:,} entries planned in {seconds} s; peak {peak} MiB, {before} before")
    assert peak < 500


def test_a_resume_costs_what_a_start_costs(made: Callable[..., Manifest]) -> None:
    """First batch at the start and at 90% of an epoch: the shards that it needs, and the processor's time."""
    done = made(1200, 8, 1, held_out=0.0, samples_per_shard=20)
    config = StreamConfig(done.url, batch_size=12, logical_shards=2, window=2, readers=1, read_ahead_bytes=12 * 64 * 2)
    needed: dict[int, int] = {}
    seconds: dict[int, list[float]] = {0: [], 90: []}
    for _ in range(20):  # the fastest of each: some milliseconds
        for start in seconds:
            blocks.CACHE.clear()
            began = time.process_time()
            with stream.thread_stream(config, done, [0, 1], start) as source:
                assert [next(source).step, next(source).step] == [start, start]
                seconds[start].append(time.process_time() - began)
                stop = (start // source.steps_a_block + 1) * source.steps_a_block
                needed[start] = max(len(source.requests.block(part, start, stop).shards) for part in (0, 1))
    assert needed[90] <= config.window
    assert min(seconds[90]) <= 1.5 * min(seconds[0])
    ratio = min(seconds[90]) / min(seconds[0])
    print(f"first batch at 90% of an epoch: {ratio:.2f} of a fresh start's time, {needed[90]} shards a logical shard")
