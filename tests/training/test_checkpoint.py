"""Checkpoints: what was committed is what is read, damage is found, and the newest good one is never lost."""

import json
import os
import shutil
import time
from pathlib import Path
from statistics import median

import pytest
import torch

from pipeline.training import checkpoint
from pipeline.training.checkpoint import Damaged, State
from pipeline.training.progress import Progress
from pipeline.training.restore import restore
from pipeline.training.retention import Keep, prune
from pipeline.training.saver import Saver
from pipeline.training.step import Place


def state(step: int) -> State:
    torch.manual_seed(step)
    tensors = {
        "model": {"w": torch.randn(3, 4), "b": torch.randn(4), "count": torch.tensor(7)},
        "ema": {"w": torch.randn(3, 4)},
        "optimizer": {"step": torch.tensor(float(step)), "mean.w": torch.randn(3, 4)},
    }
    return State(step, tensors, {"identity": {"a": 1}, "skipped": 2})


def same(a: State, b: State) -> bool:
    return (
        a.step == b.step
        and a.facts == b.facts
        and a.tensors.keys() == b.tensors.keys()
        and all(torch.equal(t, b.tensors[stem][name]) for stem, group in a.tensors.items() for name, t in group.items())
    )


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    store = str(tmp_path)
    url = checkpoint.write(store, state(5))
    assert url == checkpoint.folder(store, 5)
    assert same(checkpoint.read(store, 5), state(5))
    assert sorted(os.listdir(url)) == [
        "commit.json",
        "ema.safetensors",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


def test_s3_holds_the_same(s3_bucket: str) -> None:
    for step in (5, 10, 15):
        checkpoint.write(f"{s3_bucket}/run/checkpoints", state(step))
    prune(f"{s3_bucket}/run/checkpoints", Keep(2))
    assert checkpoint.committed(f"{s3_bucket}/run/checkpoints") == [15, 10]
    found, rejected = checkpoint.newest(f"{s3_bucket}/run/checkpoints")
    assert found is not None
    assert same(found, state(15))
    assert rejected == []


def test_every_flipped_bit_and_cut_is_found(tmp_path: Path) -> None:
    """270 cases: one bit in 51 places of each file, and 3 cuts: all rejected, the step before in their place."""
    store = str(tmp_path)
    checkpoint.write(store, state(1))
    injected = 0
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "commit.json"):
        checkpoint.write(store, state(2))
        path = Path(checkpoint.folder(store, 2)) / name
        good = path.read_bytes()
        bad = [good[:cut] for cut in (0, 1, len(good) - 1)]
        for number in range(51):
            place = number * len(good) // 51
            bad.append(good[:place] + bytes([good[place] ^ 1 << number % 8]) + good[place + 1 :])
        for data in bad:
            assert data != good
            path.write_bytes(data)
            injected += 1
            found, rejected = checkpoint.newest(store)
            if name == "commit.json" and found is not None and found.step == 2:
                assert same(found, state(2))  # a bit of its white space
                continue
            assert found is not None, (name, rejected)
            assert same(found, state(1))
            assert len(rejected) == 1
            assert "step-000000002" in rejected[0]
    print(f"{injected} injected")
    assert injected == 270


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_a_missing_file_is_found(tmp_path: Path, name: str) -> None:
    checkpoint.write(str(tmp_path), state(3))
    (Path(checkpoint.folder(str(tmp_path), 3)) / name).unlink()
    with pytest.raises(Damaged, match=f"{name} is missing"):
        checkpoint.read(str(tmp_path), 3)


def test_no_commit_record_no_checkpoint(tmp_path: Path) -> None:
    checkpoint.write(str(tmp_path), state(3))
    (Path(checkpoint.folder(str(tmp_path), 3)) / "commit.json").unlink()
    assert checkpoint.committed(str(tmp_path)) == []
    assert checkpoint.newest(str(tmp_path)) == (None, [])


def test_an_unknown_version_is_named(tmp_path: Path) -> None:
    checkpoint.write(str(tmp_path), state(3))
    path = Path(checkpoint.folder(str(tmp_path), 3)) / "commit.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(Damaged, match="version 99; this code reads 1 to 2"):
        checkpoint.read(str(tmp_path), 3)


def test_pruning_keeps_the_newest_and_clears_what_was_cut_off(tmp_path: Path) -> None:
    store = str(tmp_path)
    for step in (1, 2, 3, 4):
        checkpoint.write(store, state(step))
    (Path(checkpoint.folder(store, 2)) / "commit.json").unlink()
    (tmp_path / "step-000000009").mkdir()
    (tmp_path / "step-000000009" / "model.safetensors").write_bytes(b"under way")
    prune(store, Keep(2))
    assert checkpoint.committed(store) == [4, 3]
    assert sorted(os.listdir(tmp_path)) == ["step-000000003", "step-000000004", "step-000000009"]


