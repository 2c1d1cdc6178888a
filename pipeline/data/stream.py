"""The stream of batches: an endless sequence that depends on nothing but (manifest digest, seed, configuration); its
state is one integer, the next step.

`Stream` cuts the coming steps into blocks, keeps as many requests under way as the stated bytes allow, and hands out
batches in order. Who reads is a detail: `ThreadReaders` here, Ray tasks in `cluster/feed.py`; both run
`blocks.read_block`, so they give the same bytes.
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.data import blocks
from pipeline.data.blocks import Block, BlockRequest, ShardRef
from pipeline.data.manifest import HELD_OUT, TRAIN, Manifest, Split
from pipeline.data.order import Order, key_of, keyed_uniform

BLOCK_IMAGES = 2048  # the most images a block: a reader's latency
BLOCK_BYTES = 16 << 20
BLOCKS_AHEAD = 2  # at least: one consumed, one under way


@dataclass(frozen=True)
class StreamConfig:
    """What the training stream reads and how far ahead."""

    url: Annotated[str, "the shard set, a folder or s3:// prefix"]
    batch_size: Annotated[int, "images of the global batch, over all workers"] = 128
    logical_shards: Annotated[int, "parts of the global batch, fixed for a run whatever the number of workers"] = 2
    window: Annotated[int, "tar shards shuffled together"] = 8
    seed: Annotated[int, "of order and augmentation"] = 0
    flip: Annotated[float, "probability of mirroring an image left to right"] = 0.0
    readers: Annotated[int, "threads, or Ray tasks at a time, a worker"] = 2
    reader_cpus: Annotated[float, "CPUs a Ray reader task asks for"] = 0.25
    read_ahead_bytes: Annotated[int, "decoded bytes read ahead, a worker"] = 256 << 20
    cache_bytes: Annotated[
        int, "verified shard bytes a reading process keeps; at best window x shard size x logical shards of a worker"
    ] = 512 << 20

    def __post_init__(self) -> None:
        for name in ("batch_size", "logical_shards", "window", "readers", "read_ahead_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.batch_size % self.logical_shards:
            raise ValueError(
                f"batch_size must be a multiple of logical_shards; got {self.batch_size} and {self.logical_shards}"
            )
        if not 0.0 <= self.flip <= 1.0:
            raise ValueError(f"flip must be a probability; got {self.flip}")
        if self.cache_bytes < 0 or self.reader_cpus < 0:
            raise ValueError(
                f"cache_bytes and reader_cpus must not be negative; got {self.cache_bytes} and {self.reader_cpus}"
            )

    @property
    def shard_batch(self) -> int:
        """Samples of one logical shard a step, b = B / L."""
        return self.batch_size // self.logical_shards


@dataclass(frozen=True)
class Batch:
    """One logical shard's part of one global batch: images (b, C, H, W) uint8, labels (b,) int64 or None where the
    set has no classes, ids (b,) int64.
    """

    step: int
    logical_shard: int
    images: Tensor
    labels: Tensor | None
    ids: Tensor


@dataclass(frozen=True)
class Images:
    """Images of a split in manifest order: (n, C, H, W) uint8, labels (n,) int64 or None, ids (n,) int64."""

    images: Tensor
    labels: Tensor | None
    ids: Tensor


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

    Attributes:
        step: the next step of which no batch was handed out yet: with it as `start_step`, another stream goes on
            exactly here.

    Raises:
        ValueError: logical shards that do not exist; read_ahead_bytes below what two blocks of one step need.
        DamagedShard, OSError: from `next`, what reading raised.
    """

    def __init__(
        self, config: StreamConfig, manifest: Manifest, logical_shards: Sequence[int], start_step: int, readers: Readers
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
        self.split = manifest.split(TRAIN)
        self.order = order_of(config, manifest)
        self.steps_a_block = steps_a_block(config, manifest, len(logical_shards))
        block_bytes = self.steps_a_block * config.shard_batch * manifest.image.bytes
        enough = BLOCKS_AHEAD * (len(logical_shards) + config.readers)  # every reader has one to do and one to do next
        self.most_blocks = max(BLOCKS_AHEAD * len(logical_shards), min(enough, config.read_ahead_bytes // block_bytes))
        self.readers = readers
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
            held: list[Block] = []  # the blocks being consumed: they count as read ahead
            stop = (first // self.steps_a_block + 1) * self.steps_a_block
            for step in range(first, stop):
                for place, _ in enumerate(self.logical_shards):
                    while len(self.under_way) + len(held) < self.most_blocks:
                        self.under_way.append(self.readers.submit(next(requests)))
                    if step == first:
                        held.append(self.readers.result(self.under_way[0]))
                        self.under_way.popleft()
                    self.step = step + 1
                    yield self._batch(held[place], step)
            first = stop

    def _requests(self, first: int) -> Iterator[BlockRequest]:
        """All requests from a step on, in the order in which they are consumed; blocks end at multiples of
        steps_a_block wherever the stream starts.
        """
        while True:
            stop = (first // self.steps_a_block + 1) * self.steps_a_block
            for logical_shard in self.logical_shards:
                yield block_request(self.config, self.manifest, self.split, self.order, logical_shard, first, stop)
            first = stop

    def _batch(self, block: Block, step: int) -> Batch:
        b = self.config.shard_batch
        rows = slice((step - block.first_step) * b, (step - block.first_step + 1) * b)
        images, labels, ids = (
            torch.from_numpy(array[rows].copy()) for array in (block.images, block.labels, block.ids)
        )
        return Batch(step, block.logical_shard, images, labels if self.manifest.labelled else None, ids)


def thread_stream(
    config: StreamConfig, manifest: Manifest, logical_shards: Sequence[int], start_step: int = 0
) -> Stream:
    """The stream, read by threads of this process."""
    return Stream(config, manifest, logical_shards, start_step, ThreadReaders(config.readers))


def order_of(config: StreamConfig, manifest: Manifest) -> Order:
    """The order of the training split."""
    return Order(manifest.split(TRAIN).samples, manifest.digest, config.seed, config.logical_shards, config.window)


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


def block_request(
    config: StreamConfig, manifest: Manifest, split: Split, order: Order, logical_shard: int, first: int, stop: int
) -> BlockRequest:
    """What logical shard l contributes to global batches first .. stop - 1."""
    b = config.shard_batch
    positions = np.arange(first * b, stop * b, dtype=np.int64)
    listed = order.samples(logical_shard, first * b, stop * b)
    step, place = np.divmod(positions, b)
    flip = np.zeros(len(positions), dtype=np.bool_)
    if config.flip > 0.0:
        flip = (
            keyed_uniform(key_of("flip", config.seed), step * config.batch_size + logical_shard * b + place)
            < config.flip
        )
    return _request(manifest, split, listed, logical_shard, (first, stop - first), flip, config.cache_bytes)


def _request(
    manifest: Manifest,
    split: Split,
    listed: np.ndarray[Any, Any],
    logical_shard: int,
    steps: tuple[int, int],
    flip: np.ndarray[Any, Any],
    cache_bytes: int,
) -> BlockRequest:
    used, inverse = np.unique(listed[:, 0], return_inverse=True)
    refs = tuple(
        ShardRef(split.urls[i].as_py(), int(split.sizes[i]), split.sha256[i].as_py(), int(split.samples[i]))
        for i in used.tolist()
    )
    ids = split.starts[listed[:, 0]] + listed[:, 1]
    return BlockRequest(
        manifest.url,
        manifest.image,
        manifest.labelled,
        logical_shard,
        *steps,
        refs,
        inverse.astype(np.int64),
        listed[:, 1],
        ids,
        flip,
        cache_bytes,
    )


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
    """A split's images, verified, shard by shard."""
    split = manifest.split(name)
    count = split.total if limit is None else min(limit, split.total)
    if count < 1:
        raise ValueError(f"the set at {manifest.url} has no {name} images; shard it with another held_out fraction")
    if count * manifest.image.bytes > max_bytes:
        raise ValueError(
            f"{count} {name} images decode to {count * manifest.image.bytes} bytes, more than the {max_bytes} allowed; "
            "give a limit"
        )
    parts: list[Block] = []
    for shard in range(int(np.searchsorted(split.starts, count, side="left"))):
        size = min(int(split.samples[shard]), count - int(split.starts[shard]))
        listed = np.stack([np.full(size, shard, dtype=np.int64), np.arange(size, dtype=np.int64)], axis=1)
        parts.append(blocks.read_block(_request(manifest, split, listed, 0, (0, 1), np.zeros(size, dtype=np.bool_), 0)))
    images, labels, ids = (
        torch.from_numpy(np.concatenate([getattr(part, field) for part in parts]))
        for field in ("images", "labels", "ids")
    )
    return Images(images, labels if manifest.labelled else None, ids)
