"""Guards that a tracer leaves where Python code branches on the length of the text."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator

import sympy
import torch
from torch.utils._sympy.printers import PythonPrinter

FURTHEST = 1 << 14  # how far lengths are tried one by one
LONGEST = 1 << 20  # no text is longer


def lengths_off(guard: sympy.Basic, symbol: sympy.Symbol, traced: int) -> Iterator[int]:
    """The lengths beyond ``traced`` at which a guard fails, in their order: texts of these take another path.

    ``S <= 9`` fails from 10 on, which is found by bisection; ``S != 9`` once, ``S % 7 != 0`` again and again: of such
    guards the lengths up to ``FURTHEST`` are tried.
    """
    holds = path_test(guard, symbol)
    if _is_linear(guard, symbol) and holds(traced + 1):
        first = bisect.bisect_left(range(LONGEST), True, lo=traced + 1, key=lambda length: not holds(length))
        return iter(range(first, LONGEST))
    return (length for length in range(traced + 1, FURTHEST) if not holds(length))


def path_test(guard: sympy.Basic, symbol: sympy.Symbol) -> Callable[[int], bool]:
    """Whether a text of so many tokens takes the path that was traced, as far as this guard knows.

    The guard becomes Python code: to put numbers into an expression of sympy takes a hundred times as long.
    """
    if guard.free_symbols != {symbol}:
        return lambda length: True
    try:
        code = PythonPrinter().doprint(guard)
        return eval(f"lambda {symbol.name}: bool({code})", {"math": math, "torch": torch})
    except (TypeError, NotImplementedError, SyntaxError):  # some functions have no Python code
        return lambda length: guard.xreplace({symbol: sympy.Integer(length)}) != sympy.false


def _is_linear(guard: sympy.Basic, symbol: sympy.Symbol) -> bool:
    """Whether a guard holds up to a length or from one on."""
    if not isinstance(guard, sympy.Le | sympy.Lt | sympy.Ge | sympy.Gt):
        return False
    difference = guard.lhs - guard.rhs
    return bool(difference.is_polynomial(symbol)) and sympy.degree(difference, symbol) <= 1
