"""The same jobs on a cluster: a real head node in token mode, and the real `ray job submit` client."""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from jobs.quickstart import write_digits
from tests.end_to_end.small_run import ROOT, RUN_FILE, small

RAY = str(Path(sys.executable).parent / "ray")


def free_ports(count: int) -> list[int]:
    """Free ports above Ray's own range for workers."""
    sockets = [socket.socket() for _ in range(200)]
    try:
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        found = sorted({s.getsockname()[1] for s in sockets if s.getsockname()[1] > 20_000})
        return found[-count:]
    finally:
        for probe in sockets:
            probe.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a client of a head node that lives as long as this module's tests."""
    home = tmp_path_factory.mktemp("home")
    gcs, dashboard, agent = free_ports(3)
    environment = {
        **os.environ,
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    environment.pop("RAY_TMPDIR", None)
    command = [
        *(RAY, "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}", "--num-cpus=2"),
        # the agent takes jobs; its default port is one for the whole machine
        *("--dashboard-host=127.0.0.1", f"--dashboard-agent-listen-port={agent}", "--disable-usage-stats"),
    ]
    starting = {k: v for k, v in environment.items() if k != "RAY_ADDRESS"}
    log = (home / "head.log").open("wb")
    head = subprocess.Popen(command, env=starting, cwd=home, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for(f"http://127.0.0.1:{dashboard}/api/gcs_healthz", head)
        _wait_for_agent(environment)
        yield environment
    finally:
        started = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
        for process in (head, *started):  # asked to end, a head takes half a minute
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait(60)
        psutil.wait_procs(started, timeout=10)
        log.close()


def _wait_for(url: str, head: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert head.poll() is None, "the head node ended"
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    raise AssertionError(f"no head node at {url}")


def _wait_for_agent(environment: dict[str, str]) -> None:
    """Jobs can be submitted a few seconds after the head answers, when its agent has registered."""
    end = time.monotonic() + 90
    headers = {"authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"}
    while time.monotonic() < end:
        url = f"{environment['RAY_ADDRESS']}/api/jobs/"
        asked = httpx.post(url, json={"entrypoint": "true"}, headers=headers, timeout=60)
        if asked.status_code == 200:
            return
        assert "No available agent" in asked.text, asked.text
        time.sleep(1)
    raise AssertionError("the head node's agent did not come up")


def submit(cluster: dict[str, str], verb: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [
        *(RAY, "job", "submit", "--working-dir", str(ROOT), "--", sys.executable, "-m", f"jobs.{verb}"),
        *(RUN_FILE, *arguments),
    ]
    return subprocess.run(command, env=cluster, cwd=ROOT, capture_output=True, text=True, timeout=400)


@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_shard_train_and_serve_as_submitted_jobs(cluster: dict[str, str], tmp_path: Path, long: bool) -> None:
    """The long form evaluates and samples as well."""
    write_digits(tmp_path / "images")
    overrides = small(tmp_path)

    done = submit(cluster, "shard", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1,466 training and 331 held-out images" in " ".join(done.stdout.split())

    done = submit(cluster, "train", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trained on 1,280 images" in done.stdout
    assert (tmp_path / "run" / "model" / "digests.json").is_file()
    uploaded = [line for line in done.stderr.splitlines() if "Uploading package" in line or "MiB" in line]
    assert not any(float(line.split("(")[1].split("MiB")[0]) > 5 for line in uploaded if "MiB)" in line), uploaded

    [port] = free_ports(1)
    done = submit(cluster, "serve", *overrides, f"serving.port={port}", f"serving.model={tmp_path}/run/model")
    assert done.returncode == 0, done.stdout + done.stderr
    made = httpx.post(f"http://127.0.0.1:{port}/v1/images/generations", json={"n": 2, "labels": 3}, timeout=60)
    assert made.status_code == 200, made.text
    assert len(made.json()["data"]) == 2
    done = submit(cluster, "serve", *overrides, "--stop")
    assert done.returncode == 0, done.stdout + done.stderr
    if long:
        for verb, said in (("evaluate", "bits/dim"), ("sample", "40 images")):
            done = submit(cluster, verb, *overrides, *(["--images", "40"] if verb == "sample" else []))
            assert done.returncode == 0, done.stdout + done.stderr
            assert said in " ".join(done.stdout.split())


def test_without_the_token_nobody_gets_in(cluster: dict[str, str]) -> None:
    address = cluster["RAY_ADDRESS"]
    assert httpx.get(f"{address}/api/jobs/", timeout=10).status_code == 401
    headers = {"authorization": f"Bearer {cluster['RAY_AUTH_TOKEN']}"}
    assert httpx.get(f"{address}/api/jobs/", headers=headers, timeout=10).status_code == 200
