"""Height and width of an image: one number where they are the same, else (height, width)."""

from typing import Any

Size = int | tuple[int, int]


def sides(size: Size) -> tuple[int, int]:
    """(height, width)."""
    return (size, size) if isinstance(size, int) else size


def settled(size: Any, name: str = "size") -> Size:
    """The one form of a size: a square's is an int, so that 64 and [64, 64] are the same to every digest.

    Raises:
        ValueError: no whole numbers of at least 1; `name` says whose they are.
    """
    given: tuple[Any, ...] = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(given) != 2 or any(type(side) is not int or side < 1 for side in given):
        raise ValueError(
            f"{name} is {size!r}; a whole number of at least 1 is needed, or [height, width] of an image that is not "
            f"square"
        )
    return given[0] if given[0] == given[1] else (given[0], given[1])


def shown(size: Size) -> str:
    """WIDTHxHEIGHT, as a request and a file say it."""
    height, width = sides(size)
    return f"{width}x{height}"
