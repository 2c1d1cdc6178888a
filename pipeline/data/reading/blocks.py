"""A block: the decoded samples of one logical shard for some consecutive steps. Made by a pure function of its
request, in a thread or in a Ray task; no torch here, so that a reader's process stays small.

A shard's bytes are used only after their size and sha256 agreed with the manifest. A process keeps the shards it
verified last, up to a stated number of bytes, because the next block wants the same window of shards; for a set on S3
the node keeps them on disk for all its processes.
"""

import io
import json
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.choose import choose
from pipeline.data.formats import codecs, tar
from pipeline.data.reading.cache import DiskCache, MemoryCache, default_folder
from pipeline.data.reading.damage import Examined, examine
from pipeline.data.sets.manifest import ImageSpec, SetRef

Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class ShardRef:
    """One tar shard as the manifest has it; `place` is the number of its set in the request."""

    place: int
    url: str
    size: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class Reading:
    """How to read.

    Attributes:
        on_damage: a policy of DAMAGE_POLICIES.
        cache_bytes, disk_cache_bytes: how many verified bytes the process, and the node for sets on S3, may keep.
        tag_names: the vocabulary of tags.
    """

    on_damage: str = "fail"
    cache_bytes: int = 0
    disk_cache_bytes: int = 0
    tag_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class BlockRequest:
    """Everything a block depends on.

    Attributes:
        sets, image: what is read.
        logical_shard, first_step, steps: whose block, global batches first_step .. first_step + steps - 1.
        shards: the tar shards it needs.
        shard, index, ids: (n,) for each sample in order: which of `shards`, which sample in it, its id in the split.
        flip: (n,) whether it is mirrored left to right.
        skip: (n,) whether it must not be read; it counts as lost.
    """

    sets: tuple[SetRef, ...]
    image: ImageSpec
    logical_shard: int
    first_step: int
    steps: int
    shards: tuple[ShardRef, ...]
    shard: Int64s
    index: Int64s
    ids: Int64s
    flip: NDArray[np.bool_]
    skip: NDArray[np.bool_]
    reading: Reading

    def has(self, extra: str) -> bool:
        """Whether its samples carry an extra."""
        return any(extra in of.extras for of in self.sets)


@dataclass(frozen=True)
class Block:
    """images (n, C, H, W) uint8, labels (n,) int64 (-1 where the set has no classes), tags (n, K) uint8 of 0 and 1,
    captions, ids (n,) int64, lost (n,) bool (no image could or should be read); n = steps x samples a step.
    `damage` says what was found wrong with shards that were read on quarantine.

    `pixels` are the images as they lie in memory: (n, H, W, C), as decoders give them, or (n, C, H, W), raw.
    """

    logical_shard: int
    first_step: int
    steps: int
    pixels: codecs.UInt8s
    channels_last: bool
    labels: Int64s
    tags: NDArray[np.uint8] | None
    captions: tuple[str, ...] | None
    ids: Int64s
    lost: NDArray[np.bool_]
    damage: tuple[tar.DamagedShard, ...]

    @property
    def images(self) -> codecs.UInt8s:
        """(n, C, H, W), a view."""
        return self.pixels.transpose(0, 3, 1, 2) if self.channels_last else self.pixels


@dataclass(frozen=True)
class VerifiedShard:
    """A shard's bytes, digest checked, and where its samples are; or what is left of a damaged one."""

    data: codecs.UInt8s
    members: tar.Members
    lost: NDArray[np.bool_] | None = None
    damage: tuple[tar.DamagedShard, ...] = ()


CACHE: MemoryCache[VerifiedShard] = MemoryCache()


