"""A logical shard's forward and backward pass.

The global batch is cut into L logical shards, whatever the number W of workers; rank r takes shards r, r + W, ... A
shard is one forward and backward of fixed shape with its generators keyed by (seed, step, shard) before it, so nothing
it draws depends on who computes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.conditioner import Conditioner
from pipeline.data.reading.stream import Batch
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.objectives.loss import Loss, Objective, drop_condition
from pipeline.diffusion.randomness import StepKey, key_seed
from pipeline.diffusion.space import Space


class TrainingModule(nn.Module):
    """Denoiser and objective as one forward, for DDP to wrap.

    conditioner: what the network is told of an image; space: what it works on; autocast: dtype of convolutions and
    products, None for float32; label_dropout: share of images trained untold, for classifier-free guidance.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        objective: Objective,
        conditioner: Conditioner,
        space: Space,
        autocast: torch.dtype | None = None,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.objective = objective
        self.conditioner = conditioner
        self.space = space
        self.autocast = autocast
        self.label_dropout = label_dropout

    def forward(self, images: Tensor, conditioning: Conditioning, key: StepKey) -> Loss:
        """images uint8 (b, C, H, W)."""
        if self.label_dropout:
            conditioning = drop_condition(conditioning, self.label_dropout, key)
        with torch.autocast(images.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            z = self.space.encode(images, key.normal("posterior"))
            return self.objective.loss(self.denoiser, z, conditioning, key)


@dataclass(frozen=True)
class Place:
    """Where a process stands among the workers. device: where its network lives."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def shards(self, shards: int) -> list[int]:
        """The logical shards of this rank."""
        return list(range(self.rank, shards, self.world))


def shard_backward(network: nn.Module, batch: Batch, key: StepKey, place: Place, weight: float) -> Loss:
    """Adds the gradient of weight x the mean loss of a logical shard to `.grad`; the loss, detached.

    network: a `TrainingModule`, or DDP around one.
    """
    torch.manual_seed(key_seed("train", "global", key.seed, key.step, key.shard))  # dropout draws from this stream
    module = network.module if isinstance(network, DistributedDataParallel) else network
    assert isinstance(module, TrainingModule), type(module)
    conditioning = module.conditioner.of(batch).to(place.device)
    loss: Loss = network(batch.images.to(place.device, non_blocking=True), conditioning, key)
    (loss.per_image.mean() * weight).backward()
    return Loss(loss.per_image.detach(), loss.parts, loss.gamma, loss.observed)


def backward(network: nn.Module, batches: Sequence[Batch], keys: Sequence[StepKey], place: Place) -> list[Loss]:
    """Adds the gradient of the mean over logical shards, as far as these are given, to `.grad`."""
    return [shard_backward(network, b, key, place, 1 / key.shards) for b, key in zip(batches, keys, strict=True)]
