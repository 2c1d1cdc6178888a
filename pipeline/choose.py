"""Choosing by name from a plain table, with an error that teaches the names."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def choose(table: Mapping[str, T], name: str, kind: str) -> T:
    """The entry of `table` called `name`; `kind` says what it is in the error.

    Raises:
        ValueError: unknown name; lists the known ones and the nearest match.
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    raise ValueError(f"unknown {kind} '{name}'{hint}; choose one of: {', '.join(table)}")
