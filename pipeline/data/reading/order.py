"""Which sample stands where in the endless stream: pure functions of integers, no I/O.

A set of N samples lies in S tar shards. The global batch is cut into L logical shards, and each logical shard l has
its own endless stream; global batch k of B samples is the concatenation over l of samples k B/L ... (k+1) B/L - 1 of
stream l. Nothing here knows how many workers read.

Epoch e permutes the tar shards as wholes, lays them end to end and cuts the list of N samples into L contiguous
parts; logical shard l owns part l. Inside its part, samples are shuffled within windows of several tar shards, so a
tar shard is read by one logical shard (two at a part's edge), and nearly sequentially.

Part sizes are size(l, e) = floor(((e+1) N + l) / L) - floor((e N + l) / L). By Hermite's identity sum_{l<L} floor((x
+ l) / L) = x for an integer x, so they sum to N in every epoch; and the first e epochs hold floor((e N + l) / L)
samples of l, so the counts of two logical shards differ by at most 1 for ever. No epoch edge drops or repeats a
sample, and both directions (position -> epoch, epoch -> position) have a closed form.

Permutations: the indices 0..n-1 sorted by a keyed 64-bit hash. The hash (two rounds of the splitmix64 finaliser,
Steele et al., OOPSLA 2014, with 128 bits of key) is a bijection, so there are no ties and the result depends on no
library's generator. A Feistel network would need no memory, but sorting is vectorised and the lists are short: one
epoch's shards (8 MB a million), one window's samples.
"""

import hashlib
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]
UInt64s = NDArray[np.uint64]
Key = tuple[int, int]


def key_of(*parts: object) -> Key:
    """128 bits of key from any printable parts, as two integers below 2^64."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def _mix(x: UInt64s) -> UInt64s:
    """The splitmix64 finaliser, a bijection of 64-bit words; works in place on `x`."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def keyed_hash(key: Key, index: Int64s) -> UInt64s:
    """Independent-looking 64-bit words, one an index; a bijection for a given key."""
    x = index.astype(np.uint64)
    x ^= np.uint64(key[0])
    x = _mix(x)
    x ^= np.uint64(key[1])
    return _mix(x)


