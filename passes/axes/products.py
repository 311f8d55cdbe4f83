"""Axes through products: linear layers, matrix products, attention."""

from __future__ import annotations

from typing import Any

from torch import fx

from smc_compile.errors import CacheError
from smc_compile.passes.axes.axis_types import (
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
)
from smc_compile.passes.axes.helpers import merge_axis, outline, plain, require_plain, rule
from smc_compile.passes.fx_tools import arguments, describe, op_name


@rule("linear")
def linear(typing: Typing, node: fx.Node) -> Axes:
    bound = arguments(node)
    if typing.is_dependent(bound["weight"]):
        raise refuse(node, "a linear layer's weight depends on the tokens")
    source = typing.of(bound["input"])
    require_plain(node, source[-1])
    return (*source[:-1], plain(node.meta["val"].shape[-1]))


@rule("matmul", "mm", "bmm", "_int_mm")
def matmul(typing: Typing, node: fx.Node) -> Axes:
    return contract(typing, node, node.args[0], node.args[1])


@rule("addmm", "baddbmm")
def addmm(typing: Typing, node: fx.Node) -> Axes:
    result = contract(typing, node, node.args[1], node.args[2])
    if node in typing.attention:
        raise refuse(node, f"{op_name(node)} adds to attention scores", "write it as a matmul followed by an addition")
    return result


def contract(typing: Typing, node: fx.Node, left: Any, right: Any) -> Axes:
    """``left [..., m, c] @ right [..., c, n]``; a contraction that meets positions is attention and marks a cache."""
    a, b = _matrix_axes(typing, left), _matrix_axes(typing, right)
    if len(a) < 2 or len(b) < 2:
        return _vector_product(typing, node, a, b)
    rank = max(len(a), len(b))
    a, b = ((),) * (rank - len(a)) + a, ((),) * (rank - len(b)) + b
    batch = tuple(_batch_axis(node, x, y) for x, y in zip(a[:-2], b[:-2], strict=True))
    if a[-1] == (K,) and b[-2] == (Q,):
        _require_one_sequence(node, batch, a[-2])
        typing.attention[node] = "mix"
    elif b[-1] == (Q,) and (Q in a[-2] or (Q,) in a[:-2]):
        require_plain(node, a[-1])
        _require_one_sequence(node, batch, a[-2])
        typing.attention[node] = "score"
        return (*batch, a[-2], (K,))
    else:
        require_plain(node, a[-1])
        require_plain(node, b[-2])
    return (*batch, a[-2], b[-1])


def _require_one_sequence(node: fx.Node, batch: Axes, rows: Axis) -> None:
    """Refuse a product unless positions stand on one axis of it: its rows, or an axis of their own before the rows."""
    positions = [axis for axis in (*batch, rows) for atom in axis if atom.kind in (QUERY, KEY)]
    if len(positions) != 1 or (rows not in positions and positions != [(Q,)]):
        raise refuse(node, "attention runs over the positions of the sequence once for each position")


def _matrix_axes(typing: Typing, value: fx.Node) -> Axes:
    if typing.is_dependent(value):
        return typing.of(value)
    sizes = [expression(size) for size in value.meta["val"].shape]
    if any(size.free_symbols for size in sizes):
        raise refuse(value, "a matrix product with a table over positions mixes positions")
    return tuple(plain(int(size)) for size in sizes)


def _vector_product(typing: Typing, node: fx.Node, a: Axes, b: Axes) -> Axes:
    if len(b) != 1 or len(a) < 1:
        raise refuse(node, "a product with a vector on the left")
    require_plain(node, a[-1])
    return a[:-1]


def _batch_axis(node: fx.Node, left: Axis, right: Axis) -> Axis:
    """The query side's axis names the result: repeated key heads are the query's own heads."""
    if not left:
        return tuple(Atom(OTHER, atom.size) if atom.kind == REPEAT else atom for atom in right)
    if outline(left) == outline(right) and K not in left:  # each token has a matrix of its own
        return merge_axis(node, left, right) or ()
    kinds = {atom.kind for atom in right} - {OTHER, REPEAT}
    if not kinds <= {atom.kind for atom in left} or {QUERY, KEY} & kinds:
        raise refuse(node, f"axes {left} and {right} of a batched product do not line up")
    return left


@rule("scaled_dot_product_attention")
def attention(typing: Typing, node: fx.Node) -> Axes:
    bound = arguments(node)
    query, key, value = (_matrix_axes(typing, bound[name]) for name in ("query", "key", "value"))
    if bound["dropout_p"]:
        raise CacheError("the model is in training mode with dropout", describe(node), "call model.eval() first")
    if query[-2] != (Q,) or key[-2] != (Q,) or value[-2] != (Q,):
        raise refuse(node, "attention does not run over the positions of the sequence")
    if typing.is_dependent(bound["attn_mask"]):
        _require_mask(typing, node, bound["attn_mask"], (*query[:-1], (K,)))
    typing.attention[node] = "sdpa"
    return (*query[:-1], value[-1])


def _require_mask(typing: Typing, node: fx.Node, mask: fx.Node, scores: Axes) -> None:
    """A mask that depends on the tokens has an entry for each query and key, and must hide later keys itself."""
    axes = typing.of(mask)
    if len(axes) < 2 or axes[-2:] != ((Q,), (K,)):
        raise refuse(
            node,
            "the attention mask depends on the tokens, and not through scores of each query for each key",
            "build the mask from positions, or from scores [.., Q, K] that a query has for its keys",
        )
    for mine, theirs in zip(axes[::-1], scores[::-1], strict=False):
        merge_axis(node, theirs, mine)
    typing.hiding.append(mask)
