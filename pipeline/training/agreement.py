"""The table of facts about a step that every rank decides by: one collective, one wait for the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from pipeline.diffusion.objectives.loss import Loss
from pipeline.training.step import Place


@dataclass(frozen=True)
class Agreement:
    """What happened in a step, the same on every rank, float64 on the CPU, in the order of logical shards.

    per_image, gamma: (L, b). parts: name -> (L,) means. observed: (L b, 2) or None. norms: (W,) of the gradient as each
    rank has it. wishes: (3,), how many ranks wish to stop, being asked to or their time being up, and to save. lost: of
    the batch's images, those that others stand in for.
    """

    per_image: Tensor
    gamma: Tensor
    parts: dict[str, Tensor]
    observed: Tensor | None
    norms: Tensor
    wishes: Tensor
    lost: int

    @property
    def loss(self) -> float:
        return float(self.per_image.mean())

    @property
    def norm(self) -> float:
        """Of the gradient: rank 0's, which is that of all on equal hardware; not finite where any rank's is not."""
        return float(self.norms[0] if bool(self.norms.isfinite().all()) else self.norms.sum())

    def bad_shard(self) -> int | None:
        """The first logical shard with a loss that is not finite."""
        bad = (~torch.isfinite(self.per_image)).any(1).nonzero()
        return int(bad[0]) if len(bad) else None


def agree(
    losses: Sequence[Loss], norm: Tensor, shards: int, place: Place, wishes: Sequence[bool], lost: int = 0
) -> Agreement:
    """Joins what all ranks know: each fills its own places of a vector of zeros, so that the sum is exact."""
    first = losses[0]
    count, names = len(first.per_image), sorted(first.parts)
    width = 2 * count + len(names) + (0 if first.observed is None else 2 * count)
    sizes = [shards * width, place.world, len(wishes) + 1]
    facts = torch.zeros(sum(sizes), dtype=torch.float64, device=first.per_image.device)
    rows, norms, counts = facts.split(sizes)
    rows = rows.view(shards, width)
    for shard, loss in zip(place.shards(shards), losses, strict=True):
        parts = [loss.parts[name].mean().double().reshape(1) for name in names]
        observed = [] if loss.observed is None else [loss.observed.double().reshape(-1)]
        torch.cat([loss.per_image.double(), loss.gamma.double(), *parts, *observed], out=rows[shard])
    norms[place.rank] = norm
    if any(wishes) or lost:
        counts += torch.tensor([*map(float, wishes), lost], device=facts.device)
    if place.world > 1:
        torch.distributed.all_reduce(facts)
    rows, norms, counts = facts.cpu().split(sizes)
    rows, at = rows.view(shards, width), 2 * count + len(names)
    return Agreement(
        per_image=rows[:, :count],
        gamma=rows[:, count : 2 * count],
        parts={name: rows[:, 2 * count + index] for index, name in enumerate(names)},
        observed=None if first.observed is None else rows[:, at:].reshape(-1, 2),
        norms=norms,
        wishes=counts[:-1],
        lost=int(counts[-1]),
    )
