"""What a network is told beside the noisy image and its noise level."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

NO_LABEL = -1  # a row with this label is unconditional: the network adds nothing for it


@dataclass(frozen=True)
class Conditioning:
    """One row an image. A field is None where the whole batch goes without it.

    label: int64 (n,), class in 0..classes-1, or `NO_LABEL` for an unconditional row.
    augmentation: float32 (n, k), what was done to each training image, zeros for nothing (Karras et al. 2022, appendix
    F.2); None says the same. It describes the image and asks for nothing, so `unconditional` keeps it.
    """

    label: Tensor | None = None
    augmentation: Tensor | None = None

    def __getitem__(self, rows: slice | Tensor) -> "Conditioning":
        """The rows of a sub-batch."""
        return self._each(lambda t: t[rows])

    @property
    def told(self) -> tuple[bool, ...]:
        """Of each field whether the batch has it: only those that agree in it can be joined."""
        return self.label is not None, self.augmentation is not None

    def unconditional(self) -> "Conditioning":
        """The same rows with nothing asked of them (classifier-free guidance, Ho & Salimans 2022)."""
        return replace(self, label=None if self.label is None else torch.full_like(self.label, NO_LABEL))

    def to(self, device: torch.device | str) -> "Conditioning":
        return self._each(lambda t: t.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Conditioning(**{name: None if value is None else change(value) for name, value in values.items()})


def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """Row-wise join. All parts have a label or none has; the same of every other field.

    Raises:
        ValueError: some parts have labels and others do not.
    """
    joined: dict[str, Tensor] = {}
    for field in fields(Conditioning):
        values = [value for p in parts if (value := getattr(p, field.name)) is not None]
        if values and len(values) != len(parts):
            hint = ": use label -1 for unconditional rows" if field.name == "label" else ""
            raise ValueError(f"cannot join conditionings with and without {field.name}s{hint}")
        if values:
            joined[field.name] = torch.cat(values)
    return Conditioning(**joined)
