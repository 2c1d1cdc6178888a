"""Which checkpoints stay: the newest, the best, one every so many images; never the newest that verifies is lost."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline import storage
from pipeline.training.checkpoint import COMMIT, Damaged, Record, folder, folders, record, remove_record, verify


@dataclass(frozen=True)
class Keep:
    """newest: how many, at least 1. best: how many of those with the least held-out bits/dim. every_images: the first
    one after each multiple of it; 0: none for that reason.
    """

    newest: int
    best: int = 0
    every_images: int = 0


def chosen(records: Sequence[Record], keep: Keep) -> set[int]:
    """The steps of the checkpoints that stay. What it chose before it chooses again when others were removed."""
    ordered = sorted(records, key=lambda found: found.step)
    kept = {found.step for found in ordered[-keep.newest :]}
    measured = [(found.bits_per_dim, -found.step) for found in ordered if found.bits_per_dim is not None]
    kept |= {-step for _, step in sorted(measured)[: keep.best]}
    passed = 0
    for found in ordered:
        if keep.every_images and found.images is not None and found.images // keep.every_images > passed:
            passed = found.images // keep.every_images
            kept.add(found.step)
    return kept


def prune(store: str, keep: Keep) -> None:
    """Removes the checkpoints that do not stay, and what cut-off saves left behind.

    Nothing is removed unless the newest one verifies; commit records go first, so nothing half removed looks whole.

    Raises:
        Damaged: the newest one does not verify.
    """
    there = folders(store)
    steps = sorted((step for step, names in there.items() if COMMIT in names), reverse=True)
    if not steps or all(step in steps[: keep.newest] or step > steps[0] for step in there):
        return
    kept = chosen(_records(store, steps), keep)
    doomed = [step for step in sorted(there) if step not in kept and step < steps[0]]
    if doomed:
        verify(store, steps[0])
    for step in doomed:
        remove_record(folder(store, step))
        storage.delete_tree(folder(store, step))


def _records(store: str, steps: Sequence[int]) -> list[Record]:
    """Those that can be read: a checkpoint with a damaged record is none."""
    found: list[Record] = []
    for step in steps:
        try:
            found.append(record(store, step))
        except Damaged:
            continue
    return found
