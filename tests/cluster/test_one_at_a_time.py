"""Two jobs of the command line on one output: the second is refused by name, the first is not disturbed."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pipeline.config import RunConfig, to_yaml
from pipeline.data.sets.manifest import Manifest
from pipeline.storage.lease import FOLDER
from pipeline.training import checkpoint
from tests.cluster.test_train import run_config
from tests.tracking.database import database

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own use of its libraries

TRAINING = {"images": 48, "evaluate_images": 0, "sample_images": 0}


def start(verb: str, config: RunConfig, file: Path, *more: str) -> subprocess.Popen[str]:
    file.write_text(to_yaml(config))
    command = [sys.executable, "-m", f"jobs.{verb}", str(file), *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=file.parent, env=environment, stdout=pipe, stderr=pipe, text=True)


def one_at_a_time(verb: str, config: RunConfig, place: Path, file: Path, *more: str) -> None:
    """The first is stopped (SIGSTOP) where it has just begun: it is there, and does nothing."""
    first, end = start(verb, config, file, *more), time.monotonic() + 120
    try:
        while not list((place / FOLDER).glob("*.json")):
            assert first.poll() is None, first.communicate()
            assert time.monotonic() < end
            time.sleep(0.002)
        first.send_signal(signal.SIGSTOP)
        while psutil.Process(first.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.002)
        second = start(verb, config, file, *more)
        _, told = second.communicate(timeout=120)
        assert second.returncode == 2, told
        named = f"error: {place} is in use by another job: jobs.{verb}"
        assert any(line.startswith(named) and f", process {first.pid} on " in line for line in told.splitlines()), told
        first.send_signal(signal.SIGCONT)
        output = first.communicate(timeout=120)
        assert first.returncode == 0, output
    finally:
        first.kill()
        first.communicate()


def test_two_trainings_on_one_output(tmp_path: Path, small_set: Manifest) -> None:
    made = run_config(tmp_path / "run", small_set.url, training=TRAINING)
    config = replace(made, tracking=replace(made.tracking, uri=database()))
    one_at_a_time("train", config, tmp_path / "run", tmp_path / "run-file.yaml", "--local")
    assert checkpoint.committed(str(tmp_path / "run" / "checkpoints"))[0] == 3
