"""infra/setup.sh says in one line what is missing, and leaves nothing that a second call would trust."""

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.end_to_end.small_run import ROOT

LOCKS = sorted((ROOT / "infra").glob("requirements*.lock"))
PYTHONS = ("3.11", "3.12", "3.13")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What setup.sh reads, in a folder of its own."""
    clone = tmp_path / "clone"
    (clone / "infra").mkdir(parents=True)
    for name in ("infra/setup.sh", "pyproject.toml", *(f"infra/{lock.name}" for lock in LOCKS)):
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
        assert len(lines) <= 3, done.stderr  # what it sets out to do, that it finds no CPU build, and why it could not
        assert "could not be installed (no network?)" in lines[-1]
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
    done = subprocess.run(["bash", "infra/setup.sh", "dev"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 5


def test_an_unknown_group(clone: Path) -> None:
    done = subprocess.run(["bash", "infra/setup.sh", "prod"], cwd=clone, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "the groups are dev, server and cuda, got 'prod'" in done.stderr


# --- the locks
# ---------------------------------------------------------------------------------------------------------


def pins(lock: Path) -> list[str]:
    """The logical lines of a lock."""
    return [line for line in lock.read_text().replace("\\\n", " ").splitlines() if line and line[0] != "#"]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_every_pin_is_public_and_has_its_hashes(lock: Path) -> None:
    assert pins(lock)
    for pin in pins(lock):
        name = pin.split()[0]
        assert re.fullmatch(r"[a-z0-9.\-]+={2,3}[0-9][0-9a-z.]*", name), name
        assert re.search(r"--hash=sha256:[0-9a-f]{64}( |$)", pin), name


def test_cuda_stands_apart_and_torch_takes_either_build() -> None:
    by_lock = {lock.name: {pin.split()[0]: pin for pin in pins(lock)} for lock in LOCKS}
    cuda = by_lock.pop("requirements-cuda.lock")
    apart = re.compile(r"nvidia-|cuda-|triton")
    assert sum(bool(apart.match(name)) for name in cuda) > 10
    assert not [name for lock in by_lock.values() for name in lock if apart.match(name)]
    pinned = by_lock["requirements.lock"] | cuda
    hashes = {name: set(re.findall(r"[0-9a-f]{64}", pin)) for name, pin in pinned.items()}
    torch = next(name.removeprefix("torch==") for name in by_lock["requirements.lock"] if name.startswith("torch=="))
    lines = [line.split() for line in (ROOT / "infra/torch-cpu.hashes").read_text().splitlines()[2:]]
    cpu = {file: digest for digest, file in lines}
    for python in PYTHONS:
        for machine in ("x86_64", "aarch64"):
            tag = f"cp{python.replace('.', '')}"
            assert cpu[f"torch-{torch}+cpu-{tag}-{tag}-manylinux_2_28_{machine}.whl"] in hashes[f"torch=={torch}"]
    assert hashes[f"torch=={torch}"] == hashes[f"torch==={torch}"] | set(cpu.values())


def test_the_lock_is_of_this_pyproject() -> None:
    """Every direct dependency is pinned, by a version that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(line for group in groups for line in group)]
    found = dict(pin.split()[0].split("==") for lock in LOCKS for pin in pins(lock) if "===" not in pin)
    for requirement in map(Requirement, wanted):
        assert requirement.name in found, f"{requirement}: run infra/lock.sh"
        assert requirement.specifier.contains(found[requirement.name]), f"{requirement}: run infra/lock.sh"


def test_a_local_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("lock", ROOT / "infra/lock.py")
    assert spec is not None
    assert spec.loader is not None
    lock = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lock)
    monkeypatch.setattr(lock, "INFRA", tmp_path)
    with pytest.raises(ValueError, match=r"torch==2\.13\.0\+cpu: a local version is on no public index"):
        lock.write("requirements.lock", "all", ["torch==2.13.0+cpu --hash=sha256:00\n"])
    with pytest.raises(ValueError, match="without a hash"):
        lock.write("requirements.lock", "all", ["torch==2.13.0\n"])
    assert not list(tmp_path.iterdir())


def _has_network() -> bool:
    with contextlib.suppress(OSError):
        asked = ["index", "versions", "iniconfig", "--retries", "0", "--timeout", "5"]
        return subprocess.run([sys.executable, "-m", "pip", *asked], env=PUBLIC, capture_output=True).returncode == 0
    return False


PUBLIC = {**os.environ, "PIP_CONFIG_FILE": "/dev/null", "PIP_FIND_LINKS": ""}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("python", PYTHONS)
def test_the_public_index_alone_has_every_pin(python: str, tmp_path: Path) -> None:
    """pip itself, for each Python at hand; it fetches all files of its system to verify their hashes."""
    interpreter = shutil.which(f"python{python}")
    if interpreter is None or subprocess.run([interpreter, "-c", "import venv, ensurepip"]).returncode != 0:
        pytest.skip(f"no Python {python} here")
    if not _has_network():
        pytest.skip("needs the package index")
    subprocess.run([interpreter, "-m", "venv", str(tmp_path / "venv")], check=True)
    for cuda in (False, True):  # torch's two lines meet where there is a GPU
        locks = [word for lock in LOCKS if cuda or "cuda" not in lock.name for word in ("-r", str(lock))]
        command = [str(tmp_path / "venv/bin/python"), "-m", "pip", "install", "--quiet", "--no-deps", "--dry-run"]
        done = subprocess.run([*command, "--require-hashes", *locks], env=PUBLIC, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("system", ["x86_64-manylinux_2_28", "aarch64-manylinux_2_28", "aarch64-apple-darwin"])
def test_every_system_has_wheels(python: str, system: str, tmp_path: Path) -> None:
    if not _has_network():
        pytest.skip("needs the package index")
    taken = [lock for lock in LOCKS if "darwin" not in system or "cuda" not in lock.name]
    locks = [word for lock in taken for word in ("-r", str(lock))]
    command = ["uv", "pip", "install", "--no-config", "--dry-run", "--no-deps", "--require-hashes", "--only-binary"]
    command += [":all:", "--target", str(tmp_path), "--python-platform", system, "--python-version", python]
    environment = {**PUBLIC, "MACOSX_DEPLOYMENT_TARGET": "14.0"}
    done = subprocess.run([*command, *locks], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Would install" in done.stderr