def read_block(request: BlockRequest) -> Block:
    """Fetches, verifies, decodes and augments one block.

    Raises:
        DamagedShard: a shard is not what its manifest says, and the policy is to fail. OSError: the store does not
            answer.
    """
    count, names = len(request.shard), request.reading.tag_names
    labels = np.full(count, -1, dtype=np.int64)
    lost = request.skip.copy()
    tags = np.zeros((count, len(names)), dtype=np.uint8) if request.has(tar.TAGS) else None
    captions = [""] * count if request.has(tar.CAPTION) else None
    damage: list[tar.DamagedShard] = []
    taken: list[_Taken] = []
    for number, ref in enumerate(request.shards):
        rows = np.flatnonzero((request.shard == number) & ~request.skip)
        if not len(rows):
            continue
        of = request.sets[ref.place]
        shard = verified(of, ref, request.reading)
        damage += shard.damage
        if shard.lost is not None:
            gone = shard.lost[request.index[rows]]
            lost[rows[gone]] = True
            rows = rows[~gone]
        wanted = request.index[rows]
        labels[rows] = shard.members.labels[wanted]
        taken.append(_Taken(ref.url, of.encoding, shard, rows, wanted))
        if tags is not None:
            _read_tags(tags, rows, shard, wanted, names)
        if captions is not None:
            for row, text in zip(rows.tolist(), _texts(shard, tar.CAPTION, wanted), strict=True):
                captions[row] = text.decode("utf-8", "replace")
    return Block(
        request.logical_shard,
        request.first_step,
        request.steps,
        *_pixels(taken, request, lost),
        labels,
        tags,
        None if captions is None else tuple(captions),
        request.ids,
        lost,
        tuple(damage),
    )


@dataclass(frozen=True)
class _Taken:
    """What a block takes of one shard: row rows[i] is its sample wanted[i]."""

    name: str
    encoding: str
    shard: VerifiedShard
    rows: Int64s
    wanted: Int64s


def _pixels(taken: list[_Taken], request: BlockRequest, lost: NDArray[np.bool_]) -> tuple[codecs.UInt8s, bool]:
    """`Block.pixels`, mirrored where asked, zeros where lost; and `Block.channels_last`.

    Raises:
        DamagedShard: not what the set's format says.
    """
    encoded = [of for of in taken if of.encoding != "raw"]
    (channels, height, width), count = request.image.shape, len(request.shard)
    channels_last = any(of.encoding != "raw" for of in request.sets)  # whatever this block holds of them
    out = codecs.room((count, height, width, channels) if channels_last else (count, channels, height, width))
    out[lost] = 0
    for of in taken:
        if of.encoding == "raw":
            raw = _raw_pixels(of, request.image)
            out[of.rows] = raw.transpose(0, 2, 3, 1) if channels_last else raw
    if encoded:
        _decode(encoded, out)
    mirrored = np.flatnonzero(request.flip)
    if len(mirrored):
        out[mirrored] = out[mirrored, :, ::-1] if channels_last else out[mirrored, :, :, ::-1]
    return out, channels_last


def _decode(taken: list[_Taken], out: codecs.UInt8s) -> None:
    rows, offsets, sizes = (
        np.concatenate(parts)
        for parts in zip(
            *((of.rows, of.shard.members.offsets[of.wanted], of.shard.members.sizes[of.wanted]) for of in taken),
            strict=True,
        )
    )
    order = np.argsort(rows)  # images that lie beside each other in the block are decoded together
    whose = np.repeat(np.arange(len(taken)), [len(of.rows) for of in taken])[order].tolist()
    views, starts, ends = (
        [of.shard.data.data for of in taken],
        offsets[order].tolist(),
        (offsets + sizes)[order].tolist(),
    )
    payloads = [views[i][start:end] for i, start, end in zip(whose, starts, ends, strict=True)]
    whole = len(rows) == len(out)
    into = out if whole else codecs.room((len(rows), *out.shape[1:]))
    try:
        codecs.decode_own(payloads, into)
    except codecs.DecodeError as refused:
        of = taken[whose[refused.index]]
        raise tar.DamagedShard(of.name, starts[refused.index], f"a {of.encoding} image", refused.reason) from None
    if not whole:
        out[rows[order]] = into


