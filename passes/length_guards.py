"""Guards that a tracer leaves where Python code branches on the length of the text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import sympy
import torch
from torch.utils._sympy.printers import PythonPrinter

FURTHEST = 1 << 14  # how far beyond the traced length a guard that is no bound is tried


def is_bound(guard: sympy.Basic, symbol: sympy.Symbol) -> bool:
    """Whether a guard holds up to a length or from one on: a linear inequality."""
    ordered = isinstance(guard, sympy.Le | sympy.Lt | sympy.Ge | sympy.Gt)
    return ordered and bool((guard.lhs - guard.rhs).is_polynomial(symbol))


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


def lengths_off(guard: sympy.Basic, symbol: sympy.Symbol, traced: int) -> Iterator[int]:
    """The lengths beyond ``traced`` at which a guard fails that is no bound, in their order.

    ``S != 9`` fails once, ``S % 7 != 0`` again and again: lengths are tried past every number that the guard names, and
    once around its period, at most the product of its numbers.
    """
    parts = (part for number in guard.atoms(sympy.Rational) for part in (abs(number.p), number.q))
    numbers = [part for part in parts if part > 1]
    holds, last = path_test(guard, symbol), traced + min(sum(numbers) + math.prod(numbers) + 2, FURTHEST)
    tried = itertools.count(traced + 1)
    return (length for length in itertools.takewhile(lambda n: n <= last, tried) if not holds(length))
