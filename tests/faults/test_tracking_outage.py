"""A real MLflow server that is killed, answers 500, hangs or has no disk left: the training does not notice, and in the
end the server holds every (key, step) exactly once.
"""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import RunConfig
from pipeline.data.making.shards import ShardConfig, shard_in_process
from pipeline.data.sets.manifest import Manifest
from pipeline.tracking import delivery, runs
from pipeline.tracking.client import connect
from pipeline.training import events as say
from tests.cluster.test_train import run_config
from tests.data.folders import write_images
from tests.faults.tracking_server import Proxy, Server, small_disk

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's own use of its libraries
    pytest.mark.skipif(os.geteuid() != 0, reason="a disk of its own for the server needs root"),
]

OUTAGE_S = {"killed": 60.0, "error": 20.0, "hang": 40.0, "full": 20.0}  # a hang is noticed after 20 s
CALM_S = 15.0
STEP_S = 0.02


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with small_disk(tmp_path / "disk") as disk:
        made = Server(disk)
        made.start()
        yield made
        made.kill()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    made = Proxy(server.port)
    yield made
    made.close()


@pytest.fixture
def data(tmp_path: Path) -> Manifest:
    write_images(tmp_path / "images", 40, 8, 1)
    return shard_in_process(ShardConfig(str(tmp_path / "images"), str(tmp_path / "set"), image_size=8, channels=1))


def config_for(tmp_path: Path, data: Manifest, uri: str) -> RunConfig:
    made = run_config(tmp_path / "run", data.url)
    return replace(made, tracking=replace(made.tracking, uri=uri))


class Training:
    """Steps of a fixed piece of work, each told to MLflow; a picture every 500."""

    def __init__(self, tracked: delivery.TrackedRun) -> None:
        self.tracked, self.step = tracked, 0
        self.matrix = torch.randn(256, 256)

    def go(self, seconds: float) -> tuple[list[float], list[float]]:
        """Wall and thread CPU seconds of each step in that time."""
        wall: list[float] = []
        own: list[float] = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            start, start_own = time.perf_counter(), time.thread_time()
            for _ in range(20):
                self.matrix @ self.matrix
            self.step += 1
            self.tracked.handle(say.Step(self.step, self.step, {"loss": 1 / self.step, "grad_norm": 1.0}))
            if self.step % 500 == 0:
                self.tracked.handle(say.Samples(self.step, self.step, torch.zeros(4, 1, 8, 8, dtype=torch.uint8)))
            wall.append(time.perf_counter() - start)
            own.append(time.thread_time() - start_own)
            time.sleep(STEP_S)
        return wall, own


def strike(what: str, server: Server, proxy: Proxy) -> None:
    if what == "killed":
        server.kill()
    elif what == "full":
        server.fill()
    else:
        proxy.mode = what


def mend(what: str, server: Server, proxy: Proxy) -> None:
    if what == "killed":
        server.start()
    elif what == "full":
        server.empty()
    else:
        proxy.mode = "pass"


def test_outages_of_a_real_server(
    tmp_path: Path, data: Manifest, server: Server, proxy: Proxy, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []

    def say_of_the_server(line: str) -> None:
        if "artifact store" not in line:  # where the disk is full, pictures fail beside metrics
            said.append(line)

    tracked = runs.open_run(config_for(tmp_path, data, proxy.url), data, say_of_the_server)
    training = Training(tracked)
    training.go(5.0)
    calm: tuple[list[float], list[float]] = ([], [])
    struck: dict[str, tuple[list[float], list[float]]] = {}
    for what, outage_s in OUTAGE_S.items():
        for total, part in zip(calm, training.go(CALM_S), strict=True):
            total += part
        before = len(said)
        strike(what, server, proxy)
        struck[what] = training.go(outage_s)
        assert len(said) == before + 1, f"{what}: {said}"
        assert "does not answer" in said[-1]
        mend(what, server, proxy)
        deadline = time.monotonic() + 120
        while len(said) < before + 2:
            assert time.monotonic() < deadline, f"{what}: {said}"
            training.go(1.0)
    assert tracked.close()
    p99 = [np.quantile(values, 0.99) for values in calm]
    ratios = {what: [np.quantile(v, 0.99) / c for v, c in zip(both, p99, strict=True)] for what, both in struck.items()}
    with capsys.disabled():
        print(f"\n{training.step} steps, struck for {OUTAGE_S} s; the proxy saw {proxy.counts}")
        print(f"p99 of a step over that of calm times (wall, own CPU): {ratios}")
    assert proxy.counts["error"] > 0
    assert proxy.counts["hang"] > 0
    client = connect(proxy.url)
    for key in ("loss", "optimizer/grad_norm"):
        counts = Counter(metric.step for metric in client.get_metric_history(tracked.run_id, key))
        assert counts == dict.fromkeys(range(1, training.step + 1), 1)
    pictures = [file.path for file in client.list_artifacts(tracked.run_id, "images") if file.path.endswith(".webp")]
    assert sorted(int(path.split("+")[2]) for path in pictures) == list(range(500, training.step + 1, 500))
    assert all(own <= 1.1 for _, own in ratios.values())


def test_a_killed_driver_loses_nothing(tmp_path: Path, data: Manifest, server: Server, proxy: Proxy) -> None:
    """The run goes on while its server is away, is killed, and its next start brings everything."""
    config = config_for(tmp_path, data, proxy.url)
    assert runs.open_run(config, data).close("KILLED")
    proxy.mode = "error"
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.tracking_driver", config.output, data.url, proxy.url],
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"100\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    proxy.mode = "pass"
    tracked = runs.open_run(config, data)
    tracked.handle(say.Step(101, 101, {"loss": 0.5}))
    assert tracked.close()
    steps = [metric.step for metric in connect(proxy.url).get_metric_history(tracked.run_id, "loss")]
    assert sorted(steps) == list(range(1, 102))
