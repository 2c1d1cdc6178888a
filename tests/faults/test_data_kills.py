"""A stream under way while its reader, its consumer, its driver or a node is killed: what was read, taken together, is
what an undisturbed reader gives, and nothing is left behind.
"""

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.data.making.shards import ShardConfig, shard_in_process
from pipeline.data.reading.stream import thread_stream
from pipeline.data.sets.manifest import Manifest, load
from tests.cluster.conftest import ENVIRONMENT
from tests.data.folders import write_images
from tests.faults import data_consumer
from tests.faults.data_consumer import SHARDS, noted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray's own processes of a node that is killed
]

ROOT = Path(__file__).parents[2]
KILLS = ("reader", "consumer", "driver", "node") * 5
PATIENCE_S = 240.0
STEPS_BETWEEN = 12


@pytest.fixture
def memory() -> set[str]:
    """Shared memory there was before."""
    return set(os.listdir("/dev/shm"))


@pytest.fixture
def cluster(memory: set[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head that holds the consumer, and one node for its readers."""
    from ray.cluster_utils import Cluster

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    head = {"num_cpus": 0, "object_store_memory": 100 << 20, "resources": {"consumer": 1}}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.nodes = [made.add_node(num_cpus=1, object_store_memory=100 << 20)]  # pyright: ignore[reportAttributeAccessIssue]
    yield made
    made.shutdown()


def until(what: str, true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def tasks(name: str) -> list[psutil.Process]:
    """Processes of this machine that run a Ray task of that name."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if process.cmdline()[:1] == [f"ray::{name}"]:
                found.append(process)
        except psutil.Error:
            continue
    return found


class Reading:
    """The consumer's driver, started again where it has ended."""

    def __init__(self, address: str, done: Manifest, ledger: Path) -> None:
        self.command = [sys.executable, "-m", "tests.faults.data_consumer", address, done.url, str(ledger)]
        self.ledger = ledger
        self.starts = 0
        self.process = self.start()

    def start(self) -> "subprocess.Popen[bytes]":
        self.starts += 1
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(self.command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)

    def goes_on(self, steps: int) -> None:
        """Until so many more steps were noted."""
        target = len(noted(self.ledger)) + steps

        def there() -> bool:
            if self.process.poll() is not None:
                self.process = self.start()
            return len(noted(self.ledger)) >= target

        until(f"no {target} steps", there)


def kill(kind: str, cluster: Any, reading: Reading) -> bool:
    """Whether there was something of the kind to kill."""
    if kind == "driver":
        reading.process.kill()
        reading.process.wait()
        return True
    if kind == "node":
        cluster.remove_node(cluster.nodes.pop(), allow_graceful=False)
        cluster.nodes.append(cluster.add_node(num_cpus=1, object_store_memory=100 << 20))
        return True
    found = tasks("read_block" if kind == "reader" else "consumer")
    for process in found[:1]:
        process.kill()
    return bool(found)


def test_killed_at_random_it_reads_what_it_would_have_read(
    tmp_path: Path, memory: set[str], cluster: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images", 500, 8, 1)
    set_of = ShardConfig(
        str(tmp_path / "images"), str(tmp_path / "set"), image_size=8, channels=1, samples_per_shard=10
    )
    done = shard_in_process(set_of)
    files = sorted(str(path) for path in Path(done.url).rglob("*"))
    reading = Reading(cluster.address, done, tmp_path / "ledger")
    seed = int.from_bytes(os.urandom(4), "little")
    draw, counted = random.Random(seed), Counter[str]()
    for kind in KILLS:
        reading.goes_on(draw.randrange(2, STEPS_BETWEEN))
        until(f"no {kind} to kill", lambda kind=kind: kill(kind, cluster, reading))
        counted[kind] += 1
    reading.goes_on(STEPS_BETWEEN)
    (tmp_path / "ledger.end").touch()
    assert reading.process.wait(PATIENCE_S) == 0
    read = noted(reading.ledger)
    expected: list[list[int]] = [[] for _ in read]
    with thread_stream(data_consumer.config(done.url), load(done.url), range(SHARDS)) as near:
        for batch in islice(near, len(read) * SHARDS):
            expected[batch.step] += batch.ids.tolist()
    assert read == expected
    assert sorted(str(path) for path in Path(done.url).rglob("*")) == files
    until("a reader goes on", lambda: not tasks("read_block") and not tasks("consumer"))
    cluster.shutdown()
    assert set(os.listdir("/dev/shm")) <= memory
    with capsys.disabled():
        print(f"\nseed {seed}: {dict(counted)} killed, {reading.starts} starts, {len(read)} steps as undisturbed")
