"""How far a training has come, beside its tensors, and whether that is its end."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from pipeline.training.config import TrainingConfig


@dataclass
class Progress:
    """Facts of a checkpoint, JSON values.

    step: global batches done. images: seen in them. seconds: of training, all processes together. skipped,
    skipped_in_a_row: steps that the guards left out; rollbacks: how often they went back. skip_steps: steps still to be
    left out for a rollback's sake; the first step is 1. bits_per_dim: held-out, measured at this step. ended: why the
    training ended here, with everything told.
    """

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    skip_steps: list[int] = field(default_factory=list)
    bits_per_dim: float | None = None
    ended: str | None = None

    @staticmethod
    def of(step: int, facts: Mapping[str, Any]) -> "Progress":
        """That of a checkpoint."""
        return Progress(step, **{item.name: facts[item.name] for item in fields(Progress) if item.name != "step"})

    def end(self, config: TrainingConfig, batch_size: int) -> str | None:
        """Which limit of the run file is reached here: a reason of `events.Finished`."""
        if self.step >= math.ceil(config.images / batch_size):
            return "budget"
        if config.max_steps and self.step >= config.max_steps:
            return "max_steps"
        if config.max_hours and self.seconds >= 3600 * config.max_hours:
            return "max_hours"
        if config.target_bits_per_dim and self.bits_per_dim is not None:
            return "target" if self.bits_per_dim <= config.target_bits_per_dim else None
        return None
