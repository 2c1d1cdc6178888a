"""Choosing by name from a plain table, with an error that teaches the names."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'NEAR'?)" with the nearest of the known names, or ''."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def choose(table: Mapping[str, T], name: str, kind: str) -> T:
    """The entry of `table` called `name`; `kind` says what it is in the error.

    Raises:
        ValueError: unknown name; lists the known ones and the nearest match.
    """
    if name in table:
        return table[name]
    raise ValueError(f"unknown {kind} '{name}'{did_you_mean(name, table)}; choose one of: {', '.join(table)}")


def build(table: Mapping[str, Callable[..., T]], spec: Mapping[str, Any], kind: str) -> T:
    """Call the entry that `spec` names with the rest of `spec` as its options: {"name": "cosine", "s": 0.008}.

    Raises:
        ValueError: no or unknown name, or an option that the entry does not have; lists the valid ones.
    """
    options = dict(spec)
    if "name" not in options:
        raise ValueError(f"{kind}: needs a name; choose one of: {', '.join(table)}")
    name = options.pop("name")
    make = choose(table, name, kind)
    valid = inspect.signature(make).parameters
    for option in options:
        if option not in valid:
            hint = did_you_mean(option, valid)
            raise ValueError(
                f"{kind} '{name}' has no option '{option}'{hint}; its options: {', '.join(valid) or 'none'}"
            )
    return make(**options)
