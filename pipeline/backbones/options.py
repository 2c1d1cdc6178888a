"""Checks what a run file puts into a network's configuration."""

import math
from typing import Any, Literal, get_args, get_origin, get_type_hints


def settle(config: Any) -> None:
    """Check each field of a frozen dataclass against its type; a list becomes a tuple, an int for a float a float.

    Raises:
        ValueError: naming the field, what it got and what it takes.
    """
    for name, annotation in get_type_hints(type(config)).items():
        value = getattr(config, name)
        settled = _settled(value, annotation)
        if settled is _WRONG:
            raise ValueError(f"{name} is {value!r}; it takes {_described(annotation)}")
        object.__setattr__(config, name, settled)


_WRONG = object()


def _settled(value: Any, annotation: Any) -> Any:
    """`value` as the annotated type, or `_WRONG`. Types: bool, int, float, None, unions, literals, tuple[T, ...]."""
    if get_origin(annotation) is Literal:
        return value if isinstance(value, str) and value in get_args(annotation) else _WRONG
    if get_origin(annotation) is tuple:
        items = (
            [_settled(item, get_args(annotation)[0]) for item in value] if isinstance(value, list | tuple) else [_WRONG]
        )
        return _WRONG if any(item is _WRONG for item in items) else tuple(items)
    if get_args(annotation):
        results = [_settled(value, part) for part in get_args(annotation)]
        return next((result for result in results if result is not _WRONG), _WRONG)
    if annotation is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else _WRONG
    return value if type(value) is annotation else _WRONG


def _described(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"a list of {_described(get_args(annotation)[0])}s".replace("a whole", "whole").replace(
            "a finite", "finite"
        )
    if get_args(annotation):
        return " or ".join(_described(part) for part in get_args(annotation))
    known = {int: "a whole number", float: "a finite number", bool: "true or false", type(None): "null"}
    return known.get(annotation, str(annotation))


def at_least(config: Any, least: float, *names: str) -> None:
    """Raises ValueError where a named field (not None) is below `least`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; at least {least:g} is needed")


def positive(config: Any, *names: str) -> None:
    """Raises ValueError where a named field is not above 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} is {getattr(config, name)}; a number above 0 is needed")


def probability(config: Any, *names: str) -> None:
    """Raises ValueError where a named field is outside [0, 1)."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; 0 <= {name} < 1 is needed")
