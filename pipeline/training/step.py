"""One training step over logical shards: forward, backward, and the table of facts that every rank decides by.

The global batch is cut into L logical shards, whatever the number W of workers; rank r takes shards r, r + W, ... A
shard is one forward and backward of fixed shape with its generators keyed by (seed, step, shard) before it, so nothing
it draws depends on who computes it. Each loss carries W / L: DDP's mean over ranks then is the mean over shards, also
where L is not divisible by W.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.data.images import to_model
from pipeline.data.stream import Batch
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.loss import Loss, Objective, drop_labels, quarters
from pipeline.diffusion.randomness import StepKey, key_seed

Network = nn.Module  # a TrainingModule, or DDP around one


class TrainingModule(nn.Module):
    """Denoiser and objective as one forward, for DDP to wrap.

    classes: 0 for a network that takes no labels; autocast: dtype of convolutions and products, None for float32;
    label_dropout: share of images trained without their label, for classifier-free guidance.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        objective: Objective,
        classes: int,
        autocast: torch.dtype | None = None,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.objective = objective
        self.classes = classes
        self.autocast = autocast
        self.label_dropout = label_dropout

    def forward(self, images: Tensor, labels: Tensor | None, key: StepKey) -> Loss:
        """images uint8 (b, C, H, W); labels int64 (b,) or None."""
        conditioning = Conditioning(labels) if self.classes else Conditioning()
        if self.label_dropout:
            conditioning = drop_labels(conditioning, self.label_dropout, key)
        with torch.autocast(images.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return self.objective.loss(self.denoiser, to_model(images), conditioning, key)


@dataclass(frozen=True)
class Place:
    """Where a process stands among the workers. device: where its network lives."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def shards(self, shards: int) -> list[int]:
        """The logical shards of this rank."""
        return list(range(self.rank, shards, self.world))


def on_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor | None]:
    labels = None if batch.labels is None else batch.labels.to(device, non_blocking=True)
    return batch.images.to(device, non_blocking=True), labels


def backward(network: Network, batches: Sequence[Batch], keys: Sequence[StepKey], place: Place) -> list[Loss]:
    """Adds the gradient of this rank's logical shards to `.grad`; ranks meet in the last one's backward.

    Returns the losses, detached.
    """
    losses: list[Loss] = []
    for index, (batch, key) in enumerate(zip(batches, keys, strict=True)):
        torch.manual_seed(
            key_seed("train", "global", key.seed, key.step, key.shard)
        )  # dropout draws from the global stream
        last = index == len(keys) - 1
        alone = not isinstance(network, DistributedDataParallel) or last
        with contextlib.nullcontext() if alone else network.no_sync():  # pyright: ignore[reportCallIssue]
            loss: Loss = network(*on_device(batch, place.device), key)
            (loss.per_image.mean() * (place.world / key.shards)).backward()
        losses.append(Loss(loss.per_image.detach(), loss.parts, loss.gamma, loss.observed))
    return losses


@dataclass(frozen=True)
class Table:
    """What happened in a step, the same on every rank, float64 on the CPU, in the order of logical shards.

    per_image, gamma: (L, b). parts: name -> (L,) means. quarters: (4, 2), sums and counts. observed: (L b, 2) or None.
    stop: some rank was asked to stop.
    """

    per_image: Tensor
    gamma: Tensor
    parts: dict[str, Tensor]
    quarters: Tensor
    observed: Tensor | None
    stop: bool

    @property
    def loss(self) -> float:
        return float(self.per_image.mean())

    def bad_shard(self) -> int | None:
        """The first logical shard with a loss that is not finite."""
        bad = (~torch.isfinite(self.per_image)).any(1).nonzero()
        return int(bad[0]) if len(bad) else None


def tabulate(losses: Sequence[Loss], shards: int, place: Place, stop: bool, gamma_range: tuple[float, float]) -> Table:
    """Joins all ranks' losses: each fills the rows of its shards; the sum is exact, for the others hold zeros there."""
    first = losses[0]
    count, names = len(first.per_image), sorted(first.parts)
    width = 2 * count + len(names) + 8 + (0 if first.observed is None else 2 * count)
    rows = torch.zeros(shards + 1, width, dtype=torch.float64, device=first.per_image.device)
    for shard, loss in zip(place.shards(shards), losses, strict=True):
        parts = [loss.parts[name].mean().double().reshape(1) for name in names]
        observed = [] if loss.observed is None else [loss.observed.double().reshape(-1)]
        quarter = quarters(loss, *gamma_range).double().reshape(-1)
        rows[shard] = torch.cat([loss.per_image.double(), loss.gamma.double(), *parts, quarter, *observed])
    rows[shards, 0] = float(stop)
    if place.world > 1:
        torch.distributed.all_reduce(rows)
    rows = rows.cpu()
    body, at = rows[:shards], 2 * count + len(names)
    return Table(
        per_image=body[:, :count],
        gamma=body[:, count : 2 * count],
        parts={name: body[:, 2 * count + index] for index, name in enumerate(names)},
        quarters=body[:, at : at + 8].sum(0).reshape(4, 2),
        observed=None if first.observed is None else body[:, at + 8 :].reshape(-1, 2),
        stop=bool(rows[shards, 0] > 0),
    )
