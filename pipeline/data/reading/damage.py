"""What is wrong with a damaged shard, byte by byte, and which of its samples are still whole.

Of a shard made here, all but the images' bytes follow from the rows of its samples: headers, padding, classes, tags,
captions, the end mark. Those are compared byte for byte, and each image by its own sha256.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.formats import tar
from pipeline.data.formats.tar import DamagedShard
from pipeline.data.sets.manifest import SetRef
from pipeline.data.sets.tables import shard_rows

UInt8s = NDArray[np.uint8]

MOST_FOUND = 100
SHOWN = 16  # bytes


@dataclass(frozen=True)
class Examined:
    """`damage` in the order of the bytes, at least one; where the samples should be; (n,) which of them are lost."""

    damage: tuple[DamagedShard, ...]
    members: tar.Members
    lost: NDArray[np.bool_]


def examine(url: str, data: UInt8s | None, of: SetRef, shard: str) -> Examined:
    """Compares a shard (None: there is no such file), whose digest is not the manifest's, with its samples' rows.

    Raises:
        DamagedShard: the samples tables cannot be read either, so that nothing more can be said or saved.
    """
    try:
        rows = shard_rows(of.root, of.tables, shard)
    except (OSError, ValueError) as error:
        raise DamagedShard(url, 0, "the manifest's sha256", f"another; its samples' rows: {error}") from None
    table, have = rows.to_pylist(), b"" if data is None else data.tobytes()
    found = _Found(url, have)
    lost = np.zeros(len(table), dtype=np.bool_)
    texts: dict[str, list[tuple[int, int]]] = {extra: [] for extra in of.extras if extra != tar.CLASS}
    at = 0
    for i, row in enumerate(table):
        for extra, name, want, size in _members(row, of):
            found.unlike(at, tar.header(name, size))
            at += tar.BLOCK
            if want is None:
                lost[i] |= found.unlike_digest(at, size, row)
            else:
                lost[i] |= found.unlike(at, want)  # its labels are not what they were
            if extra in texts:
                texts[extra].append((at, size))
            at += size
            if at < len(have):
                found.unlike(at, bytes(-size % tar.BLOCK))
            at += -size % tar.BLOCK
    found.unlike(at, tar.END)
    at += len(tar.END)
    if len(have) > at:
        found.add(at, f"{at} bytes", f"{len(have)} or more")
    if data is None:
        found.damage.insert(0, DamagedShard(url, 0, f"{at} bytes", "no such file"))
    if not found.damage:
        found.add(0, "the manifest's sha256", "another, though every sample is as its row says")
    offsets, sizes, labels = (
        np.array([-1 if row[name] is None else row[name] for row in table], dtype=np.int64)
        for name in ("offset", "size", "label")
    )
    places = {extra: np.array(values, dtype=np.int64).reshape(-1, 2) for extra, values in texts.items()}
    return Examined(tuple(found.damage), tar.Members(offsets, sizes, labels, places), lost)


class _Found:
    """Differences between what a shard has and what it should have, the first MOST_FOUND of them."""

    def __init__(self, url: str, have: bytes) -> None:
        self.url, self.have, self.damage = url, have, list[DamagedShard]()

    def add(self, at: int, expected: str, got: str) -> None:
        if len(self.damage) < MOST_FOUND:
            self.damage.append(DamagedShard(self.url, at, expected, got))

    def unlike(self, at: int, want: bytes) -> bool:
        """Notes the first byte from `at` on that is not as wanted, if there is one."""
        got = self.have[at : at + len(want)]
        if got == want:
            return False
        first = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), len(got))
        there = repr(got[first : first + SHOWN]) if got[first:] else "the end of the file"
        self.add(min(at + first, len(self.have)), repr(want[first : first + SHOWN]), there)
        return True

    def unlike_digest(self, at: int, size: int, row: dict[str, Any]) -> bool:
        """Notes an image that has not its row's sha256."""
        body = self.have[at : at + size]
        got = hashlib.sha256(body).digest()
        if got == row["sha256"]:
            return False
        say = f"sha256 {got.hex()}" if len(body) == size else f"the end of the file after {len(body)} of them"
        expected = f"the {size} bytes of sample {row['key']} with sha256 {row['sha256'].hex()}"
        self.add(at if len(body) == size else len(self.have), expected, say)
        return True


def _members(row: dict[str, Any], of: SetRef) -> Iterator[tuple[str, bytes, bytes | None, int]]:
    """A sample's members: which extra, name, bytes (None: the image, of which the row has the digest), size."""
    key = row["key"].encode()
    yield "", key + tar.SUFFIX[of.encoding], None, row["size"]
    for extra in of.extras:
        text = tar.extra_bytes(extra, row)
        yield extra, key + b"." + extra.encode(), text, len(text)