def keyed_uniform(key: Key, index: Int64s) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), one an index."""
    return (keyed_hash(key, index) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(n: int, key: Key) -> Int64s:
    """A keyed permutation of 0..n-1, O(n log n)."""
    return np.argsort(keyed_hash(key, np.arange(n, dtype=np.int64))).astype(np.int64, copy=False)


def part_start(samples: int, logical_shards: int, logical_shard: int, epoch: int) -> int:
    """Where the part of logical shard l begins in the list of epoch e: sum over l' < l of size(l', e), in closed
    form.

    With M = q L + r, sum_{l'<l} floor((M + l') / L) = q l + max(0, l - (L - r)).
    """

    def below(total: int) -> int:
        q, r = divmod(total, logical_shards)
        return q * logical_shard + max(0, logical_shard - (logical_shards - r))

    return below((epoch + 1) * samples) - below(epoch * samples)


def part_size(samples: int, logical_shards: int, logical_shard: int, epoch: int) -> int:
    """Samples of logical shard l in epoch e."""
    return first_position(samples, logical_shards, logical_shard, epoch + 1) - first_position(
        samples, logical_shards, logical_shard, epoch
    )


def first_position(samples: int, logical_shards: int, logical_shard: int, epoch: int) -> int:
    """The position in stream l of its first sample of epoch e: floor((e N + l) / L)."""
    return (epoch * samples + logical_shard) // logical_shards


def epoch_of(samples: int, logical_shards: int, logical_shard: int, position: int) -> int:
    """The epoch that holds position p of stream l: the last e with floor((e N + l) / L) <= p."""
    return ((position + 1) * logical_shards - logical_shard - 1) // samples


class Order:
    """The order of a whole stream over one set of shards.

    Args:
        shard_sizes: samples in each tar shard, (S,), in manifest order; empty shards are allowed.
        digest: the manifest's digest, so that another set has another order.
        seed: the run's seed.
        logical_shards: L, fixed for the whole run.
        window: tar shards shuffled together, at least 1.

    Cost: an epoch's plan is two int64 arrays of S entries (the last two epochs are kept); a look-up is O(log S) plus
        one window's permutation, which is kept for the next look-up.

    Raises:
        ValueError: no samples, or a count out of range.
    """

    def __init__(self, shard_sizes: Int64s, digest: str, seed: int, logical_shards: int, window: int) -> None:
        self.shard_sizes = np.ascontiguousarray(shard_sizes, dtype=np.int64)
        if self.shard_sizes.ndim != 1 or (self.shard_sizes < 0).any():
            raise ValueError("shard_sizes must be one count of samples a shard, none negative")
        if logical_shards < 1 or window < 1:
            raise ValueError(f"logical_shards and window must be at least 1; got {logical_shards} and {window}")
        self.digest, self.seed, self.logical_shards, self.window = digest, seed, logical_shards, window
        self.size = int(self.shard_sizes.sum())
        if self.size == 0:
            raise ValueError(
                f"the set {digest[:12]} has no samples to order: {len(self.shard_sizes)} shards, all empty"
            )
        self._epochs: OrderedDict[int, tuple[Int64s, Int64s]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int, int], Int64s] = OrderedDict()

    def epoch(self, epoch: int) -> tuple[Int64s, Int64s]:
        """Epoch e's list of tar shards: (their permutation (S,), the list position where each begins (S + 1,))."""
        plan = self._epochs.get(epoch)
        if plan is None:
            shards = permutation(len(self.shard_sizes), key_of("shards", self.digest, self.seed, epoch))
            starts = np.zeros(len(shards) + 1, dtype=np.int64)
            np.cumsum(self.shard_sizes[shards], out=starts[1:])
            plan = self._epochs[epoch] = (shards, starts)
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return plan

    def samples(self, logical_shard: int, start: int, stop: int) -> Int64s:
        """Positions start..stop-1 of stream l as (n, 2) int64: tar shard (manifest order), sample within it.

        Raises:
            ValueError: no such logical shard, or start > stop or negative.
        """
        if not 0 <= logical_shard < self.logical_shards:
            raise ValueError(f"logical_shard must be in 0..{self.logical_shards - 1}; got {logical_shard}")
        if not 0 <= start <= stop:
            raise ValueError(f"positions must be 0 <= start <= stop; got {start}, {stop}")
        pieces: list[Int64s] = []
        position = start
        while position < stop:
            epoch = epoch_of(self.size, self.logical_shards, logical_shard, position)
            offset = position - first_position(self.size, self.logical_shards, logical_shard, epoch)
            size = part_size(self.size, self.logical_shards, logical_shard, epoch)
            take = min(stop - position, size - offset)
            pieces.append(self._listed(logical_shard, epoch, offset, offset + take))
            position += take
        return np.concatenate(pieces) if pieces else np.empty((0, 2), dtype=np.int64)

    def window_of(self, logical_shard: int, position: int) -> tuple[int, int]:
        """The positions first .. end - 1 of stream l that are shuffled together with a position."""
        epoch = epoch_of(self.size, self.logical_shards, logical_shard, position)
        begins = first_position(self.size, self.logical_shards, logical_shard, epoch)
        low = part_start(self.size, self.logical_shards, logical_shard, epoch)
        _, left, right = self._window(logical_shard, epoch, low + position - begins)
        return begins + left - low, begins + right - low

    def _window(self, logical_shard: int, epoch: int, place: int) -> tuple[int, int, int]:
        """Which window of part l holds a place of epoch e's list, and the places where that begins and ends."""
        shards, starts = self.epoch(epoch)
        low = part_start(self.size, self.logical_shards, logical_shard, epoch)
        high = low + part_size(self.size, self.logical_shards, logical_shard, epoch)
        first = int(np.searchsorted(starts, low, side="right")) - 1  # the tar shard that holds the part's first sample
        group = (int(np.searchsorted(starts, place, side="right")) - 1 - first) // self.window
        left = max(low, int(starts[min(first + group * self.window, len(shards))]))
        right = min(high, int(starts[min(first + (group + 1) * self.window, len(shards))]))
        return group, left, right

    def _listed(self, logical_shard: int, epoch: int, start: int, stop: int) -> Int64s:
        """Offsets start..stop-1 of part l of epoch e, as (n, 2)."""
        shards, starts = self.epoch(epoch)
        low = part_start(self.size, self.logical_shards, logical_shard, epoch)
        places: list[Int64s] = []
        at = low + start
        while at < low + stop:
            group, left, right = self._window(logical_shard, epoch, at)
            shuffled = self._shuffled(logical_shard, epoch, group, right - left)
            end = min(right, low + stop)
            places.append(left + shuffled[at - left : end - left])
            at = end
        place = np.concatenate(places)
        listed = np.searchsorted(starts, place, side="right") - 1
        return np.stack([shards[listed], place - starts[listed]], axis=1)

    def _shuffled(self, logical_shard: int, epoch: int, group: int, size: int) -> Int64s:
        """The permutation inside one window; the last one of each logical shard is kept, because the next look-up
        wants it.
        """
        name = (logical_shard, epoch, group)
        shuffled = self._windows.get(name)
        if shuffled is None:
            shuffled = permutation(size, key_of("window", self.digest, self.seed, *name))
            self._windows[name] = shuffled
            while len(self._windows) > self.logical_shards:
                self._windows.popitem(last=False)
        else:
            self._windows.move_to_end(name)
        return shuffled


