"""The stream of batches: an endless sequence that depends on nothing but (manifest digest, seed, configuration); its
state is one integer, the next step.

`Stream` cuts the coming steps into blocks, keeps as many requests under way as the stated bytes allow, and hands out
batches in order. Who reads is a detail: `ThreadReaders` here, Ray tasks in `cluster/feed.py`; both run
`blocks.read_block`, so they give the same bytes.
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.data.config import StreamConfig
from pipeline.data.formats.tar import DamagedShard
from pipeline.data.reading import blocks
from pipeline.data.reading.blocks import Block, BlockRequest, Reading
from pipeline.data.reading.request import Requests, shard_request
from pipeline.data.sets.manifest import HELD_OUT, TRAIN, Manifest

BLOCK_IMAGES = 4096  # the most images a block: a reader's latency, against what handing a block over costs
BLOCK_BYTES = 16 << 20
BLOCKS_AHEAD = 2  # at least: one consumed, one under way
STAND_IN_TRIES = 64


@dataclass(frozen=True)
class Batch:
    """One logical shard's part of one global batch: images (b, C, H, W) uint8, labels (b,) int64 or None where the
    set has no classes, ids (b,) int64, tags (b, K) uint8 of 0 and 1 or None, captions. Images are as they were decoded,
    channels_last in memory, raw ones contiguous.

    `stands_in` (b,) bool is None where every sample is the scheduled one; True marks one that stands in for a
    scheduled sample that is damaged or was taken down. `lost` are the ids of those.
    """

    step: int
    logical_shard: int
    images: Tensor
    labels: Tensor | None
    ids: Tensor
    tags: Tensor | None = None
    captions: tuple[str, ...] | None = None
    stands_in: Tensor | None = None
    lost: tuple[int, ...] = ()

    def first(self, n: int) -> "Batch":
        """Its first n samples; of damage it says nothing."""
        labels, tags = (None if told is None else told[:n] for told in (self.labels, self.tags))
        captions = None if self.captions is None else self.captions[:n]
        return Batch(self.step, self.logical_shard, self.images[:n], labels, self.ids[:n], tags, captions)


@dataclass(frozen=True)
class Images:
    """Images of a split in manifest order: (n, C, H, W) uint8, labels (n,) int64 or None, ids (n,) int64, tags (n, K)
    uint8 of 0 and 1 or None."""

    images: Tensor
    labels: Tensor | None
    ids: Tensor
    tags: Tensor | None = None


class Readers(Protocol):
    """Whoever turns requests into blocks."""

    def submit(self, request: BlockRequest) -> Any:
        """Starts one; returns a handle at once."""
        ...

    def result(self, handle: Any) -> Block:
        """Waits for a handle's block; raises what reading raised."""
        ...

    def close(self, handles: Sequence[Any]) -> None:
        """Cancels the handles that are under way and lets everything go."""
        ...


class ThreadReaders:
    """Readers in threads of this process (decoding and hashing release the interpreter's lock)."""

    def __init__(self, threads: int) -> None:
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="reader")

    def submit(self, request: BlockRequest) -> Future[Block]:
        return self.pool.submit(blocks.read_block, request)

    def result(self, handle: Future[Block]) -> Block:
        return handle.result()

    def close(self, handles: Sequence[Future[Block]]) -> None:
        for handle in handles:
            handle.cancel()
        self.pool.shutdown(wait=True, cancel_futures=True)


