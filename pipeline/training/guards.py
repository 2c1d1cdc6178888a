"""Guards of a run that is left alone: which steps must not change a weight.

They judge by the table of a step, which is the same on every rank, so every rank decides alike.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed
from torch import Tensor

from pipeline.training.agreement import Agreement
from pipeline.training.config import TrainingConfig
from pipeline.training.restore import RunError
from pipeline.training.step import Place


class Diverged(RunError):
    """The guards left out too many steps in a row, or went back too often."""


@dataclass(frozen=True)
class Verdict:
    """Why a step is left out. cause: 'not_finite', 'spike' or 'asked'."""

    cause: str
    reason: str


class Guard:
    """Judges steps. Its memory, losses and gradient norms of the last good steps, belongs in a checkpoint."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.spike_window)
        self.norms: deque[float] = deque(maxlen=config.spike_window)

    def judge(self, table: Agreement) -> Verdict | None:
        """None for a good step, which is remembered."""
        loss, norm = table.loss, table.norm
        if not (math.isfinite(norm) and table.bad_shard() is None):
            return Verdict("not_finite", _blame(table))
        if self.config.on_spike != "none" and len(self.losses) == self.config.spike_window:
            for what, value, past in (("loss", loss, self.losses), ("gradient norm", norm, self.norms)):
                usual = median(past)
                if value > self.config.spike_factor * usual > 0:
                    times = f"{value / usual:.0f} times the median of the last {len(past)} steps, {usual:.4g}"
                    return Verdict("spike", f"{what} {value:.4g} is {times}")
        self.losses.append(loss)
        self.norms.append(norm)
        return None

    def state(self) -> dict[str, list[float]]:
        return {"losses": list(self.losses), "norms": list(self.norms)}

    def load(self, state: Mapping[str, Sequence[float]]) -> None:
        for own, stored in ((self.losses, state["losses"]), (self.norms, state["norms"])):
            own.clear()
            own.extend(stored)


def _blame(table: Agreement) -> str:
    """Which shard, rank and noise level."""
    shard, ranks = table.bad_shard(), len(table.norms)
    what = "loss"
    if shard is None:
        bad_ranks = (~table.norms.isfinite()).nonzero().flatten().tolist()
        what, shard = f"gradient (norm on rank {bad_ranks[0]})", int(table.per_image.mean(1).argmax())
    values = table.per_image[shard]
    bad = ~torch.isfinite(values)
    image = int(bad.nonzero()[0]) if bool(bad.any()) else int(values.argmax())
    where = f"logical shard {shard} (rank {shard % ranks}), gamma {float(table.gamma[shard, image]):.3f}"
    return f"{what} not finite; {'in' if what == 'loss' else 'largest loss in'} {where}"


@torch.no_grad()
def all_finite(tensors: Mapping[str, Mapping[str, Tensor]], place: Place) -> str | None:
    """Whether the state of a training is finite on every rank: None, or the name of a part (model, ema, ...) that is
    not. One pass over the memory; every rank must call it.
    """
    groups = ([t for t in group.values() if t.is_floating_point()] for group in tensors.values())
    bad = torch.stack([(~_finite(group)).double().to(place.device) for group in groups])
    if place.world > 1:
        torch.distributed.all_reduce(bad)
    return next((name for name, count in zip(tensors, bad.tolist(), strict=True) if count), None)


def _finite(tensors: Sequence[Tensor]) -> Tensor:
    if not tensors:
        return torch.tensor(True)
    norms = torch._foreach_norm(list(tensors))  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack([norm.double() for norm in norms]).isfinite().all()
