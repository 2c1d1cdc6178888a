"""Formulas that a user writes in a run file or a request: plain arithmetic over named tensors, nothing else.

Python's grammar, of which only numbers, the given names, + - * / ** and the functions below are let through: text is
parsed, never evaluated as code.
"""

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

LONGEST = 200  # characters

CONSTANTS = {"pi": math.pi, "e": math.e}

# what a formula may call, and with how many values
FUNCTIONS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "exp": (1, torch.exp),
    "log": (1, torch.log),
    "sqrt": (1, torch.sqrt),
    "abs": (1, torch.abs),
    "sin": (1, torch.sin),
    "cos": (1, torch.cos),
    "tanh": (1, torch.tanh),
    "sigmoid": (1, torch.sigmoid),
    "min": (2, torch.minimum),
    "max": (2, torch.maximum),
}

OPERATORS: dict[type[ast.operator], Callable[[Tensor, Tensor], Tensor]] = {
    ast.Add: torch.add,
    ast.Sub: torch.sub,
    ast.Mult: torch.mul,
    ast.Div: torch.div,
    ast.Pow: torch.pow,
}


@dataclass(frozen=True)
class Formula:
    """`text` as a function of the tensors called `names`; float64 throughout. `what` names it in errors.

    Raises:
        ValueError: not a formula of these names, or longer than 200 characters; says what may stand in one.
    """

    text: str
    names: tuple[str, ...]
    what: str

    def __post_init__(self) -> None:
        _check(self._tree, self)

    @cached_property
    def _tree(self) -> ast.expr:
        if not (self.text.isascii() and self.text.isprintable() and 0 < len(self.text.strip()) <= len(self.text)):
            raise self.refused("it must be plain printable text")
        if len(self.text) > LONGEST:
            raise self.refused(f"it has {len(self.text)} characters, at most {LONGEST} are allowed")
        try:
            return ast.parse(self.text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise self.refused("it is not arithmetic") from None

    def refused(self, reason: str) -> ValueError:
        return ValueError(
            f"{self.what} {self.text[:LONGEST]!r}: {reason}. A formula has numbers, the names "
            f"{', '.join([*self.names, *CONSTANTS])}, + - * / ** and the functions {', '.join(FUNCTIONS)}"
        )

    def __call__(self, values: Mapping[str, Tensor]) -> Tensor:
        """The value for tensors of one shape, float64; a formula without a name gives that shape too."""
        like = next(iter(values.values())).double()
        return _value(self._tree, {name: value.double() for name, value in values.items()}, like)

    def nonnegative(self, values: Mapping[str, Tensor]) -> Tensor:
        """As `__call__`.

        Raises:
            ValueError: negative or not finite somewhere, naming where.
        """
        result = self(values)
        bad = ~(torch.isfinite(result) & (result >= 0))
        if bool(bad.any()):
            where = ", ".join(f"{name} = {float(values[name][bad][0]):.6g}" for name in self.names)
            raise self.refused(f"it must be finite and at least 0, and is {float(result[bad][0]):.6g} at {where}")
        return result


def _check(node: ast.expr, formula: Formula) -> None:
    """Refuses every kind of node but arithmetic."""
    parts: Sequence[ast.expr] = ()
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool) and abs(number) < 1e300:
            pass
        case ast.Name(id=name) if name in formula.names or name in CONSTANTS:
            pass
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
            parts = (operand,)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            parts = (left, right)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
            if len(args) != FUNCTIONS[name][0]:
                raise formula.refused(f"{name} takes {FUNCTIONS[name][0]} values, got {len(args)}")
            parts = args
        case _:
            raise formula.refused(f"'{ast.unparse(node)[:64]}' is not allowed in it")
    for part in parts:
        _check(part, formula)


def _value(node: ast.expr, values: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """Of a checked tree."""
    match node:
        case ast.Constant(value=int() | float() as number):
            return torch.full_like(like, float(number))
        case ast.Name(id=name):
            return values[name] if name in values else torch.full_like(like, CONSTANTS[name])
        case ast.UnaryOp(op=op, operand=operand):
            value = _value(operand, values, like)
            return -value if isinstance(op, ast.USub) else value
        case ast.BinOp(left=left, op=op, right=right):
            return OPERATORS[type(op)](_value(left, values, like), _value(right, values, like))
        case ast.Call(func=ast.Name(id=name), args=args):
            return FUNCTIONS[name][1](*(_value(part, values, like) for part in args))
        case _:
            raise AssertionError(f"{ast.dump(node)} passed the check of a formula")
