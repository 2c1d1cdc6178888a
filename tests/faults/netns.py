"""A second machine, as far as the network goes: a network namespace of its own, joined to this one by a cable."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

HERE, THERE = "10.231.77.1", "10.231.77.2"
MISSING = "needs root and iproute2 (ip netns)"


def possible() -> bool:
    """Whether this machine lets us make one."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"rd-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", name], capture_output=True).returncode == 0


@dataclass(frozen=True)
class Neighbour:
    """The other machine; this one is `HERE` to it."""

    name: str

    def python(self, code: str, *arguments: str) -> str:
        """What a Python program prints there."""
        command = ["ip", "netns", "exec", self.name, sys.executable, "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def neighbour() -> Iterator[Neighbour]:
    name, cable = f"rd-{os.getpid()}", f"rd{os.getpid() % 10**6}"
    _ip("netns", "add", name)
    try:
        _ip("link", "add", f"{cable}a", "type", "veth", "peer", "name", f"{cable}b", "netns", name)
        _ip("addr", "add", f"{HERE}/30", "dev", f"{cable}a")
        _ip("link", "set", f"{cable}a", "up")
        for words in (("addr", "add", f"{THERE}/30", "dev", f"{cable}b"), ("link", "set", f"{cable}b", "up")):
            _ip("-n", name, *words)
        _ip("-n", name, "link", "set", "lo", "up")
        yield Neighbour(name)
    finally:
        subprocess.run(["ip", "link", "del", f"{cable}a"], capture_output=True)
        _ip("netns", "del", name)
