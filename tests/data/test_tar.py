"""Our tars: readable by tarfile, refused where they are not ours."""

import io
import tarfile
from typing import Any

import numpy as np
import pytest

from pipeline.data.formats import tar

SAMPLES = [(b"00000-00000", b"x" * 700, 3), (b"00000-00001", b"y" * 512, 0), (b"00001-00000", b"", 41)]


def shard(samples: list[tuple[bytes, bytes, int]] = SAMPLES) -> bytes:
    made = b""
    for key, payload, label in samples:
        text = b"%d" % label
        made += (
            tar.header(key + b".png", len(payload))
            + tar.padded(payload)
            + tar.header(key + b".cls", len(text))
            + tar.padded(text)
        )
    return made + tar.END


def walk(data: bytes, samples: int = 1) -> tar.Members:
    return tar.walk("evil", np.frombuffer(data, np.uint8), samples, "png", ("cls",))


def foreign(name: str = "00000-00000.png", payload: bytes = b"x", **fields: Any) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=fields.pop("format", tarfile.USTAR_FORMAT)) as file:
        info = tarfile.TarInfo(name)
        for field, value in fields.items():
            setattr(info, field, value)
        info.size = len(payload) if info.isreg() else 0
        file.addfile(info, io.BytesIO(payload))
    return sink.getvalue()


def test_tarfile_reads_it() -> None:
    with tarfile.open(fileobj=io.BytesIO(shard())) as file:
        members = [(m.name, m.mode, m.uid, m.mtime, file.extractfile(m).read()) for m in file]  # pyright: ignore[reportOptionalMemberAccess]
    expected = [(k.decode() + s, 0o644, 0, 0, d) for k, p, c in SAMPLES for s, d in ((".png", p), (".cls", b"%d" % c))]
    assert members == expected


def test_long_names() -> None:
    head = tar.header(b"n" * 100, 7)
    assert tarfile.TarInfo.frombuf(head, "ascii", "strict").name == "n" * 100
    with pytest.raises(ValueError, match="101 bytes"):
        tar.header(b"n" * 101, 7)


def test_walk() -> None:
    data = shard()
    members = walk(data, 3)
    assert members.labels.tolist() == [3, 0, 41]
    assert [data[o : o + n] for o, n in zip(members.offsets.tolist(), members.sizes.tolist(), strict=True)] == [
        p for _, p, _ in SAMPLES
    ]


HOSTILE = {
    "link": foreign(type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": foreign(type=tarfile.LNKTYPE, linkname="00000-00000.png"),
    "device": foreign(type=tarfile.CHRTYPE),
    "block device": foreign(type=tarfile.BLKTYPE),
    "fifo": foreign(type=tarfile.FIFOTYPE),
    "folder": foreign(type=tarfile.DIRTYPE),
    "gnu long name": foreign("d/" * 60 + "00000-00000.png", format=tarfile.GNU_FORMAT),
    "pax": foreign(format=tarfile.PAX_FORMAT, pax_headers={"comment": "x", "path": "/etc/passwd"}),
    "pax size": foreign(format=tarfile.PAX_FORMAT, pax_headers={"size": "1"}),
    "gnu sparse": foreign(type=tarfile.GNUTYPE_SPARSE),
    "old v7 magic": shard()[:257] + bytes(8) + shard()[265:],
    "up": foreign("../00000-00000.png"),
    "absolute": foreign("/00000-00000.png"),
    "prefix": foreign("a" * 60 + "/" + "b" * 60 + ".png"),
    "pickle": foreign("00000-00000.pkl"),
    "torch": foreign("00000-00000.pth"),
    "npy in png set": foreign("00000-00000.npy"),
    "json": foreign("00000-00000.json"),
    "no suffix": foreign("00000-00000"),
    "newline": foreign("00000-00000\n.png"),
    "class first": shard([])[:0] + tar.header(b"00000-00000.cls", 1) + tar.padded(b"1") + tar.END,
    "empty": b"",
    "end only": tar.END,
    "text": b"hello" * 1000,
    "no class": tar.header(b"00000-00000.png", 1) + tar.padded(b"x") + tar.END,
    "other key": tar.header(b"00000-00000.png", 0) + tar.header(b"00000-00001.cls", 1) + tar.padded(b"1") + tar.END,
    "class text": tar.header(b"00000-00000.png", 0) + tar.header(b"00000-00000.cls", 2) + tar.padded(b"-1") + tar.END,
    "class long": tar.header(b"00000-00000.png", 0)
    + tar.header(b"00000-00000.cls", 5000)
    + tar.padded(b"1" * 5000)
    + tar.END,
    "size beyond": tar.header(b"00000-00000.png", 8**11 - 1) + tar.padded(b"x") + tar.END,
    "size negative": tar.header(b"00000-00000.png", 0).replace(
        b"00000000000\x00" + b"0" * 11, b"-0000000001\x00" + b"0" * 11
    )
    + tar.END,
    "size base 256": tar.header(b"00000-00000.png", 0)[:124]
    + b"\x80"
    + bytes(11)
    + tar.header(b"00000-00000.png", 0)[136:]
    + tar.END,
    "surplus sample": shard(SAMPLES[:2]),
    "bytes after the end": shard(SAMPLES[:1]) + b"\0",
    "half an end": shard(SAMPLES[:1])[:-512],
    "cut in a header": shard(SAMPLES[:1])[:300],
    "cut in a body": shard(SAMPLES[:1])[:900],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused_by_name(name: str) -> None:
    with pytest.raises(tar.DamagedShard, match=r"damaged shard evil at byte \d+: expected .+, got .+"):
        walk(HOSTILE[name])


def test_a_million_members_cost_no_more_than_the_manifest_says() -> None:
    data = (
        tar.header(b"00000-00000.png", 0) + tar.header(b"00000-00000.cls", 1) + tar.padded(b"1")
    ) * 100_000 + tar.END
    with pytest.raises(tar.DamagedShard, match="the end mark after 2 samples"):
        walk(data, 2)