class Mixture:
    """Which of several sets each position of a logical shard's stream is taken from, and the how-manieth of that set's
    own stream it is.

    Weights are rounded to shares of SLOTS (each set has at least one), and every run of SLOTS positions holds each set
    exactly as often as its share says, in a keyed order. So a look-up at any position is O(SLOTS), and each set is
    read through in its own order, every sample once in each of its own epochs.

    Raises:
        ValueError: more sets than SLOTS.
    """

    SLOTS = 1000

    def __init__(self, weights: list[float], digest: str, seed: int) -> None:
        if not 1 <= len(weights) <= self.SLOTS:
            raise ValueError(f"a mixture has 1 to {self.SLOTS} sets; got {len(weights)}")
        self.digest, self.seed = digest, seed
        spare = self.SLOTS - len(weights)  # one slot each, the rest by largest remainder
        exact = np.array(weights) / sum(weights) * self.SLOTS - 1
        exact = np.maximum(exact, 0.0) * (spare / max(np.maximum(exact, 0.0).sum(), 1e-300))
        self.shares = 1 + np.floor(exact).astype(np.int64)
        left = np.argsort(-(exact - np.floor(exact)), kind="stable")[: self.SLOTS - int(self.shares.sum())]
        self.shares[left] += 1
        self.slots = np.repeat(np.arange(len(weights)), self.shares)

    def picks(self, logical_shard: int, start: int, stop: int) -> Int64s:
        """Positions start .. stop - 1 of stream l as (n, 2): which set, which position of that set's stream l."""
        if len(self.shares) == 1:
            own = np.arange(start, stop, dtype=np.int64)
            return np.stack([np.zeros_like(own), own], axis=1)
        first, last = start // self.SLOTS, (stop - 1) // self.SLOTS
        made: list[Int64s] = []
        for run in range(first, last + 1):
            order = permutation(self.SLOTS, key_of("mixture", self.digest, self.seed, logical_shard, run))
            which = self.slots[order]
            own = np.empty(self.SLOTS, dtype=np.int64)
            for part, share in enumerate(self.shares.tolist()):
                own[which == part] = run * share + np.arange(share)
            made.append(np.stack([which, own], axis=1))
        return np.concatenate(made)[start - first * self.SLOTS : stop - first * self.SLOTS]
