"""At which lengths a guard of the tracer fails."""

from __future__ import annotations

import itertools

import pytest
import sympy

from smc_compile.passes.length_guards import lengths_off

S = sympy.Symbol("s", integer=True, positive=True)


@pytest.mark.parametrize(
    ("guard", "off"),
    [
        (sympy.Ne(S, 9), [9]),
        (sympy.Ne(S + 3, 9), []),
        (sympy.Ne(sympy.Mod(S, 5), 0), [10, 15]),
        (sympy.Eq(sympy.Mod(S, 2), 1), [8, 10]),
        (sympy.Ne(S, 5000), [5000]),
        (S <= 9, [10, 11]),
        (3 * S + 2 < 20000, [6666, 6667]),
        (S <= 100_000, [100_001, 100_002]),
        (2 * S >= 4, []),
        (S >= 10, [8, 9]),
        ((S - 12) ** 2 > 4, [10, 11]),
        (0.1 * S <= 1.05, [11, 12]),
        (sympy.Ne(sympy.Mod(sympy.floor(S / 20), 10), 9), [180, 181]),
    ],
)
def test_lengths_beyond_the_traced_one(guard: sympy.Basic, off: list[int]) -> None:
    assert list(itertools.islice(lengths_off(guard, S, 7), 2)) == off


def test_guards_without_python_code_are_tried_too() -> None:
    assert next(lengths_off(sympy.Ne(2**S, 512), S, 7)) == 9


def test_guards_on_other_sizes_say_nothing_of_the_length() -> None:
    assert not list(lengths_off(sympy.Ne(S, sympy.Symbol("n", integer=True) + 8), S, 7))
