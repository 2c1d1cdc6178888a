"""From (manifest, configuration, seed, step) to what must be read: pure functions, no I/O but the removal list."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.config import StreamConfig
from pipeline.data.reading.blocks import BlockRequest, Reading, ShardRef
from pipeline.data.reading.order import (
    Int64s,
    Mixture,
    Order,
    epoch_of,
    first_position,
    key_of,
    keyed_hash,
    keyed_uniform,
)
from pipeline.data.reading.order import part_size as order_part_size
from pipeline.data.sets import removals
from pipeline.data.sets.manifest import TRAIN, Manifest, Split

NEAR_TRIES = 8  # at a sample to stand in for a lost one, in the window that is at hand; then anywhere in the epoch


@dataclass(frozen=True)
class _Part:
    """One of the sets that are read: its training split, its order, the id of its first sample."""

    split: Split
    order: Order
    first_id: int


class Requests:
    """What each logical shard needs at each step.

    Raises:
        ValueError: a set without training images, or a removal list that cannot be read.
    """

    def __init__(self, config: StreamConfig, manifest: Manifest) -> None:
        self.config, self.image = config, manifest.image
        self.sets = tuple(part.ref for _, part in manifest.parts)
        self.reading = Reading(
            config.on_damage, config.cache_bytes, config.disk_cache_bytes, tag_names=manifest.names.tags
        )
        self.parts: list[_Part] = []
        first_id = 0
        for _, part in manifest.parts:
            split = part.split(TRAIN)
            if not split.total:
                raise ValueError(f"the set at {part.url} has no training images")
            order = Order(split.kept, part.digest, config.seed, config.logical_shards, config.window)
            self.parts.append(_Part(split, order, first_id))
            first_id += int(split.starts[-1])
        self.mixture = Mixture([weight for weight, _ in manifest.parts], manifest.digest, config.seed)
        self.removed = removals.ids(manifest, TRAIN, config.removals) if config.removals else np.empty(0, np.int64)

    def block(self, logical_shard: int, first: int, stop: int) -> BlockRequest:
        """What logical shard l contributes to global batches first .. stop - 1."""
        b = self.config.shard_batch
        picks = self.mixture.picks(logical_shard, first * b, stop * b)
        flip = np.zeros(len(picks), dtype=np.bool_)
        if self.config.flip > 0.0:
            step, place = np.divmod(np.arange(first * b, stop * b, dtype=np.int64), b)
            number = step * self.config.batch_size + logical_shard * b + place
            flip = keyed_uniform(key_of("flip", self.config.seed), number) < self.config.flip
        return self._request(logical_shard, (first, stop - first), picks, flip)

    def stand_ins(self, logical_shard: int, positions: Int64s, attempt: int) -> BlockRequest:
        """Other samples for positions of stream l whose own are lost: of the same set and the same window at first,
        then of the same epoch; a pure function of its arguments and the seed.
        """
        picks = np.concatenate([self.mixture.picks(logical_shard, p, p + 1) for p in positions.tolist()])
        key = key_of("stand-in", self.config.seed, logical_shard, attempt)
        draws = keyed_hash(key, positions)
        for row, draw in zip(picks, draws.tolist(), strict=True):
            order = self.parts[int(row[0])].order
            if attempt < NEAR_TRIES:
                low, high = order.window_of(logical_shard, int(row[1]))
            else:
                epoch = epoch_of(order.size, order.logical_shards, logical_shard, int(row[1]))
                low = first_position(order.size, order.logical_shards, logical_shard, epoch)
                high = low + order_part_size(order.size, order.logical_shards, logical_shard, epoch)
            row[1] = low + draw % (high - low)
        return self._request(logical_shard, (0, 0), picks, np.zeros(len(picks), dtype=np.bool_))

    def _request(
        self, logical_shard: int, steps: tuple[int, int], picks: Int64s, flip: NDArray[np.bool_]
    ) -> BlockRequest:
        """picks (n, 2): which set, which position of its stream l."""
        refs: list[ShardRef] = []
        shard, index, ids = (np.empty(len(picks), dtype=np.int64) for _ in range(3))
        for place, part in enumerate(self.parts):
            here = np.flatnonzero(picks[:, 0] == place)
            if not len(here):
                continue
            listed = part.split.places(_listed(part.order, logical_shard, picks[here, 1]))
            used, inverse = np.unique(listed[:, 0], return_inverse=True)
            shard[here], index[here] = len(refs) + inverse, listed[:, 1]
            ids[here] = part.first_id + part.split.starts[listed[:, 0]] + listed[:, 1]
            refs += shard_refs(place, part.split, used)
        skip = np.isin(ids, self.removed)
        return BlockRequest(
            self.sets, self.image, logical_shard, *steps, tuple(refs), shard, index, ids, flip, skip, self.reading
        )


def _listed(order: Order, logical_shard: int, positions: Int64s) -> Int64s:
    """The samples at positions, which mostly follow each other."""
    if not (np.diff(positions) == 1).all():
        return np.concatenate([order.samples(logical_shard, p, p + 1) for p in positions.tolist()])
    return order.samples(logical_shard, int(positions[0]), int(positions[-1]) + 1)


def shard_refs(place: int, split: Split, used: Int64s) -> list[ShardRef]:
    """What a reader needs to know of some of a split's shards."""
    return [
        ShardRef(place, split.urls[i].as_py(), int(split.sizes[i]), split.sha256[i].as_py(), int(split.samples[i]))
        for i in used.tolist()
    ]


def shard_request(
    manifest: Manifest, name: str, place: int, shard: int, index: Int64s, reading: Reading
) -> BlockRequest:
    """Some samples of one shard of one of the manifest's sets; their ids are of that set's split."""
    part = manifest.parts[place][1]
    split = part.split(name)
    nothing = np.zeros(len(index), dtype=np.bool_)
    return BlockRequest(
        (part.ref,),
        part.image,
        0,
        0,
        1,
        tuple(shard_refs(0, split, np.array([shard]))),
        np.zeros_like(index),
        index,
        split.starts[shard] + index,
        nothing,
        nothing,
        reading,
    )
