"""What a training takes of memory, found out without taking any: the network traced on torch's meta device."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.conditioner import Conditioner
from pipeline.training.prepare import blocks

STATE_COPIES = 5  # weights, gradients, two moments, EMA
HELD_COPIES = 4  # of a checkpoint that is written while the training goes on, all but the gradients
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Footprint:
    """Bytes of one worker. state: weights, gradients, two moments, EMA; held: the copy that is written as a checkpoint,
    rank 0 alone; saved: what one logical shard's forward keeps for its backward, float32.
    """

    parameters: int
    state: int
    held: int
    saved: int


def footprint(
    build: Callable[[], nn.Module], shape: Sequence[int], conditioner: Conditioner, images: int, checkpointed: bool
) -> Footprint:
    """Of the network that `build` makes, for logical shards of that many images of (C, H, W) and what it is told of
    them. checkpointed: activations are kept at the blocks' borders alone, and one block's at a time.
    """
    with torch.device("meta"):
        network = build().train()
        z, level = torch.zeros(images, *shape), torch.zeros(images)
        conditioning = conditioner.nothing(images)
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    kept = _Kept(network)
    with _Fused(), torch.autograd.graph.saved_tensors_hooks(kept.save, lambda tensor: tensor):
        network(z, level, conditioning)
    count = sum(p.numel() for p in network.parameters())
    saved = kept.checkpointed() if checkpointed else kept.total()
    return Footprint(count, STATE_COPIES * weights, HELD_COPIES * weights, saved)


class _Fused(TorchFunctionMode):
    """Attention as devices compute it: the matrix of weights is never whole (on meta it would be)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("the trace has no backward pass")


class _Kept:
    """Tensors that a forward pass keeps, by the block that was running; weights are not among them."""

    def __init__(self, network: nn.Module) -> None:
        self.weights = {_place(p) for p in network.parameters()}
        self.by_block: dict[nn.Module | None, dict[int, Tensor]] = {None: {}}
        self.inputs: dict[int, Tensor] = {}
        self.block: nn.Module | None = None
        for block in blocks(network):
            block.register_forward_pre_hook(self._enter)
            block.register_forward_hook(self._leave)

    def _enter(self, block: nn.Module, given: tuple[object, ...]) -> None:
        self.block = block
        self.inputs |= {_place(value): value for value in given if isinstance(value, Tensor)}

    def _leave(self, block: nn.Module, given: object, out: object) -> None:
        self.block = None

    def save(self, tensor: Tensor) -> Tensor:
        if _place(tensor) not in self.weights:
            self.by_block.setdefault(self.block, {})[_place(tensor)] = tensor  # held, so that its place is its own
        return tensor

    def total(self) -> int:
        return _bytes({place: tensor for kept in self.by_block.values() for place, tensor in kept.items()})

    def checkpointed(self) -> int:
        inside = [_bytes(kept) for block, kept in self.by_block.items() if block is not None]
        return _bytes(self.by_block[None] | self.inputs) + max(inside, default=0)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensors: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


def free_memory(cgroup: Path = CGROUP, meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that this machine, and the container around this process, have left; None where the system does not say.

    Memory that only caches files counts as left.
    """
    if not sys.platform.startswith("linux"):
        return None
    facts = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    left = [int(facts["MemAvailable"].split()[0]) * 1024]
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),  # version 2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),  # version 1
    ):
        text = _text(cgroup / limit)
        if text.isdecimal():
            stat = dict(line.split() for line in _text((cgroup / used).parent / "memory.stat").splitlines())
            left.append(int(text) - int(_text(cgroup / used) or 0) + int(stat.get(cache, 0)))
    return max(0, min(left))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def check_room(found: Footprint, workers: int, images: int, half: bool, left: int | None) -> None:
    """Whether that many workers fit in `left` bytes of one machine, at least by what certainly is needed. half: in
    products of 2 bytes a number, which keep no less than half.

    Raises:
        ValueError: they do not; says what is needed and what to change.
    """
    saved = found.saved // 2 if half else found.saved
    needed = workers * (found.state + saved) + found.held
    if left is None or needed <= left:
        return
    gib = 2**30
    whose = "a worker" if workers == 1 else f"each of {workers} workers"
    raise ValueError(
        f"out of memory before it starts: this run needs at least {needed / gib:.1f} GiB, this machine has "
        f"{left / gib:.1f} GiB left: weights, gradients, moments and EMA {found.state / gib:.2f} GiB and activations "
        f"of {images} images {saved / gib:.2f} GiB for {whose}, and {found.held / gib:.2f} GiB for the checkpoint "
        f"that is written; set stream.logical_shards higher (fewer images at a time), "
        f"training.checkpoint_activations: true, fewer cluster.workers, or a smaller model.network"
    )
