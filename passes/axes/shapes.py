"""Axes through ops that move, merge, part and repeat them."""

from __future__ import annotations

from typing import Any

from torch import fx

from smc_compile.passes.axes.axis_types import (
    BATCH,
    KEY,
    OTHER,
    QUERY,
    REPEAT,
    Atom,
    Axes,
    Axis,
    K,
    Q,
    Typing,
    expression,
    refuse,
    split_atoms,
)
from smc_compile.passes.axes.helpers import axis_index, broadcast, dims_of, plain, rule
from smc_compile.passes.axes.selections import require_sliceable
from smc_compile.passes.fx_tools import arguments, op_name


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "_reshape_alias", "view_copy")
def view(typing: Typing, node: fx.Node) -> Axes:
    source = typing.of(arguments(node)["input"])
    sizes = _sizes(node)
    axes = split_atoms([atom for axis in source for atom in axis], sizes, typing)
    if axes is None:
        raise refuse(node, f"a reshape to {sizes} cuts across positions")
    return tuple(axes)


@rule("expand", "expand_as", "broadcast_to")
def expand(typing: Typing, node: fx.Node) -> Axes:
    source = typing.of(node.args[0])
    sizes = _sizes(node)
    source = ((),) * (len(sizes) - len(source)) + source
    spread = [i for i, axis in enumerate(source) if not axis and sizes[i] == typing.length]
    if spread and (Q,) in source:
        return _spread(typing, node, source, spread)
    return tuple(axis or _repeated(node, size) for axis, size in zip(source, sizes, strict=True))


def _spread(typing: Typing, node: fx.Node, source: Axes, spread: list[int]) -> Axes:
    """A value per position, shown to each query: its positions become keys, as those of a product's right side do."""
    known = {BATCH, QUERY, OTHER}
    if len(spread) != 1 or any(len(axis) > 1 or {atom.kind for atom in axis} - known for axis in source):
        raise refuse(node, "a value is expanded over positions")
    typing.attention[node] = "spread"
    axes = [(K,) if axis == (Q,) else axis for axis in source]
    axes[spread[0]] = (Q,)
    return tuple(axis or _repeated(node, size) for axis, size in zip(axes, _sizes(node), strict=True))


def _sizes(node: fx.Node) -> list[Any]:
    return [expression(size) for size in node.meta["val"].shape]


def _repeated(node: fx.Node, size: Any) -> Axis:
    if size.free_symbols:
        raise refuse(node, "a value is expanded over positions")
    return () if size == 1 else (Atom(REPEAT, int(size)),)


@rule("repeat_interleave")
def repeat_interleave(typing: Typing, node: fx.Node) -> Axes:
    bound = arguments(node)
    source = list(typing.of(bound["input"]))
    if not isinstance(bound["repeats"], int) or bound["dim"] is None:
        raise refuse(node, "repeat_interleave with a tensor of repeats, or without dim")
    d = axis_index(bound["dim"], len(source))
    if any(atom.kind == KEY for atom in source[d]):
        raise refuse(node, "the positions that attention reads are repeated")
    source[d] = source[d] + _repeated(node, expression(bound["repeats"]))
    return tuple(source)


@rule("repeat")
def repeat(typing: Typing, node: fx.Node) -> Axes:
    source, repeats = typing.of(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
    source = ((),) * (len(repeats) - len(source)) + source
    for axis, count in zip(source, repeats, strict=True):
        if count != 1 and any(atom.kind == KEY for atom in axis):
            raise refuse(node, "the positions that attention reads are repeated")
    return tuple(_repeated(node, expression(count)) + axis for axis, count in zip(source, repeats, strict=True))


@rule("permute")
def permute(typing: Typing, node: fx.Node) -> Axes:
    source = typing.of(node.args[0])
    return tuple(source[d] for d in node.args[1])  # type: ignore[union-attr, index]


@rule("transpose", "swapaxes", "swapdims")
def transpose(typing: Typing, node: fx.Node) -> Axes:
    axes = list(typing.of(node.args[0]))
    i, j = (axis_index(d, len(axes)) for d in node.args[1:3])  # type: ignore[arg-type]
    axes[i], axes[j] = axes[j], axes[i]
    return tuple(axes)


@rule("t", "numpy_T", "mT", "adjoint", "matrix_H")
def matrix_transpose(typing: Typing, node: fx.Node) -> Axes:
    axes = typing.of(node.args[0])
    return (*axes[:-2], axes[-1], axes[-2]) if len(axes) > 1 else axes


@rule("movedim", "moveaxis")
def movedim(typing: Typing, node: fx.Node) -> Axes:
    axes = typing.of(node.args[0])
    sources, targets = dims_of(node.args[1], len(axes)), dims_of(node.args[2], len(axes))
    rest = [i for i in range(len(axes)) if i not in sources]
    placed = [-1] * len(axes)
    for s, t in zip(sources, targets, strict=True):
        placed[t] = s
    remaining = iter(rest)
    return tuple(axes[p if p >= 0 else next(remaining)] for p in placed)


@rule("unsqueeze")
def unsqueeze(typing: Typing, node: fx.Node) -> Axes:
    axes = list(typing.of(node.args[0]))
    axes.insert(axis_index(node.args[1], len(axes) + 1), ())  # type: ignore[arg-type]
    return tuple(axes)


@rule("squeeze")
def squeeze(typing: Typing, node: fx.Node) -> Axes:
    axes = typing.of(node.args[0])
    dims = dims_of(node.args[1] if len(node.args) > 1 else None, len(axes))
    if len(node.args) < 2 and any(axis and typing.axis_size(axis) == 1 for axis in axes):
        raise refuse(node, "squeeze() without dim would drop the batch axis", "write squeeze(dim)")
    return tuple(axis for i, axis in enumerate(axes) if i not in dims or axis)


@rule("split", "chunk", "unbind", "split_with_sizes", "tensor_split", "unsafe_split", "unsafe_chunk")
def split(typing: Typing, node: fx.Node) -> list[Axes]:
    axes = list(typing.of(node.args[0]))
    bound = arguments(node)
    d = axis_index(bound.get("dim", 0), len(axes))
    require_sliceable(node, axes[d])
    pieces = []
    for value in node.meta["val"]:
        middle = () if op_name(node) == "unbind" else (plain(int(value.shape[d])),)
        pieces.append((*axes[:d], *middle, *axes[d + 1 :]))
    return pieces


@rule("stack")
def stack(typing: Typing, node: fx.Node) -> Axes:
    bound = arguments(node)
    axes = list(broadcast(typing, node, bound["tensors"]))
    axes.insert(axis_index(bound["dim"], len(axes) + 1), plain(len(bound["tensors"])))
    return tuple(axes)