def _raw_pixels(of: _Taken, image: ImageSpec) -> codecs.UInt8s:
    """(n, C, H, W): raw samples are a header that is always the same, and pixels as they lie."""
    prefix = np.frombuffer(raw_prefix(image.shape), np.uint8)
    length = len(prefix) + image.bytes
    offsets, sizes = of.shard.members.offsets[of.wanted], of.shard.members.sizes[of.wanted]
    wrong = np.flatnonzero(sizes != length)
    if not len(wrong):
        windows = np.lib.stride_tricks.sliding_window_view(of.shard.data, length)
        wrong = np.flatnonzero((windows[offsets, : len(prefix)] != prefix).any(axis=1))
    if len(wrong):
        where = int(wrong[0])
        expected = f"a .npy of uint8 {image.shape}, {length} bytes"
        raise tar.DamagedShard(of.name, int(offsets[where]), expected, f"{sizes[where]} bytes or another header")
    pixels = np.lib.stride_tricks.sliding_window_view(of.shard.data, image.bytes)
    return pixels[offsets + len(prefix)].reshape(-1, *image.shape)


def _texts(shard: VerifiedShard, extra: str, wanted: Int64s) -> list[bytes]:
    data = shard.data.data
    return [bytes(data[offset : offset + size]) for offset, size in shard.members.texts[extra][wanted].tolist()]


def _read_tags(tags: codecs.UInt8s, rows: Int64s, shard: VerifiedShard, wanted: Int64s, names: tuple[str, ...]) -> None:
    place = _places(names)
    for row, text in zip(rows.tolist(), _texts(shard, tar.TAGS, wanted), strict=True):
        tags[row, [place[tag] for tag in json.loads(text)]] = 1


@lru_cache(maxsize=4)
def _places(names: tuple[str, ...]) -> dict[str, int]:
    return {name: i for i, name in enumerate(names)}


@lru_cache
def raw_prefix(shape: tuple[int, int, int]) -> bytes:
    """The header of a raw sample's .npy file."""
    sink = io.BytesIO()
    np.lib.format.write_array_header_1_0(sink, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return sink.getvalue()


def verified(of: SetRef, ref: ShardRef, reading: Reading) -> VerifiedShard:
    """One shard, from memory or fetched.

    Raises:
        DamagedShard: as `fetch`.
    """
    name = f"{ref.sha256} {ref.samples} {of.encoding} {of.extras} {reading.on_damage}"
    return CACHE.get(name, reading.cache_bytes, lambda: fetch(of, ref, reading))


def fetch(of: SetRef, ref: ShardRef, reading: Reading) -> VerifiedShard:
    """Reads one shard and checks it against the manifest.

    Raises:
        DamagedShard: missing, another size or digest, or not our layout, and the policy is to fail.
    """
    url = storage.join(of.root, *ref.url.split("/"))
    wrong: list[codecs.UInt8s | None] = []  # what was read last, where the digest is wrong

    def read() -> codecs.UInt8s:
        data, right = storage.read_sure(url, ref.sha256, ref.size + 1)
        if data is not None and right:
            return data
        wrong.append(data)
        return np.empty(0, np.uint8)

    if storage.is_s3(url) and reading.disk_cache_bytes:
        data = DiskCache(default_folder(), reading.disk_cache_bytes).get(ref.sha256, ref.size, read)
    else:
        data = read()
    if not wrong:
        return VerifiedShard(data, tar.walk(url, data, ref.samples, of.encoding, of.extras))
    found = examine(url, wrong[0], of, ref.url)
    return choose(DAMAGE_POLICIES, reading.on_damage, "on_damage")(wrong[0], found)


def _fail(data: codecs.UInt8s | None, found: Examined) -> VerifiedShard:
    raise found.damage[0]


def _quarantine(data: codecs.UInt8s | None, found: Examined) -> VerifiedShard:
    return VerifiedShard(np.empty(0, np.uint8) if data is None else data, found.members, found.lost, found.damage)


DAMAGE_POLICIES = {
    "fail": _fail,  # stop with the first thing that is wrong
    "quarantine": _quarantine,  # go on with the samples whose own digests are right
}
