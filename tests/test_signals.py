"""A job that is ended by SIGTERM or by closing its terminal ends what it started, and what Ray loses is one line."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.cluster import session

JOB = """
import subprocess, sys, time
from jobs import cli

def job():
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        print(child.pid, flush=True)
        time.sleep(600)
    finally:
        time.sleep(0.5)  # a second signal comes meanwhile
        print("ending", flush=True)
        child.kill()
        child.wait()
        open(sys.argv[1], "w").write("ended")

cli.main(job)
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("end", ["terminal", "SIGTERM", "SIGINT"])
def test_what_a_job_started_ends_with_it(tmp_path: Path, end: str) -> None:
    ours, theirs = pty.openpty()
    mark = tmp_path / "ended"
    process = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{JOB}", str(mark)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    child = int(os.read(ours, 100))
    assert alive(child)
    if end == "terminal":
        os.close(ours)
    else:
        process.send_signal(getattr(signal, end))
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)  # the same wish
    assert process.wait(60) == 130
    assert not alive(child)
    assert mark.read_text() == "ended"
    if end != "terminal":
        os.close(ours)


def test_ray_is_asked_again_where_it_starts_late(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    asked: list[object] = []

    def late(**options: object) -> None:
        asked.append(options)
        raise Exception(f"The current node {session.LATE}. This could happen because")

    monkeypatch.setattr(ray, "init", late)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(ConnectionError, match="Ray did not start on this machine within 30 s, 3 times") as caught:
        session._start_here(None)
    assert len(asked) == session.STARTS
    assert "\n" not in str(caught.value)


def test_what_ray_loses_is_one_line(tmp_path: Path) -> None:
    job = "from ray.exceptions import ActorDiedError\ndef job(): raise ActorDiedError()"
    code = f"from jobs import cli\n{job}\ncli.main(job)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: Ray lost a part of itself (")
    assert done.stderr.rstrip().endswith("run the same command again: it goes on from what was saved")
    assert len(done.stderr.strip().splitlines()) == 1