def test_nothing_is_pruned_for_a_newest_one_that_is_damaged(tmp_path: Path) -> None:
    store = str(tmp_path)
    for step in (1, 2, 3):
        checkpoint.write(store, state(step))
    (Path(checkpoint.folder(store, 3)) / "model.safetensors").write_bytes(b"rot")
    with pytest.raises(Damaged):
        prune(store, Keep(1))
    found, rejected = checkpoint.newest(store)
    assert found is not None
    assert found.step == 2
    assert len(rejected) == 1


def test_saving_in_the_background_holds_the_state_of_its_moment(tmp_path: Path) -> None:
    saver = Saver(str(tmp_path), Keep(2))
    weights = torch.zeros(1000)
    for step in range(1, 6):
        saver.save(State(step, {"model": {"w": weights}}, {}))
        weights += 1  # training goes on at once
    outcomes = saver.outcomes(wait=True)
    saver.close()
    assert [outcome.step for outcome in outcomes] == [1, 2, 3, 4, 5]
    assert all(outcome.failure is None for outcome in outcomes)
    assert checkpoint.committed(str(tmp_path)) == [5, 4]
    assert torch.equal(checkpoint.read(str(tmp_path), 5).tensors["model"]["w"], torch.full((1000,), 4.0))


@pytest.mark.parametrize("megabytes", [26, pytest.param(200, marks=pytest.mark.slow)])
def test_a_save_makes_the_training_wait_for_one_copy(tmp_path: Path, megabytes: int) -> None:
    """26 MB: weights, EMA and two moments of 1.6 M parameters, 100 ms there, else two memory copies."""
    kernels = [torch.randn(megabytes * 625, 4) for _ in range(25)]
    tensors = {stem: {str(i): t for i, t in enumerate(kernels)} for stem in ("model", "ema", "mean", "square")}
    saver = Saver(str(tmp_path), Keep(1))
    saver.reserve(tensors)
    twin = [torch.empty_like(t) for t in kernels]
    copies, waits = [], []
    for step in range(1, 4):
        start = time.perf_counter()
        for _ in tensors:
            for a, b in zip(twin, kernels, strict=True):
                a.copy_(b)
        copies.append(time.perf_counter() - start)
        saver.save(State(step, tensors, {}))
        waits += [outcome.wait_s for outcome in saver.outcomes(wait=True)]
    saver.close()
    copy_s, wait_s = median(copies), median(waits)
    print(f"{megabytes} MB: a save holds the training up for {1e3 * wait_s:.1f} ms, a copy takes {1e3 * copy_s:.1f} ms")
    assert wait_s <= (0.1 if megabytes == 26 else 2 * copy_s)


def test_a_store_that_fails_gives_its_room_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(url: str, data: bytes) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.storage, "create_bytes", full)  # of the record
    saver = Saver(str(tmp_path), Keep(1))
    saver.save(state(1))
    (outcome,) = saver.outcomes(wait=True)
    saver.close()
    assert not outcome.committed
    assert "No space left" in (outcome.failure or "")
    assert os.listdir(tmp_path) == []


VERSION_1 = Path(__file__).parent / "checkpoint_v1"


def test_a_checkpoint_of_version_1_is_read(tmp_path: Path) -> None:
    """Written by the code of that version."""
    shutil.copytree(VERSION_1, tmp_path, dirs_exist_ok=True)
    found, rejected = checkpoint.newest(str(tmp_path))
    assert rejected == []
    assert found is not None
    assert found.step == 5
    assert all(
        torch.equal(t, state(5).tensors[stem][name]) for stem, g in found.tensors.items() for name, t in g.items()
    )
    progress = Progress.of(found.step, found.facts)
    assert progress == Progress(step=5, images=60, skipped=2, ended="budget")
    checkpoint.write(str(tmp_path), state(6))
    prune(str(tmp_path), Keep(1, best=1))
    assert checkpoint.committed(str(tmp_path)) == [6], "it has no bits/dim that could be the best"


def test_restoring_says_what_it_rejected(tmp_path: Path) -> None:
    store = str(tmp_path)
    assert restore(store, Place()) == (None, [])
    checkpoint.write(store, state(1))
    checkpoint.write(store, state(2))
    (Path(checkpoint.folder(store, 2)) / "ema.safetensors").write_bytes(b"rot")
    found, rejected = restore(store, Place())
    assert found is not None
    assert found.step == 1
    assert "ema.safetensors is damaged" in rejected[0]
    (Path(checkpoint.folder(store, 1)) / "ema.safetensors").write_bytes(b"rot")
    with pytest.raises(ValueError, match=r"no checkpoint at .* can be used"):
        restore(store, Place())
