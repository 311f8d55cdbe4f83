"""Axes through ops that read or write a part: slices, indices, concatenation."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from smc_compile.passes.axes.axis_types import KEY, QUERY, Atom, Axes, Axis, K, Q, Typing, expression, refuse
from smc_compile.passes.axes.helpers import (
    END,
    axis_index,
    merge_axis,
    operand_axes,
    plain,
    require_plain,
    rule,
    settle,
    tensors,
)
from smc_compile.passes.axes.key_selection import scatter_over_keys
from smc_compile.passes.fx_tools import arguments, op_name


@rule("slice")
def slice_axis(typing: Typing, node: fx.Node) -> Axes:
    bound = arguments(node)
    axes = list(typing.of(bound["input"]))
    d = axis_index(bound["dim"], len(axes))
    start, end, step = bound["start"] or 0, bound["end"], bound["step"]
    whole = step == 1 and start == 0 and (end is None or _covers(typing, end, axes[d]))
    if whole:
        return tuple(axes)
    last = expression(start) in (-1, typing.length - 1)
    if axes[d] == (Q,) and step == 1 and last and (end is None or _covers(typing, end, axes[d])):
        return _select_last(typing, node, (*axes[:d], (), *axes[d + 1 :]))
    if len(axes[d]) == 1 and axes[d][0].kind == KEY:
        axes[d] = (_without_extra(typing, node, axes[d][0], start, end),)
        return tuple(axes)
    require_sliceable(node, axes[d])
    axes[d] = plain(int(node.meta["val"].shape[d]))
    return tuple(axes)


def require_sliceable(node: fx.Node, axis: Axis) -> None:
    if any(atom.kind == QUERY for atom in axis):
        raise refuse(node, "a slice reads some positions only, so positions mix")
    require_plain(node, axis)


def _covers(typing: Typing, end: Any, axis: Axis) -> bool:
    end = expression(end)
    return bool(end == typing.axis_size(axis)) or (end.is_Integer and int(end) >= END)


def _without_extra(typing: Typing, node: fx.Node, atom: Atom, start: Any, end: Any) -> Atom:
    """Scores over keys and ``size`` sink columns, cut back to the keys."""
    to_end = end is None or (expression(end).is_Integer and int(expression(end)) >= END)
    drops_after = atom.size > 0 and start == 0 and not to_end and expression(end) in (-atom.size, typing.length)
    drops_before = atom.size < 0 and to_end and start == -atom.size
    if not (drops_after or drops_before):
        raise refuse(node, "a slice reads some of the keys only")
    return K


def _select_last(typing: Typing, node: fx.Node, axes: Axes) -> Axes:
    typing.last.append(node)
    typing.after_last.add(node)
    return axes


@rule("select")
def select(typing: Typing, node: fx.Node) -> Axes:
    axes = typing.of(node.args[0])
    d = axis_index(node.args[1], len(axes))  # type: ignore[arg-type]
    rest = (*axes[:d], *axes[d + 1 :])
    if axes[d] == (Q,):
        if expression(node.args[2]) not in (-1, typing.length - 1):
            raise refuse(node, "the loop samples from a position that is not the last", "sample from logits[:, -1]")
        return _select_last(typing, node, rest)
    require_plain(node, axes[d])
    return rest


@rule("cat", "concat", "concatenate")
def cat(typing: Typing, node: fx.Node) -> Axes:
    bound = arguments(node)
    operands = [x for x in bound["tensors"] if tuple(x.meta["val"].shape) != (0,)]  # cat allows an empty one
    d = axis_index(bound["dim"], node.meta["val"].dim())
    if len(operands) == 1:
        return tuple(operand_axes(typing, operands[0]))  # type: ignore[arg-type]
    columns = [operand_axes(typing, operand)[d] for operand in operands]
    merged: list[Axis] = []
    for i in range(node.meta["val"].dim()):
        axis: Axis | None = None
        if i != d:
            for operand in operands:
                axis = merge_axis(node, axis, operand_axes(typing, operand)[i])
            axis = settle(typing, node, axis, expression(node.meta["val"].shape[i]))
        merged.append(axis or ())
    key = [i for i, axis in enumerate(columns) if axis == (K,)]
    if key:
        merged[d] = (_with_extra(typing, node, operands, key, d),)
        return tuple(merged)
    for axis in columns:
        require_plain(node, axis or ())
    merged[d] = plain(int(node.meta["val"].shape[d]))
    return tuple(merged)


def _with_extra(typing: Typing, node: fx.Node, operands: Any, key: list[int], d: int) -> Atom:
    """Sink columns beside the scores: after the keys (positive) or before them (negative)."""
    if len(key) != 1 or len(operands) != 2:
        raise refuse(node, "scores are concatenated with more than one other value")
    extra = expression(operands[1 - key[0]].meta["val"].shape[d])
    if extra.free_symbols:
        raise refuse(node, "scores over two sequences are concatenated")
    return Atom(KEY, int(extra) if key[0] == 0 else -int(extra))


@rule("gather", "take_along_dim")
def gather(typing: Typing, node: fx.Node) -> Axes:
    bound = arguments(node)
    d = axis_index(bound["dim"], node.meta["val"].dim())
    source, index = operand_axes(typing, bound["input"]), operand_axes(typing, bound["index"])
    require_plain(node, source[d] or ())
    require_plain(node, index[d] or ())
    axes = [merge_axis(node, x, y) for x, y in zip(source, index, strict=True)]
    axes[d] = plain(int(node.meta["val"].shape[d]))
    return tuple(
        settle(typing, node, axis, expression(size)) for axis, size in zip(axes, node.meta["val"].shape, strict=True)
    )


@rule("index_select")
def index_select(typing: Typing, node: fx.Node) -> Axes:
    source, d, index = node.args
    if typing.is_dependent(index):
        raise refuse(node, "index_select with token ids", "use an embedding")
    axes = list(typing.of(source))
    d = axis_index(d, len(axes))  # type: ignore[arg-type]
    require_sliceable(node, axes[d])
    axes[d] = plain(int(node.meta["val"].shape[d]))
    return tuple(axes)


@rule("index")
def index(typing: Typing, node: fx.Node) -> Axes:
    source, indices = node.args
    used = [(i, value) for i, value in enumerate(indices) if value is not None]  # type: ignore[union-attr, arg-type]
    if len(used) != 1:
        raise refuse(node, "indexing with several tensors at once")
    d, value = used[0]
    sizes = source.meta["val"].shape  # type: ignore[union-attr]
    axes = list(typing.of(source)) if typing.is_dependent(source) else [plain(int(s)) for s in sizes]
    if value.meta["val"].dtype == torch.bool:  # type: ignore[union-attr]
        raise refuse(node, "indexing with a boolean mask has a data-dependent shape")
    require_sliceable(node, axes[d])
    inner = operand_axes(typing, value)
    found = [settle(typing, node, axis, expression(s)) for axis, s in zip(inner, value.meta["val"].shape, strict=True)]
    return (*axes[:d], *found, *axes[d + 1 :])


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(typing: Typing, node: fx.Node) -> Axes:
    bound = arguments(node)
    if bound["index"] in typing.slots:
        return scatter_over_keys(typing, node)
    parts = [operand_axes(typing, part) for part in tensors([bound["input"], bound["index"], bound.get("src")])]
    return _written(typing, node, parts, axis_index(bound["dim"], node.meta["val"].dim()))


@rule("slice_scatter", "select_scatter")
def slice_scatter(typing: Typing, node: fx.Node) -> Axes:
    bound = arguments(node)
    d = axis_index(bound["dim"], node.meta["val"].dim())
    parts = [operand_axes(typing, bound["input"]), operand_axes(typing, bound["src"])]
    if op_name(node) == "select_scatter":
        parts[1].insert(d, ())
    return _written(typing, node, parts, d)


def _written(typing: Typing, node: fx.Node, parts: list[list[Axis | None]], d: int) -> Axes:
    """A value with some entries along plain axis ``d`` replaced; the parts line up along all other axes."""
    merged: list[Axis] = []
    for i, size in enumerate(node.meta["val"].shape):
        axis: Axis | None = None
        for part in parts:
            if i == d:
                require_plain(node, part[d] or ())
            else:
                axis = merge_axis(node, axis, part[i])
        merged.append(plain(int(size)) if i == d else settle(typing, node, axis, expression(size)))
    return tuple(merged)


@rule("constant_pad_nd", "pad")
def pad(typing: Typing, node: fx.Node) -> Axes:
    axes = list(typing.of(node.args[0]))
    amounts = list(node.args[1])  # type: ignore[arg-type]
    for i in range(len(amounts) // 2):
        if amounts[2 * i] or amounts[2 * i + 1]:
            require_plain(node, axes[-1 - i])
            axes[-1 - i] = plain(int(node.meta["val"].shape[-1 - i]))
    return tuple(axes)
