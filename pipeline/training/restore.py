"""Which checkpoint a group of ranks starts from: the newest one that every rank could read and verify."""

import torch
import torch.distributed

from pipeline.training.checkpoint import Damaged, State, newest, read
from pipeline.training.step import Place

NONE = -1


class RunError(ValueError):
    """What a user can mend and another try would not; every rank raises it alike."""


def restore(store: str, place: Place) -> tuple[State | None, list[str]]:
    """The state to start from (None: from nothing), and for each newer checkpoint a line that says why it was rejected.

    Rank 0 proposes the newest one that verifies; where any rank cannot read it, the next older one is proposed.

    Raises:
        RunError: checkpoints are there, but none can be read by all.
    """
    rejected: list[str] = []
    below: int | None = None
    while True:
        state: State | None = None
        if place.rank == 0:
            state, reasons = newest(store, below)
            rejected += reasons
        step = _from_rank_0(NONE if state is None else state.step, place)
        if step == NONE:
            if rejected:
                raise RunError(f"no checkpoint at {store} can be used: {'; '.join(rejected)}")
            if below is not None:
                raise RunError(
                    f"no checkpoint at {store} can be read by all workers: is it a folder that every node sees?"
                )
            return None, rejected
        if place.rank != 0:
            try:
                state = read(store, step)
            except (Damaged, OSError):
                state = None
        if _all(state is not None, place):
            return state, rejected
        rejected.append(f"the checkpoint of step {step} cannot be read by every worker")
        below = step


def _from_rank_0(value: int, place: Place) -> int:
    if place.world == 1:
        return value
    box = torch.tensor([value], device=place.device)
    torch.distributed.broadcast(box, src=0)
    return int(box)


def _all(value: bool, place: Place) -> bool:
    if place.world == 1:
        return value
    box = torch.tensor([int(value)], device=place.device)
    torch.distributed.all_reduce(box, op=torch.distributed.ReduceOp.MIN)
    return bool(box)
