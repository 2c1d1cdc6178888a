"""The README's code blocks run. The two commands are what CI runs, and the cluster's have a test of their own."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pipeline
from jobs.quickstart import write_digits
from tests.end_to_end.small_run import ROOT, RUN_FILE, small

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall((ROOT / "README.md").read_text())
ELSEWHERE = ("bash infra/", "ray ", "export RAY", "mlflow ui")  # CI, test_cluster.py, a server that does not end


def commands() -> list[str]:
    """The command lines of the README's blocks, without their comments, in order."""
    lines = [line for kind, block in BLOCKS if kind == "" for line in block.splitlines()]
    found = [
        shlex.join(shlex.split(line, comments=True))
        for line in lines
        if re.match(r"(python -m|bash|ray|mlflow) ", line)
    ]
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    write_digits(folder / "images")
    return folder


def run(command: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """A README command on a small run of its own: the run file it names is the digits one, kept inside `folder`."""
    words = [
        sys.executable if word == "python" else RUN_FILE if word.endswith(".yaml") else word
        for word in shlex.split(command)
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*words, *small(folder)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def jobs_of_the_readme() -> list[str]:
    ran = [c for c in commands() if not c.startswith(ELSEWHERE) and "jobs.serve" not in c]
    assert [c.split()[2] for c in ran] == ["jobs.shard", "jobs.train", "jobs.train", "jobs.evaluate", "jobs.register"]
    return ran


def test_the_first_jobs(folder: Path) -> None:
    """What comes after them, the quickstart runs as well."""
    shard, estimate, *_ = jobs_of_the_readme()
    for command in (shard, estimate):
        done = run(command, folder)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


@pytest.mark.slow
def test_the_jobs_in_the_order_given_then_the_notebook(folder: Path) -> None:
    for command in jobs_of_the_readme():
        done = run(command, folder)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    [notebook] = [block for kind, block in BLOCKS if kind == "python"]
    code = notebook.replace("sqlite:///artifacts/mlflow.db", f"sqlite:///{folder}/mlflow.db")
    assert code != notebook
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "tensor([" in done.stdout


def test_the_licence_is_packed_and_the_changes_begin_with_what_is_after_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [licence] = [path for pattern in project["license-files"] for path in ROOT.glob(pattern)]
    text = licence.read_text()
    assert project["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert f"after {pipeline.__version__}" in (ROOT / ".github/CHANGELOG.md").read_text()
