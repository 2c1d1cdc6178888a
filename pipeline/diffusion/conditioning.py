"""What a network is told beside the noisy image and its noise level."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

NO_LABEL = -1  # a row with this label is unconditional: the network adds nothing for it
NULL = {"label": NO_LABEL, "tags": 0}  # of each field that asks for something: the value that asks for nothing


@dataclass(frozen=True)
class Conditioning:
    """One row an image. A field is None where the whole batch goes without it.

    label: int64 (n,), class in 0..classes-1, or `NO_LABEL` for an unconditional row.
    tags: float32 (n, K), 1 where the image has the tag, else 0; a row of zeros is unconditional.
    augmentation: float32 (n, k), what was done to each training image, zeros for nothing (Karras et al. 2022, appendix
    F.2); None says the same. It describes the image and asks for nothing, so `unconditional` keeps it.
    """

    label: Tensor | None = None
    augmentation: Tensor | None = None
    tags: Tensor | None = None

    def __getitem__(self, rows: slice | Tensor) -> "Conditioning":
        """The rows of a sub-batch."""
        return self._each(lambda t: t[rows])

    @property
    def told(self) -> tuple[bool, ...]:
        """Of each field whether the batch has it: only those that agree in it can be joined."""
        return tuple(getattr(self, field.name) is not None for field in fields(self))

    @property
    def asks(self) -> bool:
        """Whether anything is asked for, in any row: what guidance has a direction from."""
        return any(getattr(self, name) is not None for name in NULL)

    @property
    def rows(self) -> int:
        """How many images are described; 0 where nothing is said of any."""
        return next((len(told) for f in fields(self) if (told := getattr(self, f.name)) is not None), 0)

    def unconditional(self) -> "Conditioning":
        """The same rows with nothing asked of them (classifier-free guidance, Ho & Salimans 2022)."""
        null = {name: torch.full_like(told, NULL[name]) for name in NULL if (told := getattr(self, name)) is not None}
        return replace(self, **null)

    def dropped(self, rows: Tensor) -> "Conditioning":
        """Rows (n,) bool become unconditional, the others stay."""

        def where(name: str, told: Tensor) -> Tensor:
            return told.masked_fill(rows.to(told.device).view(-1, *[1] * (told.ndim - 1)), NULL[name])

        null = {name: where(name, told) for name in NULL if (told := getattr(self, name)) is not None}
        return replace(self, **null)

    def same(self, other: "Conditioning") -> bool:
        """Whether the same is said of the same rows."""
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)

    def to(self, device: torch.device | str) -> "Conditioning":
        return self._each(lambda t: t.to(device, non_blocking=True))

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
