"""What a model is told beside the noisy image: the one place that turns batches and requests into `Conditioning`.

A kind of condition is one row of `KINDS` here and one consumer in a network. Everyone else (training, evaluation,
offline sampling, the endpoint) passes `Conditioning` on and never looks into it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.choose import choose
from pipeline.diffusion.conditioning import NO_LABEL, Conditioning


class ConditionError(ValueError):
    """What is asked of images cannot be; field: that of the request which says it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class Told(Protocol):
    """What a batch of the stream, or images of a split, say of each image."""

    @property
    def labels(self) -> Tensor | None: ...
    @property
    def tags(self) -> Tensor | None: ...


def _labels_of(told: Told) -> Tensor | None:
    return told.labels


def _tags_of(told: Told) -> Tensor | None:
    return None if told.tags is None else told.tags.float()


def _labels_asked(value: Any, n: int, names: Sequence[str]) -> Tensor:
    """One class for all images or one each: a number, -1 for none."""
    label = torch.as_tensor(value)
    if label.dtype != torch.int64:
        raise ConditionError("labels", f"labels must be whole numbers, got {value!r}")
    label = label.expand(n) if label.ndim == 0 else label
    if label.shape != (n,):
        raise ConditionError("labels", f"labels: one, or one for each of the {n} images, got {label.numel()}")
    if n and not (int(label.min()) >= NO_LABEL and int(label.max()) < len(names)):
        shown = label.tolist()[:8]
        raise ConditionError("labels", f"labels must lie in 0..{len(names) - 1}, or be -1 for no class; got {shown}")
    return label.clone()


