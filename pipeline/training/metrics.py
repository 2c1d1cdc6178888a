"""What is told of the steps since the last time: means, speed, losses by noise level."""

import torch
from torch import Tensor

from pipeline.diffusion.objectives.loss import binned
from pipeline.training.agreement import Agreement

BINS = 16  # of the range of gamma
QUARTERS = 4


class StepMetrics:
    """Sums over the steps since the last metrics, and losses by level since the last curve."""

    def __init__(self, gamma_range: tuple[float, float]) -> None:
        self.gamma_range = gamma_range
        self.since_curve = torch.zeros(BINS, 2, dtype=torch.float64)
        self.empty()

    def empty(self) -> None:
        self.steps = self.images = self.lost = 0
        self.wait_s = self.busy_s = 0.0
        self.sums: dict[str, float] = {}
        self.levels = torch.zeros(BINS, 2, dtype=torch.float64)

    def add(self, table: Agreement, images: int, wait_s: float, busy_s: float) -> None:
        """One step that was not left out."""
        self.steps, self.images, self.lost = self.steps + 1, self.images + images, self.lost + table.lost
        self.wait_s, self.busy_s = self.wait_s + wait_s, self.busy_s + busy_s
        values = {"loss": table.loss, "grad_norm": table.norm}
        values |= {f"part/{name}": float(part.mean()) for name, part in table.parts.items()}
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        levels = binned(table.per_image, table.gamma, *self.gamma_range, BINS)
        self.levels += levels
        self.since_curve += levels

    def metrics(self) -> dict[str, float]:
        """Means and speed since the last call."""
        means = {name: value / self.steps for name, value in self.sums.items()}
        for index, (total, count) in enumerate(self.levels.view(QUARTERS, -1, 2).sum(1).tolist()):
            if count:
                means[f"loss_quarter_{index + 1}"] = total / count
        means |= {"images_per_s": self.images / self.busy_s, "data_wait": self.wait_s / self.busy_s}
        means |= {"lost_images": self.lost} if self.lost else {}
        self.empty()
        return means

    def curve(self) -> tuple[float | None, ...]:
        """Mean loss of each bin of gamma over the images since the last call."""
        found = bin_means(self.since_curve)
        self.since_curve.zero_()
        return found


def bin_means(sums: Tensor) -> tuple[float | None, ...]:
    """(bins, 2) sums and counts -> means, None where nothing was counted."""
    return tuple(total / count if count else None for total, count in sums.tolist())
