"""The source of a function as a syntax tree, if it is that of the function's code."""

from __future__ import annotations

import ast
import functools
import linecache
import types
from collections.abc import Iterator
from typing import Any


def source_of(function: types.FunctionType) -> tuple[ast.FunctionDef, list[str]] | None:
    """The syntax tree of a function and the lines of its file; None where the file does not hold its code any more."""
    code = function.__code__
    linecache.checkcache(code.co_filename)
    lines = linecache.getlines(code.co_filename, function.__globals__)
    parsed = _parsed("".join(lines), code.co_filename) if lines else None
    if parsed is None:
        return None
    tree, whole = parsed
    if not any(_same_code(code, other) for other in _nested(whole)):
        return None
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name and _first_line(node) == code.co_firstlineno
    ]
    return (found[0], lines) if len(found) == 1 else None


@functools.lru_cache(maxsize=32)
def _parsed(source: str, path: str) -> tuple[ast.Module, types.CodeType] | None:
    try:
        tree = ast.parse(source)
        return tree, compile(tree, path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return None


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


def _same_code(code: types.CodeType, other: types.CodeType) -> bool:
    def identity(c: types.CodeType) -> tuple[Any, ...]:
        constants = tuple(repr(k) for k in c.co_consts if not isinstance(k, types.CodeType))
        return c.co_name, c.co_firstlineno, c.co_code, c.co_names, c.co_varnames, c.co_freevars, constants

    return identity(code) == identity(other)


def _first_line(node: ast.FunctionDef) -> int:
    return node.decorator_list[0].lineno if node.decorator_list else node.lineno
