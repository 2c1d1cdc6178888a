"""The exact stream as a WebDataset pipeline: the same order, resumed, by ranks, by loader processes."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import pipeline.data
from pipeline.data.reading.stream import StreamConfig
from pipeline.data.sets.manifest import Manifest
from tests.data.folders import epoch_of


def own(done: Manifest, batch: int, seed: int = 3, **values: Any) -> list[dict[str, Any]]:
    """An epoch of the stream itself, by step: ids, pixels and labels of the global batch."""
    made = epoch_of(StreamConfig(done.url, batch_size=batch, seed=seed, **values), done)
    steps: dict[int, list[Any]] = {}
    for part in made:
        steps.setdefault(part.step, []).append(part)
    return [
        {name: torch.cat([getattr(part, name) for part in steps[k]]) for name in ("ids", "images", "labels")}
        for k in sorted(steps)
    ]


def same(got: list[dict[str, Any]], want: list[dict[str, Any]]) -> bool:
    return len(got) == len(want) and all(
        torch.equal(a[name], b[name]) for a, b in zip(got, want, strict=True) for name in ("ids", "images", "labels")
    )


def test_the_order_is_the_streams_own(made: Callable[..., Manifest]) -> None:
    done = made(96, 8, 3, held_out=0.0)
    want = own(done, 8, window=2, flip=0.5)
    stream = pipeline.data.webdataset(done.url, seed=3, batch=8, window=2, flip=0.5)
    assert same(list(islice(stream, 12)), want)
    assert same(list(islice(stream, 5)), want[:5]), "each pass begins at the state"
    for start in (1, 5, 11):
        resumed = pipeline.data.webdataset(done.url, seed=3, batch=8, start=start, window=2, flip=0.5)
        assert same(list(islice(resumed, 12 - start)), want[start:])
    assert not same(list(islice(pipeline.data.webdataset(done.url, seed=4, batch=8, window=2, flip=0.5), 12)), want)


def test_stages_compose(made: Callable[..., Manifest]) -> None:
    done = made(48, 8, 1, held_out=0.0)
    want = own(done, 6)
    stages = (
        pipeline.data.webdataset(done.url, seed=3, batch=6)
        .map(lambda sample: sample | {"x": sample["images"].float() / 255})
        .to_tuple("x", "labels")
        .slice(8)
    )
    got = list(stages)
    assert len(got) == 8
    for (x, labels), batch in zip(got, want, strict=True):
        assert torch.equal(x, batch["images"].float() / 255)
        assert torch.equal(labels, batch["labels"])


def test_two_ranks_share_the_global_batch(made: Callable[..., Manifest]) -> None:
    done = made(96, 8, 1, held_out=0.0)
    for shards in (2, 4):
        want = own(done, 8, logical_shards=shards)
        ranks = [
            list(
                islice(pipeline.data.webdataset(done.url, seed=3, rank=r, world=2, batch=8, logical_shards=shards), 12)
            )
            for r in range(2)
        ]
        for step, batch in enumerate(want):
            parts = [batch["ids"].reshape(shards, -1)[r::2].flatten() for r in range(2)]
            assert [rank[step]["ids"].tolist() for rank in ranks] == [part.tolist() for part in parts]


@pytest.mark.parametrize("start", [0, 5])
def test_loader_processes_hand_the_batches_out_in_order(made: Callable[..., Manifest], start: int) -> None:
    done = made(96, 8, 1, held_out=0.0)
    want = own(done, 8)[start:]
    stream = pipeline.data.webdataset(done.url, seed=3, batch=8, start=start)
    loader: Any = DataLoader(stream, batch_size=None, num_workers=2)
    got: list[Any] = []
    for sample in loader:
        got.append({name: value.clone() if torch.is_tensor(value) else value for name, value in sample.items()})
        if len(got) == len(want):
            break
    assert same(got, want)
    assert [sample["step"] for sample in got] == list(range(start, 12))


def test_settings_out_of_range_are_refused_by_name(made: Callable[..., Manifest]) -> None:
    done = made(24, 8, 1, held_out=0.0)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"rank": 2, "world": 2}, "rank"),
        ({"rank": -1}, "rank"),
        ({"start": -1}, "start"),
        ({"batch": 9}, "batch_size must be a multiple of logical_shards"),
        ({"world": 3, "logical_shards": 4, "batch": 12}, "world must divide logical_shards"),
        ({"windows": 3}, "did you mean 'window'"),
        ({"url": "nowhere"}, "nowhere"),
    ]
    for values, reason in wrong:
        with pytest.raises((ValueError, OSError), match=reason):
            pipeline.data.webdataset(values.pop("url", done.url), **values)
