"""A real S3 on loopback, and a proxy before it that counts what is fetched and breaks a share of the answers."""

import asyncio
import contextlib
import os
import random
import shutil
import socket
import struct
import subprocess
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pipeline.serving.ports import free_port

KEYS = ("labkey", "labsecret123")
STALL_S = 30.0
FAULTS = ("slow down", "reset", "cut short", "stall", "flipped byte", "missing once")


@contextlib.contextmanager
def real_s3(folder: Path) -> Iterator[str]:
    """The endpoint of a fresh store: Ceph's gateway where it is installed (Debian: ceph-mon, ceph-osd, ceph-common,
    radosgw), else moto.
    """
    if shutil.which("radosgw") and shutil.which("ceph-osd") and shutil.which("ceph-mon"):
        with _radosgw(folder) as endpoint:
            yield endpoint
    else:
        with moto() as endpoint:
            yield endpoint


@contextlib.contextmanager
def moto() -> Iterator[str]:
    """The endpoint of a store in this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextlib.contextmanager
def _radosgw(folder: Path) -> Iterator[str]:
    """One monitor, one OSD in memory and the gateway, as children of this process."""
    mon, gateway, fsid = free_port("127.0.0.1"), free_port("127.0.0.1"), uuid.uuid4()
    for name in ("mon", "osd", "run"):
        (folder / name).mkdir(parents=True)
    config, keyring = folder / "ceph.conf", folder / "keyring"
    config.write_text(
        f"""[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{mon}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
keyring = {keyring}
auth_allow_insecure_global_id_reclaim = false
run dir = {folder}/run
admin socket = {folder}/run/$name.asok
log file = {folder}/$name.log
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd_pool_default_pg_autoscale_mode = off
mon allow pool size one = true
mon max pg per osd = 1000
osd crush chooseleaf type = 0
mon data = {folder}/mon
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 4294967296
ms bind ipv6 = false
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{gateway}
rgw thread pool size = 32
rgw enable apis = s3, admin
"""
    )

    def call(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    for name, caps in (
        ("mon.", ("mon", "allow *")),
        ("client.admin", ("mon", "allow *", "osd", "allow *", "mgr", "allow *")),
        ("client.rgw", ("mon", "allow rwx", "osd", "allow rwx")),
        ("osd.0", ("mon", "allow profile osd", "osd", "allow *")),
    ):
        pairs = [part for kind, cap in zip(caps[::2], caps[1::2], strict=True) for part in ("--cap", kind, cap)]
        create = () if keyring.exists() else ("--create-keyring",)
        call("ceph-authtool", *create, str(keyring), "--gen-key", "-n", name, *pairs)
    call("monmaptool", "--create", "--addv", "a", f"[v2:127.0.0.1:{mon}]", "--fsid", str(fsid), str(folder / "monmap"))
    here = ("-c", str(config))
    call("ceph-mon", *here, "--mkfs", "-i", "a", "--monmap", str(folder / "monmap"), "--keyring", str(keyring))
    with contextlib.ExitStack() as running:

        def start(*command: str) -> None:
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            running.callback(child.wait, 20)
            running.callback(child.kill)

        start("ceph-mon", *here, "-i", "a", "-f")
        osd = str(uuid.uuid4())
        call("ceph", *here, "osd", "new", osd)
        call("ceph-osd", *here, "-i", "0", "--mkfs", "--osd-uuid", osd)
        start("ceph-osd", *here, "-i", "0", "-f")
        call("ceph", *here, "osd", "crush", "add", "osd.0", "1.0", "root=default", "host=h")
        start("radosgw", *here, "-n", "client.rgw", "-f")
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", gateway), 1):
                break
            time.sleep(0.2)
        user = ("--uid=lab", "--display-name=lab", f"--access-key={KEYS[0]}", f"--secret-key={KEYS[1]}")
        call("radosgw-admin", *here, "user", "create", *user)
        yield f"http://127.0.0.1:{gateway}"


class Proxy:
    """Passes GET and HEAD requests on to a store.

    Attributes:
        requests, bytes: by path, how many GETs were asked for and how many bytes of bodies were sent.
        injected: by kind of FAULTS, how many answers were broken.
    """

    def __init__(self, upstream: str, share: float = 0.0, seed: int = 0, kinds: tuple[str, ...] = FAULTS) -> None:
        host, _, port = upstream.removeprefix("http://").partition(":")
        self.upstream = (host, int(port))
        self.share, self.draw, self.kinds = share, random.Random(seed), kinds
        self.requests: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self.missed: set[str] = set()
        self.loop = asyncio.new_event_loop()
        self.ready = threading.Event()
        self.thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def __enter__(self) -> "Proxy":
        self.thread.start()
        self.ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        server = self.loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = int(server.sockets[0].getsockname()[1])
        self.ready.set()
        self.loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await self._answer(head, writer)
                await writer.drain()
                if writer.is_closing():
                    return
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client went away, or the proxy ends
        finally:
            writer.close()

    async def _answer(self, head: bytes, writer: asyncio.StreamWriter) -> None:
        method, path = head.split(b" ", 2)[:2]
        name = path.decode().partition("?")[0]
        answer, body = await self._fetch(head)
        fault = self._fault(name) if method == b"GET" else ""
        if method == b"GET":
            self.requests[name] += 1
        if fault:
            self.injected[fault] += 1
        if fault == "slow down":
            body = b"<Error><Code>SlowDown</Code></Error>"
            answer = b"HTTP/1.1 503 Slow Down\r\nContent-Length: %d\r\n\r\n" % len(body)
        elif fault == "missing once":
            body = b"<Error><Code>NoSuchKey</Code></Error>"
            answer = b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n" % len(body)
        elif fault == "reset":
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            return
        elif fault == "stall":
            await asyncio.sleep(STALL_S)
            writer.close()
            return
        elif fault == "flipped byte" and body:
            at = self.draw.randrange(len(body))
            body = body[:at] + bytes([body[at] ^ 0x20]) + body[at + 1 :]
        elif fault == "cut short":
            writer.write(answer + body[: len(body) // 2])
            await writer.drain()
            writer.close()
            return
        self.bytes[name] += len(body)
        writer.write(answer + (body if method == b"GET" else b""))

    async def _fetch(self, head: bytes) -> tuple[bytes, bytes]:
        """The store's whole answer: head, body."""
        reader, writer = await asyncio.open_connection(*self.upstream)
        try:
            lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
            writer.write(b"\r\n".join([*lines[:-2], b"Connection: close", b"", b""]))
            whole = await reader.read()
        finally:
            writer.close()
        answer, _, body = whole.partition(b"\r\n\r\n")
        kept = [line for line in answer.split(b"\r\n") if not line.lower().startswith(b"connection:")]
        return b"\r\n".join([*kept, b"", b""]), body

    def _fault(self, name: str) -> str:
        if self.draw.random() >= self.share:
            return ""
        kind = self.draw.choice([kind for kind in self.kinds if kind != "missing once" or name not in self.missed])
        if kind == "missing once":
            self.missed.add(name)
        return kind


@contextlib.contextmanager
def environment(endpoint: str, keys: tuple[str, str] = KEYS) -> Iterator[None]:
    """The process's S3 settings, and what they were afterwards."""
    from pipeline.storage import s3

    values = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": keys[0],
        "AWS_SECRET_ACCESS_KEY": keys[1],
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    s3.client_of.cache_clear()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
        s3.client_of.cache_clear()
