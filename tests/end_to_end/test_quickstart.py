"""The quickstart itself on a small run: interrupted, continued, kept, and nothing left behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.end_to_end.small_run import ROOT, in_folder, small
from tests.evaluation.page import empty_boxes

MARK = "RAYDIFFUSION_TEST_RUN"


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: str(folder)}
    command = [sys.executable, "-m", "jobs.quickstart", *small(folder), "training.images=2560", *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def read_until(process: "subprocess.Popen[str]", text: str) -> str:
    """Output up to and with the first line that holds `text`."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"'{text}' was never said:\n{seen}")


def left_over(folder: Path) -> list[str]:
    """Processes that carry the mark of a run in their environment."""
    found: list[str] = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == str(folder):
                found.append(" ".join(process.cmdline())[:200])
        except psutil.Error:
            continue
    return found


def gone(folder: Path) -> bool:
    end = time.monotonic() + 20
    while left_over(folder) and time.monotonic() < end:
        time.sleep(0.2)
    return not left_over(folder)


@pytest.mark.timeout(600)
def test_interrupted_then_continued_then_repeated(tmp_path: Path) -> None:
    process = start(tmp_path)
    read_until(process, "[2/6] train")
    checkpoints = tmp_path / "run" / "checkpoints"
    end = time.monotonic() + 200
    while not list(checkpoints.glob("step-*/COMMIT*")) and not list(checkpoints.glob("step-*/*.json")):
        assert time.monotonic() < end, "no checkpoint came"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 130, said
    assert "Traceback" not in said, said
    assert gone(tmp_path), left_over(tmp_path)

    process = start(tmp_path, "--keep")
    said = read_until(process, "the endpoint runs on at")
    process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "going on from" in said
    for stage in ("[1/6] shard", "[3/6] evaluate", "[4/6] register", "[5/6] serve", "[6/6] report"):
        assert stage in said
    line = next(text for text in said.splitlines() if "the endpoint runs on at" in text)
    url, kept = line.split(" at ")[1].split(";")[0], int(line.rsplit(" ", 1)[1])
    assert httpx.get(f"{url}/readyz", timeout=10).status_code == 200
    page = (tmp_path / "report.html").read_text()
    assert "<!doctype html>" in page[:100]
    assert empty_boxes(page) == []
    seen = re.sub(r"<[^>]+>", " ", page)
    trained = re.search(r"trained on ([\d,]+) images", said)
    assert trained is not None
    assert re.search(rf"images seen\s+{trained[1]}\s", seen), "the terminal and the page have one number"
    whole = re.search(r"^  all +(\d+)\.", said, re.MULTILINE)
    assert whole is not None
    assert re.search(rf"all\s+({int(whole[1])}|{int(whole[1]) + 1}) s", seen)  # rounded
    psutil.Process(kept).terminate()
    psutil.Process(kept).wait(60)
    assert gone(tmp_path), left_over(tmp_path)


def test_a_failure_in_a_stage_leaves_no_process(tmp_path: Path) -> None:
    process = start(tmp_path, *in_folder(tmp_path), "model.classes=7")
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 2, said
    assert "error: " in said
    assert "model.classes is 7" in said
    assert "Traceback" not in said
    assert gone(tmp_path), left_over(tmp_path)
