"""What a request comes to: its value and what it took, or why it has none."""

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


class EngineBusy(RuntimeError):
    """More work is queued than the engine may hold. `retry_after_s`: when about half of it will be done."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineClosed(RuntimeError):
    """The engine takes no more requests, or stopped before this one was done."""


class DeadlineExceeded(TimeoutError):
    """A request's deadline passed before its end; says after how many evaluations."""


class NotFinite(ArithmeticError):
    """The network answered a request with NaN or infinity; says at which evaluation."""


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What a request came to.

    evaluations: queries answered, one after the other; row_evaluations: network rows they had together (its cost);
    queued_s: from submission to its start, run_s: from its start to its end, seconds.
    """

    value: T
    evaluations: int
    row_evaluations: int
    queued_s: float
    run_s: float
