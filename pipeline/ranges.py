"""What a number may be, declared beside its type: `steps: Annotated[int, "levels to query", Range(ge=1)] = 18`.

The same for a field of the run file and for an option of a sampler, an estimator or a network.
"""

from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """The numbers x with ge <= x <= le and gt < x < lt; nan is in none. Of a sequence each number is meant."""

    ge: float | None = None
    le: float | None = None
    gt: float | None = None
    lt: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            value == value
            and (self.ge is None or value >= self.ge)
            and (self.le is None or value <= self.le)
            and (self.gt is None or value > self.gt)
            and (self.lt is None or value < self.lt)
        )

    def __str__(self) -> str:
        """As it stands in an error and in the help: "at least 1", "0 or more", "in [0, 1)"."""
        low, high = self.gt if self.ge is None else self.ge, self.lt if self.le is None else self.le
        if low is not None and high is not None:
            return f"in {'(' if self.ge is None else '['}{low:g}, {high:g}{')' if self.le is None else ']'}"
        if low is None:
            return f"below {high:g}" if self.le is None else f"at most {high:g}"
        if low == 0:
            return "positive" if self.ge is None else "0 or more"
        return f"above {low:g}" if self.ge is None else f"at least {low:g}"


def range_of(annotation: Any) -> Range | None:
    """The one that stands beside a type."""
    if get_origin(annotation) is not Annotated:
        return None
    return next((each for each in get_args(annotation)[1:] if isinstance(each, Range)), None)


@cache
def _declared(cls: type) -> dict[str, tuple[Range, str]]:
    """Of each field that has a range: the range, and what else may stand there."""
    hints = get_type_hints(cls, include_extras=True)
    found: dict[str, tuple[Range, str]] = {}
    for field in fields(cls):
        if (allowed := range_of(hints[field.name])) is not None:
            found[field.name] = allowed, " or null" if type(None) in get_args(get_args(hints[field.name])[0]) else ""
    return found


def check(config: Any, section: str = "") -> None:
    """For a dataclass, when it is made.

    Raises:
        ValueError: a field has a number, or a sequence with one, outside its declared range; names the key.
    """
    for name, (allowed, other) in _declared(type(config)).items():
        value = getattr(config, name)
        numbers = value if isinstance(value, tuple | list) else (value,)
        if any(isinstance(number, int | float) and number not in allowed for number in numbers):
            key = f"{section}.{name}" if section else name
            verb = "lie" if str(allowed).startswith("in ") else "be"
            got = list(value) if isinstance(value, tuple) else value
            raise ValueError(f"{key} must {verb} {allowed}{other}, got {got}")
