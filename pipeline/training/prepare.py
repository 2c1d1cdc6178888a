"""What is done to a network before it is trained, and before DDP is put around it: memory layout, compilation of its
blocks, activations computed twice in place of kept. Names of weights stay as they are.
"""

import importlib
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

COMPILE = ("none", "default", "reduce-overhead", "max-autotune-no-cudagraphs")
SHAPES = (
    128  # of blocks that share a forward and are compiled, in training and in evaluation; past them torch runs eager
)
Module = TypeVar("Module", bound=nn.Module)


def blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network, in the order of its lists of modules."""
    return [block for found in network.modules() if isinstance(found, nn.ModuleList) for block in found]


def laid_out(module: Module, device: torch.device, compiled: bool = False) -> Module:
    """On its device, kernels in channels_last where convolutions are faster so: on a CPU, and on a GPU where a compiler
    removes the copies that torch's own GroupNorm there makes of such activations.
    """
    if device.type == "cpu" or compiled:
        return module.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return module.to(device)


def compile_blocks(network: nn.Module, mode: str) -> None:
    """Compiles each block when it is first called; blocks of one shape share what was compiled, so that the start stays
    short. mode: one of `COMPILE`.
    """
    if mode == "none":
        return
    dynamo = importlib.import_module("torch._dynamo")  # 1.5 s, for those who compile alone
    dynamo.config.recompile_limit = max(SHAPES, dynamo.config.recompile_limit)
    for block in blocks(network):
        block.compile(mode=None if mode == "default" else mode)


def checkpoint_blocks(network: nn.Module) -> None:
    """In training, keeps the blocks' inputs alone; the backward pass computes a block anew, with the same dropout."""
    for block in blocks(network):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
