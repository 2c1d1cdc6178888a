"""Exponential moving average of the weights, its half-life in images (Karras et al. 2022, appendix F.2)."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn


def decay(batch_size: int, images: int, half_life_images: float, ramp_up: float | None) -> float:
    """beta of ema = beta ema + (1 - beta) weights, for a step of `batch_size` images with `images` seen before it.

    The half-life is at most `ramp_up` times the images seen, so that the first, random weights are soon forgotten:
    beta = 0 at the first step.
    """
    half_life = half_life_images if ramp_up is None else min(half_life_images, ramp_up * images)
    return 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0


Network = TypeVar("Network", bound=nn.Module)


class EMA(Generic[Network]):
    """A second model whose parameters follow the first's: `model`, in eval mode and without gradients.

    Every parameter is averaged, a learned schedule's too; buffers are copied.
    """

    def __init__(self, source: Network) -> None:
        self.model: Network = copy.deepcopy(source).eval().requires_grad_(False)
        self._averages: list[Tensor] = list(self.model.parameters())
        self._sources: list[Tensor] = list(source.parameters())
        self._buffers = [(mine, theirs) for mine, theirs in zip(self.model.buffers(), source.buffers(), strict=True)]

    @torch.no_grad()
    def update(self, beta: float) -> None:
        """ema <- beta ema + (1 - beta) weights."""
        if self._averages:
            torch._foreach_lerp_(self._averages, self._sources, 1.0 - beta)  # pyright: ignore[reportPrivateImportUsage]
        for mine, theirs in self._buffers:
            mine.copy_(theirs)

    @contextmanager
    def showing_source(self) -> Iterator[Network]:
        """Within the block `model` has the weights themselves, not their average; nothing is copied."""
        averages = [mine.data for mine in self._averages]
        try:
            for mine, source in zip(self._averages, self._sources, strict=True):
                mine.data = source.data
            yield self.model
        finally:
            for mine, average in zip(self._averages, averages, strict=True):
                mine.data = average

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)
