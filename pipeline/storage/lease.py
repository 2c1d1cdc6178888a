"""One holder at a time of a place where a job writes: an output, a shard set. Local or on S3.

    URL/.lease/000000003.json   who holds the place; the highest number counts, the lower ones are the past

A lease is taken by creating the next number, which a file system and S3 (`If-None-Match: *`) allow once. Its holder
gives a sign of life every `BEAT_S`, which moves the file's time; it is followed by the next one `LEASE_S` after the
last sign, and at once where it gave the place back or its process is gone from this machine. Times are compared as the
store tells them, never by the clocks of two machines. Whoever writes something that others trust asks `Claim.check`
first: a holder that slept through its time finds a higher number, and writes nothing.
"""

import json
import os
import platform
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import psutil

from pipeline import storage
from pipeline.storage import s3

FOLDER = ".lease"
BEAT_S = 5.0
LEASE_S = 60.0
LOOK_S = 1.0  # between two looks at a holder that may be dead


class Held(ValueError):
    """Another job holds the place."""


class Lost(ValueError):
    """The place was taken over by another job."""


@dataclass(frozen=True)
class Claim:
    """A lease's number, for whoever writes on its holder's behalf, in another process too."""

    url: str
    number: int

    def check(self) -> None:
        """Raises Lost where a higher number is there. OSError: the store does not answer."""
        highest = _highest(self.url)
        if highest > self.number:
            raise Lost(
                f"{self.url} was taken over by another job ({_read(self.url, highest)}) after {LEASE_S:g} s without a "
                f"sign of life from this one; this one writes nothing more there"
            )


class Lease:
    """A place that is held: gives signs of life in a thread of its own."""

    def __init__(self, claim: Claim, body: dict[str, Any]) -> None:
        self.claim, self._body = claim, body
        self.lost = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self.lost and not self._closed.wait(BEAT_S):
            try:
                self.claim.check()
                _beat(self.claim, self._body)
            except Lost:
                self.lost = True
            except OSError:
                continue  # a store that is away: what is written meanwhile is checked all the same

    def release(self) -> None:
        """Gives the place back. Where that cannot be written, the lease runs out by itself."""
        self._closed.set()
        self._thread.join(timeout=2 * BEAT_S)
        if not self.lost:
            with suppress(OSError):
                _write(self.claim, {**self._body, "released": True})


@contextmanager
def hold(url: str, what: str, tell: Callable[[str], None] = lambda line: None) -> Iterator[Lease]:
    """Holds a place for the length of the block. what: names the job to those who come second.

    Waits where the holder may be dead, up to `LEASE_S` after its last sign of life; `tell` is told so once.

    Raises:
        Held: another job holds it; names which.
    """
    lease = Lease(*_acquire(url, what, tell))
    try:
        yield lease
    finally:
        lease.release()


@dataclass(frozen=True)
class _Standing:
    """A lease that is there. changed: the time of its last sign by the store's clock; age_s: how long ago that is."""

    body: dict[str, Any]
    changed: float
    age_s: float
    copied: bool

    def __str__(self) -> str:
        what, host, process = (self.body.get(name, "?") for name in ("what", "host", "process"))
        return f"{what}, process {process} on {host}"

    @property
    def free(self) -> bool:
        gone = self.body.get("machine") == _machine() and not _runs(self.body)
        return self.copied or bool(self.body.get("released")) or gone or self.age_s > LEASE_S


def _acquire(url: str, what: str, tell: Callable[[str], None]) -> tuple[Claim, dict[str, Any]]:
    first: float | None = None  # the sign of life that was found
    while True:
        number = _highest(url)
        standing = _read(url, number) if number else None
        if standing is None or standing.free:
            claim, body = Claim(url, number + 1), {**_me(url), "what": what}
            if _create(claim, body):
                _forget(claim)
                return claim, body
            continue
        if standing.body.get("machine") == _machine() or standing.changed != (first or standing.changed):
            raise Held(
                f"{url} is in use by another job: {standing}, last sign of life {max(0.0, standing.age_s):.0f} s ago; "
                f"wait for it, stop it, or choose another place (one that died is followed after {LEASE_S:g} s)"
            )
        if first is None:
            first = standing.changed
            tell(f"{url} was held by {standing}; waiting for a sign of life, at most {LEASE_S - standing.age_s:.0f} s")
        time.sleep(LOOK_S)


