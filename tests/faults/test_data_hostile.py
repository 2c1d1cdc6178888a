"""Hostile input: archives, images and URLs. Nothing is run, nothing outside is opened, memory is bounded, and every
refusal says what was refused.
"""

import builtins
import contextlib
import io
import os
import pickle
import resource
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import storage
from pipeline.data.formats import codecs
from pipeline.data.making import shards
from pipeline.data.making.shards import ShardConfig
from pipeline.data.making.sources import tars
from pipeline.data.sets import manifest
from pipeline.storage import s3

RNG = np.random.default_rng(0)
GOOD = codecs.encode_png(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8))


SYSTEM = os.system  # as it is before a test forbids it


class Bomb:
    """What a careless reader would run."""

    def __reduce__(self) -> Any:
        return SYSTEM, ("touch /tmp/raydiffusion-was-run",)


def member(name: str, data: bytes = b"x", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    info.size = len(data) if info.isreg() else 0
    return info, data


def archive(*members: tuple[tarfile.TarInfo, bytes], kind: int = tarfile.PAX_FORMAT, **options: Any) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=kind, **options) as out:
        for info, data in members:
            out.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return sink.getvalue()


def patched(at: int, value: bytes, checksum: bool = True) -> bytes:
    """A good archive whose first header has other bytes."""
    data = bytearray(archive(member("a.png", GOOD), kind=tarfile.USTAR_FORMAT))
    data[at : at + len(value)] = value
    if checksum:
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\x00 " % sum(data[:512])
    return bytes(data)


