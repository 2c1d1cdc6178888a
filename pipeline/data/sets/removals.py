"""Take-down: a list of sha256 digests, and the samples that they name.

A digest names an image by the bytes of its source file (what `sha256sum photo.jpg` prints), by the bytes stored in the
shard, or by the stored pixels (the `content` column), so that one line takes all exact copies down.
"""

import re

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.data.sets.manifest import Manifest, Split
from pipeline.data.sets.tables import sample_batches

MOST_BYTES = 1 << 30
COLUMNS = ("original", "sha256", "content")

_LINE = re.compile(rb"([0-9a-fA-F]{64})(?:\s+.*)?")


def read_list(url: str) -> set[bytes]:
    """The digests of a list: one a line in hex, the rest of the line (a file name, a reason) is free; `#` begins a
    comment.

    Raises:
        FileNotFoundError: no such list. ValueError: a line that is no digest.
    """
    found: set[bytes] = set()
    for number, line in enumerate(storage.read_bytes(url, 0, MOST_BYTES).splitlines(), 1):
        text = line.strip()
        if not text or text.startswith(b"#"):
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            shown = text[:80].decode("utf-8", "replace")
            raise ValueError(f"{url} line {number}: {shown!r} does not begin with a sha256 of 64 hexadecimal digits")
        found.add(bytes.fromhex(match.group(1).decode()))
    return found


def places(manifest: Manifest, digests: set[bytes]) -> list[tuple[str, int, bytes]]:
    """The samples of one set that the digests name: shard, index within it, digest. Reads the samples tables a slice
    at a time.
    """
    found: list[tuple[str, int, bytes]] = []
    if not digests:
        return found
    for rows in sample_batches(manifest.url, manifest.sample_tables, ["shard", *COLUMNS]):
        seen: dict[str, int] = {}
        for shard, *named in zip(*(rows[name].to_pylist() for name in ("shard", *COLUMNS)), strict=True):
            index = seen[shard] = seen.get(shard, -1) + 1
            hit = next((digest for digest in named if digest in digests), None)
            if hit is not None:
                found.append((shard, index, hit))
    return found


def ids(manifest: Manifest, split_name: str, url: str) -> NDArray[np.int64]:
    """The ids in a split, sorted, of the samples that the list at `url` names."""
    digests = read_list(url)
    made: list[int] = []
    first = 0
    for _, part in manifest.parts:
        split: Split = part.split(split_name)
        starts = dict(zip(split.urls.to_pylist(), split.starts.tolist(), strict=False))
        made += [first + starts[shard] + index for shard, index, _ in places(part, digests) if shard in starts]
        first += int(split.starts[-1])
    return np.array(sorted(made), dtype=np.int64)
