"""Guards that a tracer leaves where Python code branches on the length of the text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import sympy

FURTHEST = 1 << 14  # how far beyond the traced length a guard that is no bound is tried


def is_bound(guard: sympy.Basic, symbol: sympy.Symbol) -> bool:
    """Whether a guard holds up to a length or from one on: a linear inequality."""
    ordered = isinstance(guard, sympy.Le | sympy.Lt | sympy.Ge | sympy.Gt)
    return ordered and bool((guard.lhs - guard.rhs).is_polynomial(symbol))


def holds(guard: sympy.Basic, symbol: sympy.Symbol, length: int) -> bool:
    """Whether a text of so many tokens takes the path that was traced, as far as this guard knows."""
    return guard.xreplace({symbol: sympy.Integer(length)}) != sympy.false


def lengths_off(guard: sympy.Basic, symbol: sympy.Symbol, traced: int) -> Iterator[int]:
    """The lengths beyond ``traced`` at which a guard fails that is no bound, in their order.

    ``S != 9`` fails once, ``S % 7 != 0`` again and again: lengths are tried past every number that the guard names, and
    once around its period, at most the product of its numbers.
    """
    parts = (part for number in guard.atoms(sympy.Rational) for part in (abs(number.p), number.q))
    numbers = [part for part in parts if part > 1]
    tried = itertools.count(traced + 1)
    last = traced + min(sum(numbers) + math.prod(numbers) + 2, FURTHEST)
    return (length for length in itertools.takewhile(lambda n: n <= last, tried) if not holds(guard, symbol, length))
