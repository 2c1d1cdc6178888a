"""infra/setup.sh says in one line what is missing, and leaves nothing that a second call would trust."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.end_to_end.small_run import ROOT


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What setup.sh reads, in a folder of its own."""
    clone = tmp_path / "clone"
    (clone / "infra").mkdir(parents=True)
    for name in ("infra/setup.sh", "infra/requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, clone / name)
    return clone


def setup(clone: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", "infra/setup.sh"],
        cwd=clone,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_wrong_python(clone: Path, tmp_path: Path) -> None:
    fake = tmp_path / "bin"
    fake.mkdir()
    for name in ("python3", "python", "python3.11", "python3.12", "python3.13"):
        (fake / name).write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
        (fake / name).chmod(0o755)
    done = setup(clone, PATH=f"{fake}:/usr/bin:/bin", PYTHON="")
    assert done.returncode == 1
    assert "needs Python 3.11, 3.12 or 3.13 on the PATH, found Python 3.9.2" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (clone / ".venv").exists()


def test_no_network_leaves_nothing_that_is_trusted(clone: Path) -> None:
    closed = {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
        "PIP_FIND_LINKS": "",
        "PIP_NO_CACHE_DIR": "1",
    }
    for _ in range(2):  # the second call starts afresh and says the same
        done = setup(clone, **closed)
        assert done.returncode == 1
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 2, done.stderr  # what it sets out to do, and why it could not
        assert "could not be installed (no network?)" in lines[1]
        assert (clone / ".venv" / ".raydiffusion").read_text().strip() == "building"


def test_another_environment_is_not_touched(clone: Path) -> None:
    (clone / ".venv").mkdir()
    (clone / ".venv" / "mine").write_text("precious")
    done = setup(clone)
    assert done.returncode == 1
    assert "was not made by this script" in done.stderr
    assert (clone / ".venv" / "mine").read_text() == "precious"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounts a small disk: needs root")
def test_full_disk(clone: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this machine lets nobody mount a tmpfs")
    try:
        shutil.copytree(clone, small / "clone")
        done = setup(small / "clone")
        assert done.returncode == 1
        assert "needs 6 GB of free disk here, found 0 GB" in done.stderr
        assert not (small / "clone" / ".venv").exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_second_call_is_quick() -> None:
    started = time.monotonic()
    done = subprocess.run(["bash", "infra/setup.sh"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 5