def _forget(claim: Claim) -> None:
    for number in _numbers(claim.url):
        if number < claim.number:
            storage.delete(_file(claim.url, number))


# --- who ----------------------------------------------------------------------------------------------------------


def _machine() -> str:
    """Where a process number means a process: the host since its start, and the container."""
    try:
        space = os.readlink("/proc/self/ns/pid")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        space, boot = "", f"{psutil.boot_time():.0f}"
    return f"{platform.node()} {boot} {space}"


def _me(url: str) -> dict[str, Any]:
    pid = os.getpid()
    me = {"machine": _machine(), "host": platform.node(), "process": pid, "began": psutil.Process(pid).create_time()}
    return me | {"url": url, "token": os.urandom(8).hex()}


def _runs(body: dict[str, Any]) -> bool:
    """Whether the process of a lease of this machine is there; its number may be another's by now."""
    try:
        found = psutil.Process(int(body["process"]))
        return abs(found.create_time() - float(body["began"])) < 1 and found.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return False


# --- the files ----------------------------------------------------------------------------------------------------


def _file(url: str, number: int) -> str:
    return storage.join(url, f"{FOLDER}/{number:09d}.json")


def _numbers(url: str) -> list[int]:
    entries = storage.list_files(storage.join(url, FOLDER))
    return [int(entry.path.split(".")[0]) for entry in entries if re.fullmatch(r"\d{9,}\.json", entry.path)]


def _highest(url: str) -> int:
    return max(_numbers(url), default=0)


def _create(claim: Claim, body: dict[str, Any]) -> bool:
    """Writes a number that is not there; False where it is."""
    target, data = storage.parse(_file(claim.url, claim.number)), json.dumps(body).encode()
    if target.bucket is None:
        os.makedirs(os.path.dirname(target.path), exist_ok=True)
        try:
            with open(target.path, "xb") as file:
                inode = os.fstat(file.fileno()).st_ino  # a copied folder's lease has another
                file.write(json.dumps({**body, "inode": inode}).encode())
        except FileExistsError:
            return False
        except OSError:  # a full disk
            storage.delete(_file(claim.url, claim.number))
            raise
        return True
    return storage.create_bytes(_file(claim.url, claim.number), data)


def _read(url: str, number: int) -> _Standing | None:
    """None where it is gone by now."""
    place = _file(url, number)
    location = storage.parse(place)
    try:
        if location.bucket is None:
            data, status = storage.read_bytes(place), os.stat(location.path)
            changed, age, inode = status.st_mtime, _now_of(location.path) - status.st_mtime, status.st_ino
        else:
            where = {"Bucket": location.bucket, "Key": location.path}
            head = s3.retried(place, lambda: s3.client().head_object(**where), 1)
            data, inode = storage.read_bytes(place), None
            changed = head["LastModified"].timestamp()
            age = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp() - changed
    except FileNotFoundError:
        return None
    try:
        body = dict(json.loads(data))
    except (ValueError, TypeError):  # being written, or cut off in that
        return _Standing({}, changed, age, False)
    copied = body.get("url") != url if inode is None else body.get("inode", inode) != inode
    return _Standing(body, changed, age, copied)


def _now_of(path: str) -> float:
    """The time by the clock of the file system that holds `path`."""
    with tempfile.NamedTemporaryFile(prefix=".time-", dir=os.path.dirname(path)) as probe:
        return os.fstat(probe.fileno()).st_mtime


def _beat(claim: Claim, body: dict[str, Any]) -> None:
    location = storage.parse(_file(claim.url, claim.number))
    if location.bucket is None:
        os.utime(location.path)  # needs no room on a full disk
    else:
        _write(claim, body)


def _write(claim: Claim, body: dict[str, Any]) -> None:
    """The holder's own file, in place."""
    url = _file(claim.url, claim.number)
    location, data = storage.parse(url), json.dumps(body).encode()
    if location.bucket is not None:
        storage.write_bytes(url, data)
        return
    with open(location.path, "r+b") as file:
        file.write(json.dumps({**body, "inode": os.fstat(file.fileno()).st_ino}).encode())
        file.truncate()
