"""What the rules of the axis analysis share: their registry, broadcasting, and the axes that an op may mix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from smc_compile.passes.axes.axis_types import (
    BATCH,
    CHOSEN,
    KEY,
    OTHER,
    QUERY,
    REPEAT,
    Atom,
    Axes,
    Axis,
    Typing,
    expression,
    refuse,
)
from smc_compile.passes.fx_tools import op_name

Rule = Callable[[Typing, fx.Node], Any]
RULES: dict[str, Rule] = {}
MIXED = {QUERY: "positions", BATCH: "requests", KEY: "the positions that attention reads", CHOSEN: "the chosen keys"}
END = 2**62  # slices write "to the end" as a huge integer


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of these ops, by name."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def operand_axes(typing: Typing, value: fx.Node) -> list[Axis | None]:
    """Axes of an operand; for a token-free one None stands for an axis whose role its partner decides."""
    if typing.is_dependent(value):
        return list(typing.of(value))
    sizes = [expression(size) for size in value.meta["val"].shape]
    return [() if size == 1 else None for size in sizes]


def merge_axis(node: fx.Node, left: Axis | None, right: Axis | None) -> Axis | None:
    """The axis of a broadcast pair."""
    if left is None or right is None:
        return left if right is None else right
    if not left or not right or left == right:
        return left or right
    kinds = {atom.kind for atom in left + right}
    if kinds <= {OTHER, REPEAT}:  # a value that varies meets one that repeats: the result varies
        longer = left if len(left) >= len(right) else right
        return tuple(Atom(OTHER, atom.size) for atom in longer)
    if outline(left) == outline(right):
        return tuple(x if x == y else Atom(OTHER, x.size) for x, y in zip(left, right, strict=True))
    if QUERY in kinds and KEY in kinds:
        raise refuse(node, "a per-position value is combined with the positions that attention reads")
    raise refuse(node, f"axes {left} and {right} do not line up")


def outline(axis: Axis) -> Axis:
    """The axis with repeated factors written as varying ones."""
    return tuple(Atom(OTHER, atom.size) if atom.kind == REPEAT else atom for atom in axis)


def broadcast(typing: Typing, node: fx.Node, operands: Iterable[fx.Node]) -> Axes:
    """Right-aligned broadcasting of operands."""
    merged: list[Axis | None] = []
    free_sizes: list[Any] = []
    for operand in operands:
        axes = operand_axes(typing, operand)
        sizes = [expression(size) for size in operand.meta["val"].shape]
        missing = len(axes) - len(merged)
        merged = [()] * missing + merged
        free_sizes = [None] * missing + free_sizes
        for i in range(1, len(axes) + 1):
            if axes[-i] is None:
                free_sizes[-i] = sizes[-i]
            old = merged[-i]
            merged[-i] = axes[-i] if old == () else old if axes[-i] == () else merge_axis(node, old, axes[-i])
    return tuple(settle(typing, node, axis, size) for axis, size in zip(merged, free_sizes, strict=True))


def settle(typing: Typing, node: fx.Node, axis: Axis | None, size: Any) -> Axis:
    """An axis which only token-free operands have is plain, unless its size is a sequence length."""
    if axis is not None:
        return axis
    if size.free_symbols:
        raise refuse(node, "a table over positions meets a value without positions")
    return (Atom(OTHER, int(size)),)


def tensors(values: Iterable[Any]) -> list[fx.Node]:
    """The values that are nodes of tensors."""
    return [v for v in values if isinstance(v, fx.Node) and isinstance(v.meta.get("val"), torch.Tensor)]


def axis_index(dim: int, rank: int) -> int:
    return dim % rank if rank else 0


def require_plain(node: fx.Node, axis: Axis, keys_allowed: bool = False) -> None:
    """An op that mixes along an axis may do so only along one without positions or requests."""
    allowed = {OTHER, REPEAT} | ({KEY} if keys_allowed else set())
    for atom in axis:
        if atom.kind not in allowed:
            raise refuse(node, f"{op_name(node)} mixes {MIXED[atom.kind]}")


def dims_of(value: Any, rank: int) -> list[int]:
    """The axes that a ``dim`` argument names, counted from the front: one, several, or all for None and []."""
    if value is None or value == []:
        return list(range(rank))
    return [axis_index(d, rank) for d in (value if isinstance(value, (list, tuple)) else [value])]


def plain(size: int) -> Axis:
    """An axis of this size without positions or requests."""
    return () if size == 1 else (Atom(OTHER, size),)
