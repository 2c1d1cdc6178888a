"""What a network is told beside the noisy image and its noise level."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NO_LABEL = -1  # a row with this label is unconditional: the network adds nothing for it


@dataclass(frozen=True)
class Conditioning:
    """One row an image. A field is None where the whole batch goes without it.

    label: int64 (n,), class in 0..classes-1, or `NO_LABEL` for an unconditional row.
    """

    label: Tensor | None = None

    def __getitem__(self, rows: slice | Tensor) -> "Conditioning":
        """The rows of a sub-batch."""
        return Conditioning(label=None if self.label is None else self.label[rows])

    def unconditional(self) -> "Conditioning":
        """The same rows with nothing asked of them (classifier-free guidance, Ho & Salimans 2022)."""
        return Conditioning(label=None if self.label is None else torch.full_like(self.label, NO_LABEL))

    def to(self, device: torch.device | str) -> "Conditioning":
        return Conditioning(label=None if self.label is None else self.label.to(device))


def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """Row-wise join. All parts have a label or none has.

    Raises:
        ValueError: some parts have labels and others do not.
    """
    labels = [p.label for p in parts if p.label is not None]
    if not labels:
        return Conditioning()
    if len(labels) != len(parts):
        raise ValueError("cannot join conditionings with and without labels: use label -1 for unconditional rows")
    return Conditioning(label=torch.cat(labels))