def _tags_asked(value: Any, n: int, names: Sequence[str]) -> Tensor:
    """Tags of all images, ["red", "round"], or of each, [["red"], []]; by name or number."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ConditionError("tags", f"tags must be a list of names, or one list an image, got {value!r}")
    each = (
        list(value)
        if value and all(isinstance(item, Sequence) and not isinstance(item, str) for item in value)
        else [value] * n
    )
    if len(each) != n:
        raise ConditionError("tags", f"tags: one list, or one for each of the {n} images, got {len(each)}")
    place, rows = {name: index for index, name in enumerate(names)}, torch.zeros(n, len(names))
    for row, asked in enumerate(each):
        for tag in asked:
            index = place.get(
                tag, tag if isinstance(tag, int) and not isinstance(tag, bool) and 0 <= tag < len(names) else None
            )
            if index is None:
                raise ConditionError("tags", f"tags: this model knows no tag {tag!r}; it knows {_shown(names)}")
            rows[row, index] = 1
    return rows


def place_of(prompt: str, names: Sequence[str]) -> int | None:
    """The class or tag that a prompt names: as it stands, or but for case and outer spaces where that is one alone, or
    by number."""
    wanted = prompt.strip()
    for same in (lambda name: name == prompt, lambda name: name.strip() == wanted):
        if found := [index for index, name in enumerate(names) if same(name)]:
            return found[0]
    found = [index for index, name in enumerate(names) if name.strip().casefold() == wanted.casefold()]
    if len(found) == 1:
        return found[0]
    number = wanted.isascii() and wanted.isdigit() and len(wanted) <= 9
    return int(wanted) if number and int(wanted) < len(names) else None


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


@dataclass(frozen=True)
class Kind:
    """A kind of condition.

    asked_as: the field of a request, of `Model.sample` and of the command line. kept_as: the field of `Conditioning`.
    of: what a batch says of its images. asked: (value, n, names) -> a row an image, ValueError where it cannot be.
    turn: what image i of a grid is asked for. echo: a row -> the fields of an answer that say what was asked.
    nothing: (n, names) -> n rows that ask for nothing. several: whether an image may be asked for more than one name.
    names_in: where a model's card keeps the names.
    """

    asked_as: str
    kept_as: str
    of: Callable[[Told], Tensor | None]
    asked: Callable[[Any, int, Sequence[str]], Tensor]
    turn: Callable[[int, Sequence[str]], Any]
    echo: Callable[[Tensor, Sequence[str]], dict[str, Any]]
    nothing: Callable[[int, Sequence[str]], Tensor]
    several: bool
    names_in: str


KINDS: dict[str, Kind] = {
    "labels": Kind(
        "labels",
        "label",
        _labels_of,
        _labels_asked,
        lambda i, names: i % len(names),
        lambda row, _: {"label": int(row)},
        lambda n, _: torch.full((n,), NO_LABEL),
        several=False,
        names_in="class_names",
    ),
    "tags": Kind(
        "tags",
        "tags",
        _tags_of,
        _tags_asked,
        lambda i, names: [names[i % len(names)]],
        lambda row, names: {"tags": [names[k] for k in row.nonzero()[:, 0].tolist()]},
        lambda n, names: torch.zeros(n, len(names)),
        several=True,
        names_in="tag_names",
    ),
}

NAMES_OF = {name: kind.names_in for name, kind in KINDS.items()}


@dataclass(frozen=True)
class Conditioner:
    """What a model is told. condition: a name of KINDS. names: of its classes or tags; without
    names it is told nothing."""

    condition: str
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        choose(KINDS, self.condition, "condition")

    @property
    def kind(self) -> Kind:
        return KINDS[self.condition]

    def of(self, told: Told) -> Conditioning:
        """What a batch, or images of a split, say of each image.

        Raises:
            ValueError: they do not say what this model is told.
        """
        if not self.names:
            return Conditioning()
        row = self.kind.of(told)
        if row is None:
            raise ValueError(
                f"the model is told {self.condition} and the images have none: shard them with {self.condition}"
            )
        return Conditioning(**{self.kind.kept_as: row})

    def asked(self, n: int, fields: Mapping[str, Any]) -> Conditioning:
        """What a request asks of n images; a field that is None or absent asks for nothing.

        Raises:
            ConditionError: a field that this model is not told, a wrong count, a name or number that it does not know.
        """
        given = {name: value for name, value in fields.items() if value is not None}
        for name, value in given.items():
            if name != self.kind.asked_as or not self.names:
                if name == "labels" and not self.names and _no_class(value):
                    continue
                known = f"it is told {self.kind.asked_as}" if self.names else "it is told nothing"
                what = "this model has no classes" if name == "labels" else f"this model is not told {name}"
                raise ConditionError(name, f"{name}: {what}; {known}")
        if not self.names:
            return Conditioning()
        value = given.get(self.kind.asked_as)
        if value is None:
            return self.nothing(n)
        return Conditioning(**{self.kind.kept_as: self.kind.asked(value, n, self.names)})

    def prompted(self, n: int, prompt: str) -> Conditioning:
        """What a text asks of all n images: one class by name or number, or tags with commas between them.

        Raises:
            ConditionError: a model that is told nothing, or a name that it does not know.
        """
        if not self.names:
            raise ConditionError("prompt", "this model has no classes: leave the prompt empty")
        several = self.kind.several
        parts = prompt.split(",") if several else [prompt]
        places = [place_of(part, self.names) for part in parts]
        if None in places:
            what = "tags, with commas between them" if several else "a class"
            raise ConditionError(
                "prompt", f"the prompt must be the name or number of {what} ({_shown(self.names)}), or empty"
            )
        return self.asked(n, {self.kind.asked_as: places if several else places[0]})

    def nothing(self, n: int) -> Conditioning:
        """n rows that ask for nothing."""
        if not self.names:
            return Conditioning()
        return Conditioning(**{self.kind.kept_as: self.kind.nothing(n, self.names)})

    def in_turn(self, numbers: Sequence[int]) -> Conditioning:
        """What the images of these numbers of a grid are asked for: every class or tag in turn."""
        if not self.names:
            return Conditioning()
        return self.asked(len(numbers), {self.kind.asked_as: [self.kind.turn(i, self.names) for i in numbers]})

    def echo(self, conditioning: Conditioning, row: int) -> dict[str, Any]:
        """What was asked of an image, as an answer says it; {"label": -1} of a model that is told nothing."""
        told = getattr(conditioning, self.kind.kept_as)
        if told is None:
            return {"label": NO_LABEL}
        return self.kind.echo(told[row].cpu(), self.names)


def numbered(condition: str, count: int) -> Conditioner:
    """Of a model whose classes or tags have no names yet: their numbers."""
    return Conditioner(condition, tuple(map(str, range(count))))


def _no_class(value: Any) -> bool:
    """Whether labels ask for no class, which a model without classes may be asked for too."""
    return all(int(label) < 0 for label in torch.as_tensor(value).reshape(-1).tolist())
