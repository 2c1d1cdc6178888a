"""Two hosts on one machine: network, process, mount, IPC and host name spaces of their own, one wire between them.

Needs root. Each has its own loopback, /dev/shm, /etc/hosts and process table; files are shared.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import psutil
import pytest

from tests.end_to_end.small_run import ROOT

Done: TypeAlias = "subprocess.CompletedProcess[str]"
NAMES = ("alpha", "beta")
FIRST_PROCESS = r"""
set -e
mount -t tmpfs -o mode=1777,size=2g tmpfs /dev/shm
mount --bind "$1/hosts" /etc/hosts
hostname "$2"
# a Python that lies in a home of root's must be read by the user whom the scripts become
home=/root
if [ -d "$home/.pyenv" ]; then
    mkdir -p "$1/pyenv-$2"
    mount --bind "$home/.pyenv" "$1/pyenv-$2"
    mount -t tmpfs -o mode=755 tmpfs "$home"
    mkdir "$home/.pyenv"
    mount --bind "$1/pyenv-$2" "$home/.pyenv"
fi
ip link set lo up
set +e
touch "$1/ready-$2"
while :; do sleep 1; done
"""


@dataclass(frozen=True)
class Host:
    """name: of the host. address: on the wire. pid: its first process, as seen from outside. folder: shared by all."""

    name: str
    address: str
    pid: int
    folder: Path

    def command(self, *words: str) -> list[str]:
        return ["nsenter", "-t", str(self.pid), "-n", "-p", "-m", "-i", "-u", "-r", "-w", "--", *words]

    def script(self, name: str, *words: str, timeout: float = 200, root: Path = ROOT, **more: Any) -> Done:
        """infra/NAME of the checkout `root` there, run by root as it is meant to be: it becomes nobody."""
        settings = {"RAYDIFFUSION_STATE": f"{self.folder}/{self.name}", "RAYDIFFUSION_USER": "nobody", **more}
        return self.run("bash", str(root / "infra" / name), *words, timeout=timeout, environment=settings)

    def run(self, *words: str, timeout: float = 120, environment: Mapping[str, str] | None = None) -> Done:
        env = {**clean_environment(), **(environment or {})}
        command = self.command("env", "-C", str(ROOT), *words)
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)

    def popen(self, log: Path, *words: str, environment: Mapping[str, str] | None = None) -> "subprocess.Popen[bytes]":
        env = {**clean_environment(), **(environment or {})}
        with log.open("ab") as out:
            return subprocess.Popen(self.command("env", "-C", str(ROOT), *words), env=env, stdout=out, stderr=out)

    def processes(self) -> list[str]:
        """The command lines of all that runs there but for the first process and its sleep."""
        seen = self.run("ps", "-eo", "pid=,args=").stdout.splitlines()
        lines = [line.split(maxsplit=1) for line in seen]
        own = ("sleep 1", "ps -eo", "env -C")
        return [args for pid, args in lines if pid != "1" and not args.startswith(own)]

    def listening(self) -> set[str]:
        """ADDRESS:PORT of what listens there."""
        return {line.split()[3] for line in self.run("ss", "-Hltn").stdout.splitlines()}

    def shared_memory(self) -> list[str]:
        return self.run("ls", "-A", "/dev/shm").stdout.split()


def clean_environment() -> dict[str, str]:
    """Ours, without what points to a cluster or a tracking server."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "RAYDIFFUSION_", "MLFLOW_", "AWS_"))}
    return kept | {"PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin", "OMP_NUM_THREADS": "1"}


def idle_seconds(seconds: float) -> float:
    """What takes so long on an idle machine may take as many times longer as more wants to run than there are cores."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


@cache
def why_not() -> str | None:
    """Why no hosts can be made here."""
    missing = [tool for tool in ("unshare", "nsenter", "ip", "ss", "ps", "setpriv") if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        return f"two hosts need root and {', '.join(missing) or 'nothing else'}"
    tried = subprocess.run(
        ["unshare", "-n", "-p", "-m", "-i", "-u", "--fork", "--mount-proc", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
        capture_output=True,
        text=True,
    )
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


needs_hosts = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts on 10.77.0.0/24, alive for the length of the block; all that runs on them ends with it."""
    folder = Path(tempfile.mkdtemp(prefix="rd-", dir="/tmp"))  # short: Ray's sockets lie below it
    folder.chmod(0o777)
    addresses = {name: f"10.77.0.{at}" for at, name in enumerate(NAMES, 1)}
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in addresses.items()))
    (folder / "hosts").chmod(0o644)
    started = [_first_process(folder, name) for name in NAMES]
    try:
        hosts = [Host(name, addresses[name], _inner(p), folder) for name, p in zip(NAMES, started, strict=True)]
        _wire(hosts[0], hosts[1])
        yield hosts[0], hosts[1]
    finally:
        for process in started:
            process.send_signal(signal.SIGKILL)  # --kill-child: its first process, and with it all of the host
            process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def _first_process(folder: Path, name: str) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [
            *("unshare", "-n", "-p", "-m", "-i", "-u", "--fork", "--mount-proc", "--kill-child"),
            *("bash", "-c", FIRST_PROCESS, "host", str(folder), name),
        ],
        stdin=subprocess.DEVNULL,
    )
    end = time.monotonic() + 20
    while not (folder / f"ready-{name}").exists():
        assert process.poll() is None, f"host {name} did not start"
        assert time.monotonic() < end, f"host {name} did not start"
        time.sleep(0.05)
    return process


def _inner(process: "subprocess.Popen[bytes]") -> int:
    [child] = psutil.Process(process.pid).children()
    return child.pid


def _wire(one: Host, two: Host) -> None:
    ends = [(one, "wire0", two), (two, "wire1", one)]
    first, second = ends
    subprocess.run(
        [
            *("ip", "link", "add", first[1], "netns", str(one.pid), "type", "veth"),
            *("peer", "name", second[1], "netns", str(two.pid)),
        ],
        check=True,
    )
    for host, device, other in ends:
        for words in (
            ("ip", "addr", "add", f"{host.address}/24", "dev", device),
            ("ip", "link", "set", device, "up"),
            ("ip", "route", "add", "default", "via", other.address),
        ):
            done = host.run(*words)
            assert done.returncode == 0, done.stderr
