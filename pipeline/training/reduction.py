"""Where the gradients of logical shards become the gradient of the global batch, the same on every rank."""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.data.reading.stream import Batch
from pipeline.diffusion.objectives.loss import Loss
from pipeline.diffusion.randomness import StepKey
from pipeline.training.step import Place, TrainingModule, backward, shard_backward


class Reduction(Protocol):
    """Adds the gradient of the mean over all logical shards to `.grad` of every rank, which was zero or None."""

    def backward(self, batches: Sequence[Batch], keys: Sequence[StepKey]) -> list[Loss]:
        """This rank's shards in the order rank, rank + W, ...; their losses, detached."""
        ...


def reduction(kind: str, module: TrainingModule, place: Place) -> Reduction:
    """kind: one of config.REDUCTIONS."""
    if place.world == 1:
        return Alone(module, place)
    return ExactSum(module, place) if kind == "exact" else DDP(module, place)


class Alone:
    """One worker: autograd adds up its shards, in their order."""

    def __init__(self, module: nn.Module, place: Place) -> None:
        self.module, self.place = module, place

    def backward(self, batches: Sequence[Batch], keys: Sequence[StepKey]) -> list[Loss]:
        return backward(self.module, batches, keys, self.place)


class DDP:
    """DistributedDataParallel: ranks meet in the backward pass of their last shard.

    Each loss carries W / L: the mean over ranks then is the mean over shards, also where L is not divisible by W.
    """

    def __init__(self, module: nn.Module, place: Place) -> None:
        self.module, self.place = module, place
        self.ddp = DistributedDataParallel(module, forward_sync_buffers=False, gradient_as_bucket_view=True)
        self.settled = False

    def backward(self, batches: Sequence[Batch], keys: Sequence[StepKey]) -> list[Loss]:
        if not self.settled:
            self._settle(batches[-1], keys[-1])
        losses: list[Loss] = []
        for index, (batch, key) in enumerate(zip(batches, keys, strict=True)):
            last = index == len(keys) - 1
            with nullcontext() if last else self.ddp.no_sync():
                losses.append(shard_backward(self.ddp, batch, key, self.place, self.place.world / key.shards))
        return losses

    def _settle(self, batch: Batch, key: StepKey) -> None:
        """Brings the gradient buckets into their final order.

        DDP rebuilds its buckets after the first backward, so that the first step after a restart would add up gradients
        of three or more ranks in another order than the same step of an uninterrupted run. Two throwaway backwards at
        every start, the very first included, leave nothing but the order behind: gradients are cleared, and every draw
        of a step is keyed anew.
        """
        with warnings.catch_warnings():  # said once a process: 1x1 kernels have two names for the same strides
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            for _ in range(2):
                shard_backward(self.ddp, batch, key, self.place, 1.0)
        self.module.zero_grad(set_to_none=False)
        self.settled = True


class ExactSum:
    """Gradients of logical shards added up in their order, 0 to L - 1: the same bits for any number of workers.

    A gradient lies in one flat buffer (of each dtype), of which rank j owns slice j. In round k every rank computes the
    gradient of its shard k W + rank alone and sends slice j to rank j, which adds what it gets in shard order. A round
    is sent while the next one is computed: two buffers take turns. At the end each rank's sums go to all.
    `Alone` has the same bits. Memory beyond DDP's: two gradients and a W-th.
    """

    def __init__(self, module: nn.Module, place: Place) -> None:
        self.module, self.place = module, place
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in module.parameters():
            if parameter.requires_grad:
                by_dtype.setdefault(parameter.dtype, []).append(parameter)
        self.parts = [_Part(parameters, place) for parameters in by_dtype.values()]

    def backward(self, batches: Sequence[Batch], keys: Sequence[StepKey]) -> list[Loss]:
        shards = keys[0].shards
        losses: list[Loss] = []
        for first in range(0, shards, self.place.world):
            index = first // self.place.world
            if index < len(keys):
                losses.append(shard_backward(self.module, batches[index], keys[index], self.place, 1 / shards))
            for part in self.parts:
                part.receive()
                part.send(min(self.place.world, shards - first))
        for part in self.parts:
            part.receive()
            part.gather()
        return losses


class _Part:
    """The gradients of parameters of one dtype."""

    def __init__(self, parameters: Sequence[nn.Parameter], place: Place) -> None:
        self.parameters, self.place = parameters, place
        count = sum(p.numel() for p in parameters)
        self.slice = -(-count // place.world)
        flats = [parameters[0].new_zeros(self.slice * place.world) for _ in range(2)]
        self.buffers = [(flat, self._views(flat)) for flat in flats]
        self.flat = flats[0]
        self._show()
        self.sum = flats[0].new_zeros(self.slice)
        self.received = torch.empty_like(flats[0]).view(place.world, self.slice)
        self.under_way: tuple[dist.Work, int] | None = None

    def _views(self, flat: Tensor) -> list[Tensor]:
        """One a parameter, in its memory layout."""
        ends = accumulate(p.numel() for p in self.parameters)
        return [
            flat.as_strided(p.shape, p.stride(), end - p.numel()) for p, end in zip(self.parameters, ends, strict=True)
        ]

    def _show(self) -> None:
        """The first buffer becomes the parameters' `.grad`."""
        self.flat, views = self.buffers[0]
        for parameter, view in zip(self.parameters, views, strict=True):
            parameter.grad = view

    def send(self, shards: int) -> None:
        """Starts to exchange the slices of this round, of which the first `shards` ranks have one."""
        work = dist.all_to_all_single(self.received.view(-1), self.flat, async_op=True)
        assert work is not None, "an asynchronous collective has a handle"
        self.under_way = work, shards
        self.buffers.reverse()
        self._show()
        self.flat.zero_()

    def receive(self) -> None:
        """Adds what the round before sent here, in shard order."""
        if self.under_way is None:
            return
        work, shards = self.under_way
        work.wait()
        for row in self.received[:shards]:
            self.sum += row
        self.under_way = None

    def gather(self) -> None:
        """All sums to all ranks, as their gradient."""
        self.received.copy_(self.sum)  # a row for each rank
        dist.all_to_all_single(self.flat, self.received.view(-1))
        self.sum.zero_()
