"""Theorems of the order: permutation, balance, closed forms, independence of how it is asked."""

import time
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.reading import order
from pipeline.data.reading.order import Order

layouts = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)


@given(n=st.integers(1, 10**12), shards=st.integers(1, 64), epoch=st.integers(0, 10**6))
def test_parts_sum_to_the_epoch_and_stay_balanced_for_ever(n: int, shards: int, epoch: int) -> None:
    sizes = [order.part_size(n, shards, part, epoch) for part in range(shards)]
    assert sum(sizes) == n
    counts = [order.first_position(n, shards, part, epoch + 1) for part in range(shards)]
    assert max(counts) - min(counts) <= 1
    starts = [order.part_start(n, shards, part, epoch) for part in range(shards)]
    assert starts == [sum(sizes[:part]) for part in range(shards)]


@given(n=st.integers(1, 10**9), shards=st.integers(1, 64), position=st.integers(0, 10**12), data=st.data())
def test_epoch_of_inverts_first_position(n: int, shards: int, position: int, data: st.DataObject) -> None:
    part = data.draw(st.integers(0, shards - 1))
    epoch = order.epoch_of(n, shards, part, position)
    assert order.first_position(n, shards, part, epoch) <= position < order.first_position(n, shards, part, epoch + 1)


@settings(max_examples=200, deadline=None)
@given(
    sizes=layouts,
    shards=st.integers(1, 9),
    window=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 3),
)
def test_every_sample_exactly_once_an_epoch(sizes: list[int], shards: int, window: int, seed: int, epoch: int) -> None:
    made = Order(np.array(sizes), "digest", seed, shards, window)
    n = sum(sizes)
    seen = [
        tuple(row)
        for part in range(shards)
        for row in made.samples(
            part, order.first_position(n, shards, part, epoch), order.first_position(n, shards, part, epoch + 1)
        ).tolist()
    ]
    assert sorted(seen) == [(shard, index) for shard, size in enumerate(sizes) for index in range(size)]


@settings(max_examples=100, deadline=None)
@given(sizes=layouts, shards=st.integers(1, 5), window=st.integers(1, 4), cuts=st.lists(st.integers(0, 60), max_size=6))
def test_a_look_up_does_not_depend_on_what_was_asked_before(
    sizes: list[int], shards: int, window: int, cuts: list[int]
) -> None:
    whole = Order(np.array(sizes), "digest", 1, shards, window)
    pieces = Order(np.array(sizes), "digest", 1, shards, window)
    edges = [0, *sorted(cuts), 61]
    for part in range(shards):
        expected = whole.samples(part, 0, 61).tolist()
        got = [row for start, stop in pairwise(edges) for row in pieces.samples(part, start, stop).tolist()]
        assert got == expected
        backwards = [
            Order(np.array(sizes), "digest", 1, shards, window).samples(part, p, p + 1)[0].tolist() for p in (60, 7, 0)
        ]
        assert backwards == [expected[60], expected[7], expected[0]]


def test_seed_digest_and_epoch_each_change_the_order() -> None:
    sizes = np.full(20, 10)
    first = Order(sizes, "a", 0, 2, 4).samples(0, 0, 300).tolist()
    assert first[:100] != first[100:200]
    assert Order(sizes, "a", 1, 2, 4).samples(0, 0, 100).tolist() != first[:100]
    assert Order(sizes, "b", 0, 2, 4).samples(0, 0, 100).tolist() != first[:100]
    assert Order(sizes, "a", 0, 2, 4).samples(0, 0, 300).tolist() == first


def test_a_tar_shard_is_read_by_one_part_and_near_sequentially() -> None:
    sizes, window, shards = np.full(40, 25), 5, 4
    made = Order(sizes, "d", 3, shards, window)
    owners: dict[int, set[int]] = {}
    for part in range(shards):
        rows = made.samples(part, 0, 250)
        for shard in rows[:, 0].tolist():
            owners.setdefault(shard, set()).add(part)
        for at in range(0, 250, 125):  # each window of 5 x 25 samples is read before the next begins
            assert len(set(rows[at : at + 125, 0].tolist())) == window
        assert len(set(rows[:20, 0].tolist())) >= 3  # and mixes its shards
    assert sum(len(parts) > 1 for parts in owners.values()) <= shards - 1


def test_positions_are_uniform_over_the_window() -> None:
    """Chi-square of where sample 0 of a one-window set lands, 4,000 seeds: 19 degrees of freedom, p > 1e-4."""
    places = np.zeros(20)
    for seed in range(4000):
        rows = Order(np.array([20]), "d", seed, 1, 1).samples(0, 0, 20)
        places[int(np.flatnonzero(rows[:, 1] == 0)[0])] += 1
    assert ((places - 200) ** 2 / 200).sum() < 51.6


def test_keyed_uniform_is_uniform_and_keyed() -> None:
    index = np.arange(100_000)
    values = order.keyed_uniform(order.key_of("flip", 0), index)
    assert values.min() >= 0.0
    assert values.max() < 1.0
    assert abs(values.mean() - 0.5) < 4 * 12**-0.5 / 100_000**0.5
    other = order.keyed_uniform(order.key_of("flip", 1), index)
    assert abs(np.corrcoef(values, other)[0, 1]) < 4 / 100_000**0.5


def test_golden_order() -> None:
    """The order is data that runs depend on: a change of these numbers breaks every resume."""
    rows = Order(np.array([3, 0, 4, 2]), "golden", 7, 2, 2).samples(1, 0, 9)
    assert rows.tolist() == GOLDEN


@pytest.mark.parametrize(
    ("sizes", "shards", "window"),
    [([0, 0], 1, 1), ([], 1, 1), ([3], 0, 1), ([3], 1, 0), ([-1, 4], 1, 1)],
)
def test_refusals(sizes: list[int], shards: int, window: int) -> None:
    with pytest.raises(ValueError):
        Order(np.array(sizes, dtype=np.int64), "d", 0, shards, window)


def test_refused_look_ups() -> None:
    made = Order(np.array([5]), "d", 0, 2, 1)
    for part, start, stop in ((2, 0, 1), (-1, 0, 1), (0, -1, 1), (0, 3, 2)):
        with pytest.raises(ValueError):
            made.samples(part, start, stop)


def test_a_million_shards_of_ten_billion_samples() -> None:
    tracemalloc.start()
    began = time.perf_counter()
    made = Order(np.full(1_000_000, 10_000), "d", 0, 1000, 8)
    rows = made.samples(999, 5_000_000, 5_001_000)
    planned = time.perf_counter() - began
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    began = time.perf_counter()
    for part in range(50):
        made.samples(part, 9_000_000 + part * 7, 9_000_001 + part * 7)
    look_up = (time.perf_counter() - began) / 50
    assert len(rows) == 1000
    assert len(np.unique(rows, axis=0)) == 1000
    print(f"plan {planned:.2f} s, peak {peak / 2**20:.0f} MiB, look-up in a new window {look_up * 1e3:.2f} ms")
    assert planned < 10
    assert peak < 2 << 30


GOLDEN = [[2, 3], [3, 1], [2, 1], [2, 2], [2, 0], [2, 2], [2, 1], [2, 3], [2, 0]]
