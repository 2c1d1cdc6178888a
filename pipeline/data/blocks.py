"""A block: the decoded samples of one logical shard for some consecutive steps. Made by a pure function of its
request, in a thread or in a Ray task; no torch here, so that a reader's process stays small.

A shard's bytes are used only after their size and sha256 agreed with the manifest. A process keeps the shards it
verified last, up to a stated number of bytes, because the next block wants the same window of shards.
"""

import io
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.data import images, storage, tar
from pipeline.data.manifest import ImageSpec

Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class ShardRef:
    """One tar shard as the manifest has it."""

    url: str
    size: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class BlockRequest:
    """Everything a block depends on.

    Attributes:
        root: the set's URL. image, labelled: its format.
        logical_shard, first_step, steps: whose block, global batches first_step .. first_step + steps - 1.
        shards: the tar shards it needs.
        shard, index, ids: (n,) for each sample in order: which of `shards`, which sample in it, its id in the split.
        flip: (n,) whether it is mirrored left to right.
        cache_bytes: how many verified bytes the process may keep.
    """

    root: str
    image: ImageSpec
    labelled: bool
    logical_shard: int
    first_step: int
    steps: int
    shards: tuple[ShardRef, ...]
    shard: Int64s
    index: Int64s
    ids: Int64s
    flip: NDArray[np.bool_]
    cache_bytes: int


@dataclass(frozen=True)
class Block:
    """images (n, C, H, W) uint8, labels (n,) int64 (-1 where the set has no classes), ids (n,) int64; n = steps x
    samples a step.
    """

    logical_shard: int
    first_step: int
    steps: int
    images: images.UInt8s
    labels: Int64s
    ids: Int64s


@dataclass(frozen=True)
class VerifiedShard:
    """A shard's bytes, digest checked, and where its samples are."""

    data: bytes
    members: tar.Members


def read_block(request: BlockRequest) -> Block:
    """Fetches, verifies, decodes and augments one block.

    Raises:
        DamagedShard: a shard is not what its manifest says. OSError: the store does not answer.
    """
    count = len(request.shard)
    out = np.empty((count, *request.image.shape), dtype=np.uint8)
    labels = np.empty(count, dtype=np.int64)
    for number, ref in enumerate(request.shards):
        here = np.flatnonzero(request.shard == number)
        shard = CACHE.get(request.root, ref, request.image, request.labelled, request.cache_bytes)
        wanted = request.index[here]
        labels[here] = shard.members.labels[wanted]
        decode_into(out, here, shard, wanted, request.image, ref.url)
    mirrored = np.flatnonzero(request.flip)
    if len(mirrored):
        out[mirrored] = out[mirrored, :, :, ::-1]
    return Block(request.logical_shard, request.first_step, request.steps, out, labels, request.ids)


def decode_into(
    out: images.UInt8s, rows: Int64s, shard: VerifiedShard, wanted: Int64s, image: ImageSpec, name: str
) -> None:
    """out[rows[i]] = the shard's sample wanted[i], (C, H, W)."""
    data = memoryview(shard.data)
    offsets, sizes = shard.members.offsets[wanted].tolist(), shard.members.sizes[wanted].tolist()
    hwc = (image.size, image.size, image.channels)
    prefix = raw_prefix(image.shape)
    for row, offset, size in zip(rows.tolist(), offsets, sizes, strict=True):
        payload = data[offset : offset + size]
        if image.encoding == "raw":
            if size != len(prefix) + image.bytes or payload[: len(prefix)] != prefix:
                raise tar.DamagedShard(
                    name, offset, f"a .npy of uint8 {image.shape}", f"{size} bytes with another header"
                )
            out[row] = np.frombuffer(payload, np.uint8, offset=len(prefix)).reshape(image.shape)
            continue
        try:
            pixels = images.decode_own(payload, image.channels)
        except ValueError as error:
            raise tar.DamagedShard(name, offset, "a PNG", str(error)) from None
        if pixels.shape != hwc:
            raise tar.DamagedShard(name, offset, f"pixels of shape {hwc}", str(pixels.shape))
        out[row] = pixels.transpose(2, 0, 1)


@lru_cache
def raw_prefix(shape: tuple[int, int, int]) -> bytes:
    """The header of a raw sample's .npy file."""
    sink = io.BytesIO()
    np.lib.format.write_array_header_1_0(sink, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return sink.getvalue()


def fetch(root: str, ref: ShardRef, image: ImageSpec, labelled: bool) -> VerifiedShard:
    """Reads one shard and checks it against the manifest.

    Raises:
        DamagedShard: missing, another size or digest, or not our layout.
    """
    url = storage.join(root, *ref.url.split("/"))
    try:
        data = storage.read_bytes(url, 0, ref.size + 1)
    except FileNotFoundError:
        raise tar.DamagedShard(url, 0, f"{ref.size} bytes", "no such file") from None
    if len(data) != ref.size:
        raise tar.DamagedShard(
            url, min(len(data), ref.size), f"{ref.size} bytes", f"{len(data)} bytes" if len(data) < ref.size else "more"
        )
    got = storage.digest(data)
    if got != ref.sha256:
        raise tar.DamagedShard(url, None, f"sha256 {ref.sha256}", got)
    return VerifiedShard(data, tar.walk(url, data, ref.samples, image.encoding, labelled))


class ShardCache:
    """Verified shards of this process, the last used ones, up to a number of bytes; two threads that want the same
    shard fetch it once.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kept: OrderedDict[str, VerifiedShard] = OrderedDict()
        self.bytes = 0
        self.fetching: dict[str, threading.Lock] = {}

    def get(self, root: str, ref: ShardRef, image: ImageSpec, labelled: bool, limit: int) -> VerifiedShard:
        """The shard, from memory or from the store; at most `limit` bytes stay afterwards."""
        name = f"{ref.sha256} {ref.samples} {image.encoding} {labelled}"
        found = self._kept(name)
        if found is not None:
            return found
        with self.lock:
            turn = self.fetching.setdefault(name, threading.Lock())
        with turn:
            found = self._kept(name)
            if found is not None:
                return found
            try:
                made = fetch(root, ref, image, labelled)
            finally:
                with self.lock:
                    self.fetching.pop(name, None)
            with self.lock:
                self.kept[name] = made
                self.bytes += len(made.data)
                while self.kept and self.bytes > limit:
                    _, dropped = self.kept.popitem(last=False)
                    self.bytes -= len(dropped.data)
            return made

    def clear(self) -> None:
        """Forgets everything."""
        with self.lock:
            self.kept.clear()
            self.bytes = 0

    def _kept(self, name: str) -> VerifiedShard | None:
        with self.lock:
            found = self.kept.get(name)
            if found is not None:
                self.kept.move_to_end(name)
            return found


CACHE = ShardCache()
