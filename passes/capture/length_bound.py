"""A bound on the length that the tracer does not see: ``max(0, c - S)`` in a size, where longer texts do not fit.

A table of c entries that is read from its end, ``table[:, max(0, c - S):]``, meets values over S positions. Above c
positions the two do not broadcast, so that S is at most c, and the size is ``c - S``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from smc_compile.passes.axes.axis_types import expression
from smc_compile.passes.ir import CausalLM


def bound_length(lm: CausalLM) -> CausalLM:
    """The model with the bound in ``max_positions``, and the sizes in its values rewritten as they are below it."""
    graph, length = lm.graph, lm.ids.meta["val"].shape[1]
    symbol = length.node.expr
    sizes = {size for node in graph.nodes for size in _sizes(node) if _largest(size)}
    bounds = [c for c in sorted(_turning_points(sizes, symbol)) if not _fits(graph, symbol, (c + 1, 2 * c + 3))]
    if not bounds:
        return lm
    rules = {term: _below(term, symbol, bounds[0]) for size in sizes for term in _largest(size)}
    for node in graph.nodes:
        if any(size in sizes for size in _sizes(node)):
            node.meta["val"] = _rewritten(node.meta["val"], rules, length)
    return replace(lm, max_positions=min(bounds[0], lm.max_positions or bounds[0]))


def _sizes(node: fx.Node) -> list[sympy.Expr]:
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        return [expression(value)]
    return [expression(size) for size in value.shape] if isinstance(value, torch.Tensor) else []


def _largest(size: sympy.Expr) -> list[sympy.Expr]:
    """The terms ``Max(0, ...)``; the tracer has a class of its own for them."""
    return [term for term in sympy.preorder_traversal(size) if type(term).__name__ == "Max" and 0 in term.args]


def _turning_points(sizes: Iterable[sympy.Expr], symbol: sympy.Symbol) -> set[int]:
    """Every c of a term ``Max(0, c - S)``."""
    terms = {arg for size in sizes for term in _largest(size) for arg in term.args if arg.has(symbol)}
    return {int(arg + symbol) for arg in terms if (arg + symbol).is_Integer and arg + symbol > 1}


def _fits(graph: fx.Graph, symbol: sympy.Symbol, lengths: Iterable[int]) -> bool:
    """Whether the operands of every pointwise op broadcast at one of these lengths."""
    return any(all(_broadcasts(node, symbol, length) for node in graph.nodes) for length in lengths)


def _broadcasts(node: fx.Node, symbol: sympy.Symbol, length: int) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.pointwise not in node.target.tags:
        return True
    shapes = [[size.subs(symbol, length) for size in _sizes(source)[::-1]] for source in node.all_input_nodes]
    return all(len(set(sizes) - {1}) <= 1 for sizes in zip_longest(*shapes, fillvalue=sympy.Integer(1)))


def _below(term: sympy.Expr, symbol: sympy.Symbol, bound: int) -> sympy.Expr:
    """``Max(0, x)`` for lengths from 1 to ``bound``, if x has one sign there."""
    (rest,) = (arg for arg in term.args if arg != 0) if len(term.args) == 2 else (None,)
    ends = [rest.subs(symbol, s) for s in (1, bound)] if rest is not None and rest.is_polynomial(symbol) else []
    if not ends or sympy.degree(rest, symbol) > 1:
        return term
    return rest if min(ends) >= 0 else sympy.Integer(0) if max(ends) <= 0 else term


def _rewritten(value: Any, rules: dict[sympy.Expr, sympy.Expr], length: torch.SymInt) -> Any:
    """A size, or a tensor without data, with its sizes rewritten."""
    if isinstance(value, FakeTensor):
        with value.fake_mode:
            shape = [_rewritten(size, rules, length) for size in value.shape]
            return torch.empty(shape, dtype=value.dtype, device=value.device)
    if not isinstance(value, torch.SymInt):
        return value
    size = sympy.expand(expression(value).xreplace(rules))
    if size.is_Integer:
        return int(size)
    hint = int(size.subs(length.node.expr, length.node.hint))
    return length.node.shape_env.create_symintnode(size, hint=hint)
