"""infra/cluster.sh: what it refuses, and a head and a node on two hosts."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cluster import nodes
from tests.end_to_end.small_run import ROOT
from tests.infra.hosts import Done, Host, clean_environment, idle_seconds, needs_hosts, two_hosts

SCRIPT = str(ROOT / "infra" / "cluster.sh")
FIRST = 26000


def cluster(*words: str, **settings: str) -> Done:
    environment = {**clean_environment(), **settings}
    return subprocess.run(["bash", SCRIPT, *words], env=environment, capture_output=True, text=True, timeout=60)


class TestRefusals:
    """Each in one line that says what to do; nothing is started."""

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root is asked to become another user")
    @pytest.mark.parametrize("user", ["root", "no-such-user-here"])
    def test_root_starts_nothing(self, tmp_path: Path, user: str) -> None:
        done = cluster("head", RAYDIFFUSION_USER=user, RAYDIFFUSION_STATE=str(tmp_path / "s"))
        assert done.returncode == 1
        assert "RAYDIFFUSION_USER" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not (tmp_path / "s").exists()

    def test_a_folder_too_deep_for_sockets(self) -> None:
        done = cluster("head", RAYDIFFUSION_USER="nobody", RAYDIFFUSION_STATE="/tmp/" + "x" * 60)
        assert done.returncode == 1
        assert "65 characters; Ray's sockets lie in it and allow 36" in done.stderr

    def test_without_a_verb_it_says_how_it_is_called(self) -> None:
        done = cluster()
        assert done.returncode == 2
        for verb in ("head", "join HOST:PORT", "status", "down", "env", "unit"):
            assert f"infra/cluster.sh {verb}" in done.stderr

    def test_ports_that_are_taken_are_named(self) -> None:
        with socket.socket() as holder:
            holder.bind(("", 0))
            first = holder.getsockname()[1] - nodes.HEAD_PORTS["dashboard"]
            assert f"{first + 1} (dashboard)" in nodes.taken(first, head=True)
            assert f"{first + 1} (dashboard)" not in nodes.taken(first, head=False)

    def test_another_environment_than_the_heads(self) -> None:
        head = nodes.Node("a", "10.0.0.1", True, "python3.11-aaaa", 1, 0)
        same = nodes.Node("b", "10.0.0.2", False, "python3.11-aaaa", 1, 0)
        other = nodes.Node("c", "10.0.0.3", False, "python3.12-aaaa", 1, 0)
        assert nodes.same_environment(same, [head, same]) is None
        assert "python3.12-aaaa, the head's is python3.11-aaaa" in (nodes.same_environment(other, [head, other]) or "")

    def test_the_unit_is_one_that_systemd_takes(self, tmp_path: Path) -> None:
        done = cluster("unit", "join", "10.0.0.1:26000", RAYDIFFUSION_USER="daemon")
        assert done.returncode == 0, done.stderr
        for line in ("User=daemon", "UMask=0077", "KillMode=mixed", f"infra/cluster.sh join 10.0.0.1:{FIRST} --fore"):
            assert line in done.stdout
        if shutil.which("systemd-analyze"):
            unit = tmp_path / "raydiffusion.service"
            unit.write_text(done.stdout)
            checked = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
            assert checked.returncode == 0, checked.stderr
            assert "raydiffusion.service" not in checked.stderr, checked.stderr


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as made:
        yield made


def give_token(here: Host, there: Host, token: bytes | None = None) -> None:
    state = there.folder / there.name
    state.mkdir(exist_ok=True)
    (state / "token").write_bytes(token or (here.folder / here.name / "token").read_bytes())
    (state / "token").chmod(0o600)
    for path in (state, state / "token"):
        shutil.chown(path, "nobody")


@needs_hosts
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hosts(hosts: tuple[Host, Host]) -> None:
    alpha, beta = hosts
    before = [host.shared_memory() for host in hosts]
    began = time.monotonic()
    done = alpha.script("cluster.sh", "head", "--", "--num-cpus=2")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < idle_seconds(60)
    assert f"infra/cluster.sh join 10.77.0.1:{FIRST}" in done.stderr

    token = alpha.folder / "alpha" / "token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert (token.parent.stat().st_mode & 0o777) == 0o700
    assert not [line for line in alpha.processes() if token.read_text() in line]
    users = set(alpha.run("ps", "-eo", "user=,args=").stdout.splitlines())
    assert not [line for line in users if "ray" in line and line.startswith("root")]
    _everything_is_closed(alpha)

    _node_is_refused_until_it_fits(alpha, beta)
    began = time.monotonic()
    done = beta.script("cluster.sh", "join", "alpha", "--", "--num-cpus=2")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < idle_seconds(60)
    listed = alpha.script("cluster.sh", "status").stdout.splitlines()
    assert [line.split()[:2] for line in listed] == [["head", "10.77.0.1"], ["node", "10.77.0.2"]]

    assert "already" in alpha.script("cluster.sh", "head").stderr
    _a_job_leaves_a_process_behind(alpha)
    for host, files in zip(hosts, before, strict=True):
        assert host.processes()
        done = host.script("cluster.sh", "down")
        assert done.returncode == 0, done.stderr
        assert host.processes() == []
        assert host.listening() == set()
        assert host.shared_memory() == files
        assert host.script("cluster.sh", "status").returncode == 1
        kept = {path.name for path in (host.folder / host.name).glob("ray/session_2*/*")}
        assert kept == {"logs"}


def _everything_is_closed(alpha: Host) -> None:
    """The dashboard on loopback alone, no port but those listed, nobody answered without the token."""
    ports = {where.rpartition(":")[2]: where for where in alpha.listening()}
    assert ports[str(FIRST + 1)] == f"127.0.0.1:{FIRST + 1}"
    listed = {FIRST + at for at in (*nodes.PORTS.values(), *nodes.HEAD_PORTS.values())}
    unlisted = {int(port) for port in ports} - listed
    assert all(FIRST + 100 <= port <= FIRST + 999 for port in unlisted), sorted(unlisted)
    for path, status in (("/api/jobs/", "401"), ("/api/gcs_healthz", "200")):
        url = f"http://127.0.0.1:{FIRST + 1}{path}"
        assert alpha.run("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", url).stdout == status


def _node_is_refused_until_it_fits(alpha: Host, beta: Host) -> None:
    done = beta.script("cluster.sh", "join", "alpha")
    assert done.returncode == 1
    assert "no token at" in done.stderr
    give_token(alpha, beta, b"f" * 64)
    done = beta.script("cluster.sh", "join", "alpha", timeout=60)
    assert done.returncode == 1
    assert "refuses this token" in done.stderr
    give_token(alpha, beta)
    (beta.folder / "beta" / "token").chmod(0o644)
    assert "others may read" in beta.script("cluster.sh", "join", "alpha").stderr
    (beta.folder / "beta" / "token").chmod(0o600)

    other = beta.folder / "checkout"
    for folder in ("infra", "pipeline"):
        shutil.copytree(ROOT / folder, other / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (other / ".venv").symlink_to((ROOT / ".venv").resolve())
    with (other / "infra" / "requirements.lock").open("a") as lock:
        lock.write("# another version\n")
    done = beta.script("cluster.sh", "join", "alpha", root=other)
    assert done.returncode == 1
    assert "this node's environment is" in done.stderr
    assert beta.processes() == []


def _a_job_leaves_a_process_behind(alpha: Host) -> None:
    exported = alpha.script("cluster.sh", "env").stdout
    left = "sleep 4321"
    command = f"eval '{exported}'; ray job submit -- bash -c 'setsid {left} >/dev/null 2>&1 & python --version'"
    done = alpha.run("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "bash", "-c", command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Python 3" in done.stdout
    assert left in alpha.processes()
