"""The options of a procedure are its keyword-only parameters; here they are read from its signature."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

GIVEN = ("pixels", "process")  # what the model gives a procedure, not its user


def options_of(procedure: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What a user may set, by name."""
    parameters = inspect.signature(procedure).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in GIVEN}


def with_defaults(known: Mapping[str, inspect.Parameter], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options given, and the default of every other."""
    return {name: p.default for name, p in known.items()} | dict(given)
