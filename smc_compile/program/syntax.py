"""Questions to statements and expressions of Python source."""

from __future__ import annotations

import ast
from collections.abc import Set


def is_sum(node: ast.expr, bent: Set[str]) -> bool:
    """Whether a number is a sum or difference of numbers and sizes; names in ``bent`` are none."""
    match node:
        case ast.Name(id=name):
            return name not in bent
        case ast.Constant() | ast.Attribute() | ast.Subscript():
            return True
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub(), right=right):
            return is_sum(left, bent) and is_sum(right, bent)
        case ast.Call(func=ast.Attribute(attr="size")) | ast.Call(func=ast.Name(id="len" | "int")):
            return not any(isinstance(inner, ast.Name) and inner.id in bent for inner in ast.walk(node))
        case _:
            return False


def names_stored(node: ast.AST) -> set[str]:
    """The names that a statement assigns, or whose objects it writes to by a method or an entry."""
    found = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return found


def pairs_of(target: ast.expr, source: ast.expr) -> list[tuple[ast.expr, ast.expr]]:
    """The single assignments that ``a, b = x, y`` stands for; none of any other."""
    if not isinstance(target, ast.Tuple) or not isinstance(source, ast.Tuple) or len(target.elts) != len(source.elts):
        return []
    starred = any(isinstance(part, ast.Starred) for part in (*target.elts, *source.elts))
    return [] if starred else list(zip(target.elts, source.elts, strict=True))


def number(node: ast.expr | None) -> int | None:
    """An integer that is written out."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = number(node.operand)
        return None if inner is None else -inner
    return node.value if isinstance(node, ast.Constant) and type(node.value) is int else None


def is_last(place: ast.Slice) -> bool:
    return place.upper is None and number(place.lower) == -1


def is_whole(place: ast.expr) -> bool:
    return isinstance(place, ast.Constant) and place.value in (None, ...)
