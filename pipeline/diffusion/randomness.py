"""Keyed noise: every random number is a pure function of integers and strings, so nothing random is stored.

Training keys its draws by (seed, step, logical shard), evaluation and serving by (seed, image); a restart, a retry or
another batch draws the same numbers.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def key_seed(*key: int | str) -> int:
    """A 63-bit seed from a key, by BLAKE2b over its unambiguous text."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def keyed_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator seeded by `key`."""
    return torch.Generator(device=device).manual_seed(key_seed(*key))


class Noise:
    """Standard normal draws for a batch, one generator an image, so that an image's draws do not depend on its batch.

    The generators live as long as the procedure: seeding one at each draw would cost half as much again.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seeds = tuple(seeds)
        self.generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self.seeds)

    def normal_(self, out: Tensor) -> Tensor:
        """Fill `out` (n, ...) with N(0, I), row i from generator i."""
        return self._fill(out, torch.Tensor.normal_)

    def normal_like(self, reference: Tensor) -> Tensor:
        return self.normal_(torch.empty_like(reference))

    def uniform_(self, out: Tensor) -> Tensor:
        """Fill `out` (n, ...) with U[0, 1), row i from generator i."""
        return self._fill(out, torch.Tensor.uniform_)

    def rademacher_(self, out: Tensor) -> Tensor:
        """Fill `out` (n, ...) with independent signs, row i from generator i."""
        return self._fill(out, torch.Tensor.bernoulli_).mul_(2).sub_(1)

    def _fill(self, out: Tensor, draw: Callable[..., Tensor]) -> Tensor:
        """Row i by `draw` with generator i, in the order of its indices: torch fills in the order of memory, in which
        an image in channels_last has its channels last.
        """
        for row, generator in zip(out, self.generators, strict=True):
            if row.is_contiguous():
                draw(row, generator=generator)
            else:
                row.copy_(draw(torch.empty(row.shape, dtype=row.dtype, device=row.device), generator=generator))
        return out


@dataclass(frozen=True)
class StepKey:
    """Where in training a forward pass stands: all that its random draws depend on."""

    seed: int
    step: int
    shard: int  # logical shard of the global batch, 0..shards-1
    shards: int

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """Draws of this logical shard alone."""
        return keyed_generator("train", purpose, self.seed, self.step, self.shard, device=device)

    def normal(self, purpose: str) -> Callable[[Tensor], Tensor]:
        """Standard normal draws of this logical shard alone, of a tensor's shape, type and device."""
        return lambda like: torch.empty_like(like).normal_(generator=self.generator(purpose, like.device))

    def shared_generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """Draws that every logical shard of the step agrees on (the offset of variance-reduced times)."""
        return keyed_generator("train-shared", purpose, self.seed, self.step, device=device)