class Stream:
    """Batches of the given logical shards from `start_step` on, for ever: for each step, one `Batch` a logical shard,
    in the order given.

    Args:
        logical_shards: this worker's, e.g. rank, rank + W, ...
        readers: closed with the stream.
        every: only each every-th step from `start_step` on, one a block.

    Attributes:
        step: the next step of which no batch was handed out yet: with it as `start_step`, another stream goes on
            exactly here.
        damage: by (shard, offset), what was found wrong with shards that were read on quarantine.

    Raises:
        ValueError: logical shards that do not exist; read_ahead_bytes below what two blocks of one step need.
        DamagedShard, OSError: from `next`, what reading raised.
    """

    def __init__(
        self,
        config: StreamConfig,
        manifest: Manifest,
        logical_shards: Sequence[int],
        start_step: int,
        readers: Readers,
        every: int = 1,
    ) -> None:
        if (
            not logical_shards
            or len(set(logical_shards)) != len(logical_shards)
            or not set(logical_shards) <= set(range(config.logical_shards))
        ):
            raise ValueError(
                f"logical shards must be different ones of 0..{config.logical_shards - 1}; got {list(logical_shards)}"
            )
        if start_step < 0:
            raise ValueError(f"start_step must not be negative; got {start_step}")
        self.config, self.manifest, self.logical_shards, self.step = config, manifest, tuple(logical_shards), start_step
        self.requests = Requests(config, manifest)
        fitting = steps_a_block(config, manifest, len(logical_shards))
        self.every, self.steps_a_block = every, fitting if every == 1 else 1
        block_bytes = self.steps_a_block * config.shard_batch * manifest.image.bytes
        enough = BLOCKS_AHEAD * (len(logical_shards) + config.readers)  # every reader has one to do and one to do next
        self.most_blocks = max(BLOCKS_AHEAD * len(logical_shards), min(enough, config.read_ahead_bytes // block_bytes))
        self.readers = readers
        self.damage: dict[tuple[str, int], DamagedShard] = {}
        self.under_way: deque[Any] = deque()
        self._batches = self._generate(start_step)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what is under way and lets the readers go; nothing happens the second time."""
        self._batches.close()
        self.readers.close(list(self.under_way))
        self.under_way.clear()

    def _generate(self, start_step: int) -> Generator[Batch, None, None]:
        requests = self._requests(start_step)
        first = start_step
        while True:
            held: list[_Held] = []  # the blocks being consumed: they count as read ahead
            stop = (first // self.steps_a_block + 1) * self.steps_a_block
            for step in range(first, stop):
                for place, _ in enumerate(self.logical_shards):
                    while len(self.under_way) + len(held) < self.most_blocks:
                        self.under_way.append(self.readers.submit(next(requests)))
                    if step == first:
                        held.append(self._made_whole(self.readers.result(self.under_way[0])))
                        self.under_way.popleft()
                    self.step = step + self.every
                    yield self._batch(held[place], step)
            first = stop + self.every - 1

    def _requests(self, first: int) -> Iterator[BlockRequest]:
        """All requests from a step on, in the order in which they are consumed; blocks end at multiples of
        steps_a_block wherever the stream starts.
        """
        while True:
            stop = (first // self.steps_a_block + 1) * self.steps_a_block
            for logical_shard in self.logical_shards:
                yield self.requests.block(logical_shard, first, stop)
            first = stop + self.every - 1

    def _made_whole(self, block: Block) -> "_Held":
        """A block with others standing in for its lost samples.

        Raises:
            DamagedShard: no sample was found to stand in.
        """
        self._note(block)
        lost = np.flatnonzero(block.lost)
        if not len(lost):
            return _Held(block, None, block.ids)
        pixels, labels, ids = block.pixels.copy(), block.labels.copy(), block.ids.copy()
        whole = replace(block, pixels=pixels, labels=labels, ids=ids)
        tags = None if block.tags is None else block.tags.copy()
        captions = None if block.captions is None else list(block.captions)
        left = lost
        for attempt in range(STAND_IN_TRIES):
            positions = block.first_step * self.config.shard_batch + left
            other = self.readers.result(
                self.readers.submit(self.requests.stand_ins(block.logical_shard, positions, attempt))
            )
            self._note(other)
            good = ~other.lost
            rows = left[good]
            whole.images[rows], labels[rows], ids[rows] = other.images[good], other.labels[good], other.ids[good]
            if tags is not None and other.tags is not None:
                tags[rows] = other.tags[good]
            if captions is not None and other.captions is not None:
                for row, number in zip(rows.tolist(), np.flatnonzero(good).tolist(), strict=True):
                    captions[row] = other.captions[number]
            left = left[~good]
            if not len(left):
                texts = None if captions is None else tuple(captions)
                return _Held(replace(whole, tags=tags, captions=texts), block.lost, block.ids)
        raise next(iter(self.damage.values()), None) or ValueError(
            f"logical shard {block.logical_shard}: nothing is left to stand in for samples that were taken down"
        )

    def _note(self, block: Block) -> None:
        for found in block.damage:
            self.damage.setdefault((found.shard, found.offset), found)

    def _batch(self, held: "_Held", step: int) -> Batch:
        block, b = held.block, self.config.shard_batch
        rows = slice((step - block.first_step) * b, (step - block.first_step + 1) * b)
        # Ray's blocks are read-only and shared: a batch gets bytes of its own; those of a thread are its own already
        images, labels, ids = (
            torch.from_numpy(array[rows] if array.flags.writeable else array[rows].copy(order="K"))
            for array in (block.images, block.labels, block.ids)
        )
        replaced = held.stands_in is not None and bool(held.stands_in[rows].any())
        return Batch(
            step,
            block.logical_shard,
            images,
            labels if self.manifest.labelled else None,
            ids,
            None if block.tags is None else torch.from_numpy(block.tags[rows].copy()),
            None if block.captions is None else block.captions[rows],
            torch.from_numpy(held.stands_in[rows].copy()) if replaced and held.stands_in is not None else None,
            tuple(held.scheduled[rows][held.stands_in[rows]].tolist())
            if replaced and held.stands_in is not None
            else (),
        )


@dataclass(frozen=True)
class _Held:
    """A block without gaps, which of its samples stand in (None: none), and the ids that were scheduled."""

    block: Block
    stands_in: np.ndarray[Any, Any] | None
    scheduled: np.ndarray[Any, Any]


def thread_stream(
    config: StreamConfig, manifest: Manifest, logical_shards: Sequence[int], start_step: int = 0
) -> Stream:
    """The stream, read by threads of this process."""
    return Stream(config, manifest, logical_shards, start_step, ThreadReaders(config.readers))


def steps_a_block(config: StreamConfig, manifest: Manifest, logical_shards: int) -> int:
    """How many steps one block holds: a pure function of the configuration and a worker's number of logical shards;
    it does not change what is read.

    Raises:
        ValueError: two blocks of one step each do not fit in read_ahead_bytes.
    """
    step_bytes = config.shard_batch * manifest.image.bytes
    fit = config.read_ahead_bytes // (BLOCKS_AHEAD * logical_shards * step_bytes)
    if fit < 1:
        raise ValueError(
            f"read_ahead_bytes is {config.read_ahead_bytes}; {logical_shards} logical shards of {config.shard_batch} "
            f"images of {manifest.image.bytes} bytes need at least {BLOCKS_AHEAD * logical_shards * step_bytes}"
        )
    return max(1, min(fit, BLOCK_BYTES // step_bytes, BLOCK_IMAGES // config.shard_batch))


def held_out(manifest: Manifest, limit: int | None = None, max_bytes: int = 4 << 30) -> Images:
    """The held-out images in manifest order, the first `limit` of them or all.

    Raises:
        ValueError: there are none, or they decode to more than max_bytes.
    """
    return load_split(manifest, HELD_OUT, limit, max_bytes)


def train_images(manifest: Manifest, limit: int | None = None, max_bytes: int = 4 << 30) -> Images:
    """The training images in manifest order; see `held_out`."""
    return load_split(manifest, TRAIN, limit, max_bytes)


def load_split(manifest: Manifest, name: str, limit: int | None, max_bytes: int) -> Images:
    """A split's images, verified, shard by shard; of a mixture, set by set."""
    total = manifest.split(name).total
    count = total if limit is None else min(limit, total)
    if count < 1:
        raise ValueError(f"the set at {manifest.url} has no {name} images; shard it with another held_out fraction")
    if count * manifest.image.bytes > max_bytes:
        raise ValueError(
            f"{count} {name} images decode to {count * manifest.image.bytes} bytes, more than the {max_bytes} allowed; "
            "give a limit"
        )
    read: list[Block] = []
    reading = Reading(tag_names=manifest.names.tags)
    first_id, left = 0, count
    for place, (_, part) in enumerate(manifest.parts):
        split = part.split(name)
        for shard, kept in enumerate(split.kept.tolist()):
            size = min(kept, left)
            if not size:
                continue
            numbers = np.stack([np.full(size, shard, dtype=np.int64), np.arange(size, dtype=np.int64)], axis=1)
            request = shard_request(manifest, name, place, shard, split.places(numbers)[:, 1], reading)
            read.append(blocks.read_block(replace(request, ids=request.ids + first_id)))
            left -= size
        first_id += int(split.starts[-1])
    images, labels, ids = (
        torch.from_numpy(np.concatenate([getattr(block, field) for block in read]))
        for field in ("images", "labels", "ids")
    )
    told = [block.tags for block in read if block.tags is not None]
    tags = torch.from_numpy(np.concatenate(told)) if len(told) == len(read) else None
    return Images(images, labels if manifest.labelled else None, ids, tags)
