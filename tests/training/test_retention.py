"""Which checkpoints stay: the newest, the best, one every so many images; what stays stays when others are gone."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from pipeline.training import checkpoint
from pipeline.training.checkpoint import Record, State
from pipeline.training.retention import Keep, chosen, prune

HISTORY = st.lists(st.one_of(st.none(), st.integers(0, 5).map(float)), min_size=1, max_size=30)


@given(HISTORY, st.integers(1, 4), st.integers(0, 3), st.sampled_from([0, 7, 25, 60]))
def test_pruning_at_every_save_keeps_what_all_of_history_would(
    scores: list[float | None], newest: int, best: int, every_images: int
) -> None:
    keep = Keep(newest, best, every_images)
    history: list[Record] = []
    there: list[Record] = []
    for number, score in enumerate(scores, 1):
        history.append(Record(2, number, {}, images=10 * number, bits_per_dim=score))
        there.append(history[-1])
        there = [found for found in there if found.step in chosen(there, keep)]
    steps = {found.step for found in there}
    assert steps == chosen(history, keep)
    assert {found.step for found in history[-newest:]} <= steps
    measured = sorted(found.bits_per_dim for found in history if found.bits_per_dim is not None)
    kept = sorted(found.bits_per_dim for found in there if found.bits_per_dim is not None)
    assert kept[:best] == measured[:best]
    if every_images:
        passed = [found for found in history if found.images is not None and found.images >= every_images]
        assert not passed or passed[0].step in steps


def test_on_a_store(tmp_path: Path) -> None:
    store, bits = str(tmp_path), {1: 3.0, 2: 2.0, 3: 2.5, 4: None, 5: 4.0, 6: None}
    for step, value in bits.items():
        checkpoint.write(store, State(step, {}, {"images": 10 * step, "bits_per_dim": value}))
        prune(store, Keep(2, best=1, every_images=30))
    assert checkpoint.committed(store) == [6, 5, 3, 2]  # 6 also is the first after 60, 3 the first after 30


def test_a_damaged_record_is_no_candidate(tmp_path: Path) -> None:
    store = str(tmp_path)
    for step in (1, 2, 3):
        checkpoint.write(store, State(step, {}, {"images": step, "bits_per_dim": float(step)}))
    (Path(checkpoint.folder(store, 1)) / "commit.json").write_bytes(b"rot")
    prune(store, Keep(1, best=1))
    assert checkpoint.committed(store) == [3, 2]
