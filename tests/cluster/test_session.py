"""Joining a Ray cluster."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pipeline.serving.ports import free_port
from tests.end_to_end.small_run import ROOT

JOIN = "import sys; from pipeline.cluster.session import session\nwith session(sys.argv[1]): pass"


def test_an_address_where_nothing_listens_is_said_at_once() -> None:
    address, began = f"127.0.0.1:{free_port('127.0.0.1')}", time.monotonic()
    run = subprocess.run([sys.executable, "-c", JOIN, address], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert f"ConnectionError: nothing listens at {address}" in run.stderr
    assert time.monotonic() - began < 30  # Ray's own wait is over a minute


HEAD = """
import ray, sys
ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_a_cluster_that_asks_for_no_token_is_used_with_a_warning(mode: str, tmp_path: Path) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    closed = {"HOME": str(tmp_path), "RAY_AUTH_TOKEN": "f" * 64} if mode == "token" else {"HOME": str(tmp_path)}
    environment = {**clean, **closed, "RAY_AUTH_MODE": mode, "RAY_TMPDIR": tempfile.mkdtemp(prefix="ray-", dir="/tmp")}
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert head.stdout is not None
        address = next(line for line in head.stdout if ":" in line).strip()
        client = subprocess.run(
            [sys.executable, "-c", JOIN, address], cwd=ROOT, env={**clean, **closed}, capture_output=True, text=True
        )
        assert client.returncode == 0, client.stderr
        warned = f"warning: the Ray cluster at {address} asks for no token" in client.stderr
        assert warned == (mode == "disabled"), client.stderr
    finally:
        head.communicate("", timeout=60)
        shutil.rmtree(environment["RAY_TMPDIR"])
