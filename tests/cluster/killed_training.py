"""A training on a real Ray cluster that is harmed while it runs: workers, all of them, or its driver; killed or
stopped. What was done is counted, and every checkpoint is compared with those of a run left alone.
"""

import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray

from pipeline import assembly, storage
from pipeline.config import RunConfig, from_plain, to_yaml
from pipeline.training import checkpoint
from pipeline.training import events as say

ROOT = Path(__file__).parents[2]
STEPS, BATCH, SAVE_EVERY = 200, 12, 5
HANG_FLOOR_S = 12.0
PATIENCE_S = 240.0  # for anything that a test waits for
KINDS = ("worker", "all", "driver", "stop")


def run_config(output: Path, data: str, workers: int) -> RunConfig:
    """200 steps of a U-Net of two DDP buckets (the first holds 1 MiB), a checkpoint every 5."""
    images = {"images": STEPS * BATCH, "checkpoint_every_images": SAVE_EVERY * BATCH, "log_every_images": BATCH}
    network = {"name": "unet", "base_width": 32, "multipliers": [1, 2], "blocks": 1, "attention_at": []}
    return from_plain(
        {
            "name": "harmed",
            "output": str(output),
            "shard": {"source": "x", "url": data, "image_size": 8},
            "stream": {"url": data, "batch_size": BATCH, "logical_shards": 3, "readers": 1, "reader_cpus": 0.1},
            "model": {"size": 8, "channels": 1, "classes": 3, "network": network},
            "training": {**images, "warmup_images": 0, "keep": 1000, "evaluate_images": 0, "sample_images": 0},
            "cluster": {
                "workers": workers,
                "cpus_per_worker": 0.3,
                "max_failures": -1,
                "hang_floor_s": HANG_FLOOR_S,
            },
        }
    )


def train_workers() -> list[psutil.Process]:
    """The training's workers of the cluster that this process started."""
    found: list[psutil.Process] = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


class Driver:
    """`tests.cluster.train_driver` under way; `events` come as it tells them."""

    def __init__(self, config: RunConfig, folder: Path, *arguments: str, address: str | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.yaml").write_text(to_yaml(config))
        address = address or ray.get_runtime_context().gcs_address
        environment = os.environ | {"RAY_ADDRESS": address, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
        command = [sys.executable, "-m", "tests.cluster.train_driver", str(folder / "run.yaml"), *arguments]
        self.log = folder / f"driver-{time.time():.0f}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log)
        self.events: queue.Queue[tuple[float, say.Event] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(b"{"):
                self.events.put((time.time(), say.decode(line.decode())))
        self.process.stdout.close()
        self.events.put(None)

    def next(self, patience_s: float = PATIENCE_S) -> tuple[float, say.Event] | None:
        """The next event and when it came; None at the end."""
        try:
            return self.events.get(timeout=patience_s)
        except queue.Empty:
            raise AssertionError(f"no event for {patience_s:.0f} s: {self.log.read_text()[-2000:]}") from None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class Harm:
    """One injection: at which step it was known to be, what was hit, and seconds to the next finished step."""

    kind: str
    step: int
    pids: list[int]
    next_step_s: float = float("nan")


@dataclass
class Course:
    """What happened to one run."""

    harms: list[Harm] = field(default_factory=list)
    started_from: list[int] = field(default_factory=list)
    hung: list[say.Hung] = field(default_factory=list)
    finished: say.Finished | None = None

    def see(self, event: say.Event) -> None:
        match event:
            case say.Started():
                self.started_from.append(event.step)
            case say.Hung():
                self.hung.append(event)
            case say.Finished():
                self.finished = event
            case _:
                pass


def harm(kind: str, driver: Driver, dice: random.Random) -> list[int]:
    """Does it, and proves it: the processes hit are gone, or stopped."""
    workers = train_workers()
    assert workers
    hit = {"worker": [dice.choice(workers)], "stop": [dice.choice(workers)], "all": workers, "driver": []}[kind]
    for process in hit:
        process.send_signal(signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
    if kind == "driver":
        driver.kill()
        return [driver.process.pid]
    deadline = time.monotonic() + 10
    while not all(_is_hit(process, kind) for process in hit):
        assert time.monotonic() < deadline, f"{hit} live on"
        time.sleep(0.01)
    return [process.pid for process in hit]


def _is_hit(process: psutil.Process, kind: str) -> bool:
    try:
        return process.status() == (psutil.STATUS_STOPPED if kind == "stop" else psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return kind != "stop"


def run(config: RunConfig, folder: Path, harms: Sequence[tuple[int, str]], dice: random.Random) -> Course:
    """The run to its end, harmed as soon as each step is heard of. harms: (step, kind), steps ascending."""
    course, left, struck = Course(), list(harms), 0.0
    driver = Driver(config, folder)
    try:
        while (heard := driver.next()) is not None:
            at, event = heard
            course.see(event)
            if not isinstance(event, say.Step):
                continue
            if struck and len(course.started_from) > len(course.harms):
                course.harms[-1].next_step_s, struck = at - struck, 0.0
            if left and not struck and event.step >= left[0][0]:
                kind, struck = left.pop(0)[1], time.time()
                course.harms.append(Harm(kind, event.step, harm(kind, driver, dice)))
                if kind == "driver":
                    driver = Driver(config, folder)
    finally:
        driver.kill()
    assert course.finished is not None, driver.log.read_text()[-2000:]
    return course


def empty_restarts(config: RunConfig, folder: Path, dice: random.Random, count: int = 2) -> list[float]:
    """Seconds from the kill of a worker to the next start of a training function that does nothing."""
    driver, file, times = Driver(config, folder, "--empty"), folder / "started", list[float]()
    try:
        for started in range(1, count + 1):
            _wait_for_lines(file, started)
            struck = time.time()
            harm("worker", driver, dice)
            times.append(_wait_for_lines(file, started + 1) - struck)
    finally:
        driver.kill()
    return times


def _wait_for_lines(file: Path, count: int) -> float:
    """The time in that line, once it is there."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        lines = file.read_text().splitlines() if file.exists() else []
        if len(lines) >= count:
            return float(lines[count - 1])
        assert time.monotonic() < deadline, f"{len(lines)} starts of {count}"
        time.sleep(0.1)


def digests(config: RunConfig) -> dict[int, dict[str, str]]:
    """step -> file -> sha256 of the weights, EMA and optimizer of every checkpoint."""
    store = assembly.checkpoints(config)
    found: dict[int, dict[str, str]] = {}
    for step in checkpoint.committed(store):
        record: dict[str, Any] = json.loads(storage.read_bytes(f"{checkpoint.folder(store, step)}/commit.json"))
        files = record["files"].items()
        found[step] = {name: file["sha256"] for name, file in files if name.endswith(".safetensors")}
    return found
