"""What the machine can do, found out at the start of a training: memory that stays, the faster precision, the peak
rate of products, a step's floating-point operations.
"""

import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.diffusion.conditioning import Conditioning

KEPT_BLOCK_BYTES = 32 << 20  # glibc takes no more
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
SIDES = {"cuda": (4096, 8192, 16384), "cpu": (512,)}  # of the square products that show a device's peak


def keep_memory() -> bool:
    """Tells the C library to keep what a step frees, for the next one; whether it understood (glibc does).

    By default each large activation is given back to the system and its pages are faulted in anew: tens of thousands
    of page faults a step on a CPU, a tenth of its time. It holds for the whole process.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    wanted = {M_MMAP_THRESHOLD: KEPT_BLOCK_BYTES, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2 * KEPT_BLOCK_BYTES}
    return all([mallopt(name, value) == 1 for name, value in wanted.items()])


def has_bf16(device: torch.device) -> bool:
    """Whether products in bf16 run in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within the block torch takes algorithms that give the same bits every time, or refuses where it has none.

    CUDA's workspace setting only counts where no product was made on the GPU before.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn: Any = torch.backends.cudnn
    torchs: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    fill = torchs.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic, cudnn.benchmark = True, False
        torchs.fill_uninitialized_memory = False  # a pass over memory that nothing here reads before writing it
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]
        torchs.fill_uninitialized_memory = fill


def finish(device: torch.device) -> None:
    """Waits for the device's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device, times: int = 3) -> float:
    """Median wall time of `run`, after one for warming up."""
    found: list[float] = []
    for _ in range(times + 1):
        finish(device)
        start = time.perf_counter()
        run()
        finish(device)
        found.append(time.perf_counter() - start)
    return median(found[1:])


@lru_cache
def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of the best square matrix product: what a network could reach at most."""
    best = 0.0
    for side in SIDES.get(device.type, SIDES["cpu"]):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        best = max(best, 2 * side**3 / seconds(lambda a=a, b=b: a @ b, device))
    return best


class _Operations(TorchFunctionMode):
    """Adds up the operations of products and convolutions, and of their gradients where their inputs need any."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in FORWARD:
            a, b = args[:2]
            self.total += FORWARD[func](out, a, b) * (1 + a.requires_grad + b.requires_grad)
        return out


def training_flops(network: nn.Module, shape: Sequence[int], conditioning: Conditioning) -> float:
    """Floating-point operations of one image's forward and backward pass: convolutions and products alone, a
    multiply-add being two. shape: (C, H, W) of an image; conditioning: of one row.

    Counted while one image goes forward, by what each layer is given. (torch's own FlopCounterMode loads the compiler,
    1.5 s of every start, and does not know a CPU's attention kernel.)
    """
    device = next(network.parameters()).device
    z, level = torch.zeros(1, *shape, device=device), torch.zeros(1, device=device)
    with _Operations() as counted, torch.enable_grad():
        network(z, level, conditioning.to(device))
    return float(counted.total)


def _attention(out: Tensor, q: Tensor, k: Tensor) -> int:
    return 2 * k.shape[-2] * (out.numel() + q.numel())


def _product(out: Tensor, a: Tensor, b: Tensor) -> int:
    return 2 * out.numel() * a.shape[-1]


# operations of the forward pass, from (output, first, second input)
FORWARD: dict[Any, Callable[[Tensor, Tensor, Tensor], int]] = {
    F.conv2d: lambda out, x, kernel: 2 * out.numel() * kernel[0].numel(),
    F.linear: _product,
    torch.matmul: _product,
    torch.bmm: _product,
    F.scaled_dot_product_attention: _attention,
}


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held so far: of the device's memory, on a CPU of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