def archives() -> dict[str, bytes]:
    """60 archives."""
    whole = archive(member("a.png", GOOD), member("b.png", GOOD), kind=tarfile.USTAR_FORMAT)
    found = {f"a .{suffix} member": archive(member(f"a.{suffix}", pickle.dumps(Bomb()))) for suffix in tars.EXECUTABLE}
    found |= {
        f"a link to {target}, {kind!r}": archive(member("a.png", type=kind, linkname=target))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE)
        for target in ("/etc/passwd", "../../etc/passwd", "/proc/self/environ")
    }
    kinds = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"V", b"M", b"D", b"N", b"Z", b"A", b"E", b"I", b"X")
    found |= {f"type {kind!r}": archive(member("a.png", type=kind)) for kind in kinds}
    found |= {
        f"a name {name!r}": archive(member(name, b"no image"))
        for name in (
            "../a.png",
            "/etc/a.png",
            "a/../../b.png",
            "..\\a.png",
            "~/a.png",
            "$(id).png",
            "`id`.png",
            "|id.png",
        )
    }
    found |= {
        f"a size {size!r}": patched(124, size)
        for size in (
            b"77777777777\x00",
            b"-0000000001\x00",
            b"0000000000x\x00",
            b"\xff" * 12,
            b"\x80" + b"\xff" * 11,
            b"\x80" + bytes(7) + b"\x7f\xff\xff\xff",
            b"00000100000\x00",
        )
    }
    found |= {
        "a wrong checksum": patched(148, b"000000\x00 ", checksum=False),
        "no checksum": patched(148, bytes(8), checksum=False),
        "a flipped name": patched(0, b"z", checksum=False),
        "gnu sparse": patched(156, b"S"),
        "pax sparse": archive(
            member("a.png", GOOD, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.size": str(10**15)})
        ),
        "pax size": archive(member("a.png", GOOD, pax_headers={"size": str(10**14)})),
        "pax size of words": archive(member("a.png", GOOD, pax_headers={"size": "many"})),
        "pax negative size": archive(member("a.png", GOOD, pax_headers={"size": "-5"})),
        "a long pax header": archive(member("a.png", GOOD, pax_headers={"comment": "x" * 100_000})),
        "a long name": archive(member("n" * 100_000 + ".png", GOOD), kind=tarfile.GNU_FORMAT),
        "a broken pax header": patched(156, b"x"),
        "a pax header without end": whole[:0] + patched(156, b"L")[:600],
        "cut in a header": whole[:300],
        "cut in a body": whole[:700],
        "cut between members": whole[: 512 + len(GOOD) + -len(GOOD) % 512],
        "empty": b"",
        "one byte": b"\x00",
        "text": b"hello world " * 500,
        "gzip": b"\x1f\x8b\x08" + bytes(2000),
        "zip": b"PK\x03\x04" + bytes(range(256)) * 8,
        "ones": b"\xff" * 5120,
        "a pickle": pickle.dumps(Bomb()) + bytes(2000),
    }
    return found


# what the lease of a set reads to know this process again, whatever the source holds
OF_THE_LEASE = ("/proc/sys/kernel/random/boot_id", "/proc/stat", f"/proc/{os.getpid()}/stat")


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """What was opened outside the test's folder for reading, or run."""
    opened: list[str] = []
    real, low = builtins.open, os.open

    def outside(name: Any) -> bool:
        text = os.fspath(name) if isinstance(name, str | os.PathLike) else ""
        return str(text) not in ("", "/tmp", *OF_THE_LEASE) and not str(text).startswith(
            (str(tmp_path), "/dev/shm", sys.prefix, "/tmp/raydiffusion-", "/tmp/tmp", "/usr/share/zoneinfo")
        )

    def watching(name: Any, *rest: Any, **named: Any) -> Any:
        if outside(name):
            opened.append(str(name))
        return real(name, *rest, **named)

    def low_watching(name: Any, *rest: Any, **named: Any) -> int:
        if outside(name):
            opened.append(str(name))
        return low(name, *rest, **named)

    def never(*given: Any, **_: Any) -> Any:
        raise AssertionError(f"something was run: {given}")

    monkeypatch.setattr(builtins, "open", watching)
    monkeypatch.setattr(io, "open", watching)
    monkeypatch.setattr(os, "open", low_watching)
    for module, name in ((os, "system"), (os, "popen"), (subprocess, "Popen"), (pickle, "loads"), (pickle, "load")):
        monkeypatch.setattr(module, name, never)
    yield opened
    monkeypatch.undo()


def shard(source: Path | str, folder: Path, **values: Any) -> dict[str, str]:
    """The rejected images of a source and why; the source also has one good image or more."""
    config = ShardConfig(str(source), str(folder), **({"image_size": 8, "held_out": 0.0, "classes": False} | values))
    done = shards.shard_in_process(config)
    assert done.split("train").total >= 1
    return {row["source"]: row["reason"] for row in manifest.rejects(done).to_pylist()}


def test_sixty_archives(tmp_path: Path, watched: list[str]) -> None:
    hostile = archives()
    assert len(hostile) >= 60
    folder = tmp_path / "tars"
    folder.mkdir()
    (folder / "good.tar").write_bytes(archive(member("fine.png", GOOD)))
    names: dict[str, str] = {}
    for i, (name, data) in enumerate(hostile.items()):
        names[f"{i:03d}.tar"] = name
        (folder / f"{i:03d}.tar").write_bytes(data)
    reasons = shard(folder, tmp_path / "set")
    refused = {source.partition("#")[0] for source in reasons}
    assert refused == set(names), {names[n] for n in set(names) - refused}
    assert all(len(reason) > 10 for reason in reasons.values())
    assert watched == []
    assert not Path("/tmp/raydiffusion-was-run").exists()
    print(f"{len(hostile)} archives refused by name; nothing was run, nothing outside was opened")


@pytest.mark.slow
@pytest.mark.parametrize("thousands", [20, 1000])
def test_a_million_members_in_bounded_memory(tmp_path: Path, thousands: int) -> None:
    """A million refused members, in a process of its own: its peak stays within 100 MiB of what one image takes."""
    header = archive(member("a.pkl", b"x"), kind=tarfile.USTAR_FORMAT)[:1024]
    with open(tmp_path / "many.tar", "wb") as out:
        for _ in range(thousands):
            out.write(header * 1000)
        out.write(archive(member("z.png", GOOD)))
    (tmp_path / "one.tar").write_bytes(archive(member("z.png", GOOD)))
    code = """
import resource, sys
from pipeline.data.making.shards import ShardConfig, shard_in_process
done = shard_in_process(ShardConfig(sys.argv[1], sys.argv[2], image_size=8, held_out=0.0, classes=False))
print(done.card["rejected"], done.split("train").total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""
    peaks: list[int] = []
    for name, refused in (("one", 0), ("many", 1000 * thousands)):
        command = [sys.executable, "-c", code, str(tmp_path / f"{name}.tar"), str(tmp_path / name)]
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.split()
        assert [int(n) for n in told[:2]] == [refused, 1]
        peaks.append(int(told[2]))
    assert peaks[1] - peaks[0] < 100
    print(f"{thousands},000 members: peak {peaks[1]} MiB, one member {peaks[0]} MiB")


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int = 8, colour: int = 2, data: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def saved(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    sink = io.BytesIO()
    shown = image or Image.fromarray(RNG.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    shown.save(sink, kind, **options)
    return sink.getvalue()


def pictures() -> dict[str, bytes]:
    """100 images."""
    zeros = zlib.compress(bytes(50_000_000), 9)
    found = {f"png bomb {side}": png(side, side, data=zeros) for side in (9_000, 30_000, 60_000, 2**31 - 1)}
    found |= {f"png of no size {w}x{h}": png(w, h) for w, h in ((0, 0), (0, 5), (5, 0))}
    found |= {f"png 16 bit, colour {c}": png(4, 4, 16, c) for c in (0, 2, 4, 6)}
    found |= {
        f"png colour {c}, depth {d}": png(4, 4, d, c, zlib.compress(b""))
        for c, d in ((1, 8), (5, 8), (2, 1), (3, 16), (7, 8))
    }
    found |= {f"another format {kind}": saved(kind) for kind in ("PPM", "ICO", "TGA", "PCX", "SGI", "JPEG2000")}
    found |= {
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "postscript": b"%!PS-Adobe-3.0\n(/etc/passwd) (r) file\n",
        "mvg": b"push graphic-context\nimage over 0,0 0,0 'ephemeral:/etc/passwd'\n",
        "html": b"<img src=x onerror=alert(1)>",
        "elf": b"\x7fELF" + bytes(100),
        "script": b"#!/bin/sh\ntouch /tmp/raydiffusion-was-run\n",
        "pickle": pickle.dumps(Bomb()),
        "npy": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,)}" + bytes(60),
        "empty": b"",
        "nul": b"\x00",
    }
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "AVIF"):
        data = saved(kind)
        found |= {
            f"{kind} cut at {int(share * 100)}%": data[: int(len(data) * share)]
            for share in np.linspace(0.02, 0.96, 17)
        }
    jpg = saved("JPEG")
    at = jpg.index(b"\xff\xc0")
    found |= {
        f"jpg of {h} x {w}": jpg[: at + 5] + struct.pack(">HH", h, w) + jpg[at + 9 :]
        for h, w in ((65_535, 65_535), (0, 24), (24, 0), (65_535, 2_000))
    }
    found |= {
        "jpg 12 bit": jpg[: at + 4] + b"\x0c" + jpg[at + 5 :],
        "jpg of markers": b"\xff\xd8" + b"\xff\xe1\x00\x02" * 100_000,
        "jpg of fill": b"\xff\xd8\xff" + b"\xff" * 1_000_000,
        "jpg beyond its segment": b"\xff\xd8\xff\xe1\xff\xff" + bytes(100),
        "webp of a big canvas": b"RIFF"
        + struct.pack("<I", 22)
        + b"WEBPVP8X"
        + struct.pack("<I", 10)
        + bytes(4)
        + b"\xff" * 6,
        "webp of nothing": b"RIFF" + struct.pack("<I", 22) + b"WEBPXXXX" + struct.pack("<I", 10) + bytes(10),
        "png chunks without end": b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0))
        + chunk(b"tEXt", b"a") * 1000,
        "png chunk of 2 GB": b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0))
        + b"\x7f\xff\xff\xffIDAT",
        "png with no data": png(4, 4),
        "png with a text bomb for data": png(4, 4, data=b"no zlib"),
    }
    return found


def test_a_hundred_images(tmp_path: Path, watched: list[str]) -> None:
    hostile = pictures()
    assert len(hostile) >= 100
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "good.png").write_bytes(GOOD)
    for i, data in enumerate(hostile.values()):
        (folder / f"{i:03d}.png").write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reasons = shard(folder, tmp_path / "set")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    names = list(hostile)
    assert set(reasons) == {f"{i:03d}.png" for i in range(len(hostile))}, [
        names[i] for i in range(len(names)) if f"{i:03d}.png" not in reasons
    ]
    assert grown < 300
    assert watched == []
    print(f"{len(hostile)} images refused by name; peak grew {grown} MiB")


def urls(root: str) -> list[str]:
    """200 URLs that lie outside of `root` or are not opened at all."""
    inner = [
        "/etc/passwd",
        "169.254.169.254/latest/meta-data",
        "localhost:8000/x.png",
        "[::1]/x.png",
        "127.1/x.png",
        "0/x.png",
        "h/x?next=http://169.254.169.254/",
        "u:p@h/x.png",
        "h/%2e%2e/x.png",
        "h/x.png#y",
    ]
    schemes = [
        "pipe:",
        "pipe:cat ",
        "http://",
        "https://",
        "file://",
        "file:",
        "ftp://",
        "gs://",
        "az://",
        "data:",
        "python:",
        "ssh://",
        "sftp://",
        "S3://",
        "HTTP://",
        "s3:",
    ]
    climbs = [
        "..",
        "../x.png",
        "a/../../x.png",
        "a/..",
        "./x.png",
        ".",
        "/x.png",
        "//x.png",
        "a//x.png",
        "a\\..\\x.png",
        "..\\x.png",
        "a/./x.png",
        "a\x00.png",
        "a\n.png",
        "x.png/",
        "",
        f"{root}/../x.png",
        f"{root}/a/../../x.png",
        f"{root}-other/x.png",
        "/proc/self/environ",
        "/dev/stdin",
        "s3://other/x.png",
        "s3://other/../x.png",
        "s3://B/x.png",
        "s3://user:secret@b/x.png",
    ]
    braces = [
        "{a..b}.png",
        "{000..999}.png",
        "pipe:{a,b}",
        "s3://{a,b}/x.png",
        "$(id).png",
        "`id`.png",
        "|id",
        ";id.png",
        "$HOME/x.png",
        "~root/x.png",
        "%00.png",
        "%2e%2e/x.png",
        "a b.png",
        "*.png",
        "?.png",
    ]
    return [scheme + rest for scheme in schemes for rest in inner] + climbs + braces


def test_two_hundred_urls(tmp_path: Path, watched: list[str]) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "good.png").write_bytes(GOOD)
    (tmp_path / "x.png").write_bytes(GOOD)
    (tmp_path / "root-other").mkdir()
    (tmp_path / "root-other" / "x.png").write_bytes(GOOD)
    hostile = urls(str(root))
    assert len(hostile) >= 200
    pq.write_table(pa.table({"url": ["good.png", *hostile]}), tmp_path / "t.parquet")
    reasons = shard(tmp_path / "t.parquet", tmp_path / "set", image_root=str(root))
    assert set(reasons) == {f"t.parquet#{i}" for i in range(1, len(hostile) + 1)}, [
        url for i, url in enumerate(hostile, 1) if f"t.parquet#{i}" not in reasons
    ]
    kinds = ("refused", "cannot be read", "no image in this row")
    assert all(any(kind in reason for kind in kinds) for reason in reasons.values())
    assert watched == []
    for url in hostile:
        with contextlib.suppress(ValueError):
            assert storage.join(str(root), url).startswith(f"{root}/")
    print(f"{len(hostile)} URLs refused by name; nothing outside of the root was opened")


def test_a_store_that_redirects_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store's answer 307 to a link-local address is an error, and nobody goes there."""
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    seen: list[str] = []

    class Redirecting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(307)
            self.send_header("Location", f"http://127.0.0.1:{server.server_port}/stolen")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Redirecting)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}"),
        ("AWS_ACCESS_KEY_ID", "k"),
        ("AWS_SECRET_ACCESS_KEY", "s"),
    ):
        monkeypatch.setenv(name, value)
    s3.client_of.cache_clear()
    try:
        with pytest.raises(s3.StorageError, match="307"):
            storage.read_bytes("s3://bucket/x.png")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        s3.client_of.cache_clear()
    assert "/stolen" not in seen
