"""Values that depend on positions and not on tokens (rotary angles, position embeddings, masks), computed as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from smc_compile.errors import CacheError
from smc_compile.passes.axes.axis_types import K, Typing, expression, refuse
from smc_compile.passes.axes.helpers import axis_index
from smc_compile.passes.fx_tools import ancestors, arguments, op_name, output_values, reachable

HIDDEN = -3e4  # a mask adds at most this to the score of a hidden key: no score comes near, and float16 holds it


def is_over_positions(node: fx.Node) -> bool:
    """A tensor, or a tuple of them, with an axis that grows with the sequence."""
    values = node.meta.get("val")
    values = values if isinstance(values, (list, tuple)) else [values]
    return any(bool(expression(size).free_symbols) for v in values if isinstance(v, torch.Tensor) for size in v.shape)


def is_fill(node: fx.Node) -> bool:
    """One number in every place: it takes any shape, so it needs no table."""
    return node.target is torch.ops.aten.full.default and isinstance(node.args[1], (int, float))


def growing_axes(table: fx.Node) -> tuple[int, ...]:
    """The axes of a table whose size depends on the sequence length."""
    return tuple(d for d, size in enumerate(table.meta["val"].shape) if expression(size).free_symbols)


def frontier(typing: Typing) -> list[fx.Node]:
    """Token-free values over positions that token-dependent ops read: they become tables."""
    found: list[fx.Node] = []
    live = ancestors(*output_values(typing.lm.graph))
    for node in typing.lm.graph.nodes:
        if node not in typing.dependent or node not in live:
            continue
        for source in node.all_input_nodes:
            is_tensor = isinstance(source.meta.get("val"), torch.Tensor)
            if source in typing.dependent or source in found or not is_tensor or source.op == "placeholder":
                continue
            if is_fill(source):
                continue
            if is_over_positions(source):
                found.append(source)
            elif grows(source):
                raise refuse(
                    source,
                    "a value depends on the total length of the sequence",
                    "compute it from positions (torch.arange), so that earlier positions do not change as text grows",
                )
    return found


def may_shift(typing: Typing, table: fx.Node) -> bool:
    """Whether a table over keys alone is only added to scores on their way into a softmax, which no shift changes."""
    if growing_axes(table) != (table.meta["val"].dim() - 1,):
        return False
    shifted = reachable([table], lambda node: () if _is_softmax_over_keys(typing, node) else node.users) - {table}
    return all(
        _is_over_keys(typing, node)
        and (
            _is_softmax_over_keys(typing, node)
            or all(_keeps_a_shift(node, source) for source in node.all_input_nodes if source in shifted | {table})
        )
        for node in shifted
    )


def _is_over_keys(typing: Typing, node: fx.Node) -> bool:
    """Whether the last axis of a value is that of the keys."""
    axes = typing.axes.get(node)
    return isinstance(axes, tuple) and axes[-1:] == ((K,),)


def _is_softmax_over_keys(typing: Typing, node: fx.Node) -> bool:
    if op_name(node) not in ("softmax", "_softmax") or not _is_over_keys(typing, node):
        return False
    rank = len(typing.of(node))
    return axis_index(arguments(node)["dim"], rank) == rank - 1


def _keeps_a_shift(node: fx.Node, source: fx.Node) -> bool:
    """Whether a number added to all of ``source`` is added to all of the result, except to entries that are hidden."""
    name, bound = op_name(node), arguments(node) if isinstance(node.target, torch._ops.OpOverload) else {}
    if name in ("add", "sub"):
        return True
    if name == "masked_fill":
        hides = not isinstance(bound["value"], fx.Node) and bound["value"] <= HIDDEN
        return hides and bound["input"] is source and bound["mask"] is not source
    return name in ("_to_copy", "to", "clone")


def grows(node: fx.Node) -> bool:
    """Whether a value is computed from a size of the sequence, or is one."""
    values = (source.meta.get("val") for source in ancestors(node))
    return any(isinstance(value, torch.SymInt) and value.node.expr.free_symbols for value in values)


def table_graph(typing: Typing, tables: Sequence[fx.Node]) -> fx.GraphModule:
    """``(length, *weights) -> tables``: the token-free part of the graph alone."""
    graph = fx.Graph()
    length = graph.placeholder("length")
    env: dict[fx.Node, Any] = {node: graph.placeholder(node.name) for node in typing.lm.weights}
    needed = reachable(tables, lambda node: () if sequence_size(typing, node) else node.all_input_nodes)
    for node in typing.lm.graph.nodes:
        if node in env or node not in needed:
            continue
        size = sequence_size(typing, node)
        env[node] = affine(graph, length, size, typing) if size is not None else graph.node_copy(node, lambda n: env[n])
    graph.output(tuple(env[node] for node in tables))
    graph.lint()
    return fx.GraphModule(typing.lm.graph_module, graph)


def sequence_size(typing: Typing, node: fx.Node) -> Any:
    """The expression of a node that is an integer computed from the sequence length, else None."""
    value = node.meta.get("val")
    if not isinstance(value, torch.SymInt):
        return None
    size = expression(value)
    return size if size.free_symbols == typing.length.free_symbols or not size.free_symbols else None


def affine(graph: fx.Graph, length: Any, size: Any, typing: Typing) -> Any:
    """``size`` as nodes on ``length``; sizes that are not linear in the length are refused."""
    poly = size.as_poly(typing.length) if size.free_symbols else None
    if poly is None:
        if size.is_Integer:
            return int(size)
        raise CacheError("a size is not linear in the sequence length", str(size), "use sizes like S, S+1 or 2*S")
    if poly.degree() > 1 or not all(c.is_Integer for c in poly.all_coeffs()):
        raise CacheError("a size is not linear in the sequence length", str(size), "use sizes like S, S+1 or 2*S")
    slope, shift = (int(c) for c in poly.all_coeffs())
    node = length if slope == 1 else graph.call_function(multiply, (length, slope))
    return node if shift == 0 else graph.call_function(add, (node, shift))


def multiply(x: int, y: int) -> int:
    """A product of sizes, as a node of an emitted graph."""
    return x * y


def add(x: int, y: int) -> int:
    """A sum of sizes, as a node of an emitted graph."""
    return x + y


def at_positions(
    table: torch.Tensor,
    query: int | None,
    key: int | None,
    batch: int,
    inner: int,
    positions: torch.Tensor,
    keys: torch.Tensor,
    rows: int,
    rank: int,
    every_row: bool,
) -> torch.Tensor:
    """Read a table over positions where each request stands: ``positions`` [B, T] of new tokens, ``keys`` [B, L].

    The table's last axes are those of a value of ``rank`` axes; ``query`` and ``key`` say which of these run over
    positions. The value's axis ``batch`` holds rows, or rows times ``inner`` heads, of which the table has one request.
    One request broadcasts over its rows unless ``every_row``. Positions past the table read its last entry, which no
    earlier query sees.
    """
    table = table[(None,) * (rank - table.dim())]
    table = table.unflatten(batch, (1, table.shape[batch]))
    axes = [d + (d > batch) for d in (query, key) if d is not None]
    front = table.movedim(axes, list(range(len(axes))))
    at = [p.clamp(max=front.shape[i] - 1) for i, p in enumerate(_present((query, positions), (key, keys)))]
    picked = front[at[0][:, :, None], at[1][:, None, :]] if len(at) == 2 else front[at[0]]  # [B, T, L, ...]
    picked = picked.movedim(list(range(1, len(at) + 1)), [d + 1 for d in axes])  # [B, axes of the table, parted]
    return to_rows(picked, batch, inner, rows, every_row)


def _present(*pairs: tuple[int | None, torch.Tensor]) -> list[torch.Tensor]:
    return [value for axis, value in pairs if axis is not None]


def to_rows(value: torch.Tensor, batch: int, inner: int, rows: int, every_row: bool) -> torch.Tensor:
    """[B, ..., 1, heads, ...] with the parted axes at ``batch`` behind the first -> [..., rows * heads, ...]."""
    requests = value.shape[0]
    if requests > 1 or every_row:
        value = value[:, None].expand(requests, rows // requests, *value.shape[1:]).flatten(0, 1)
        value = value.expand(*value.shape[: batch + 2], inner, *value.shape[batch + 3 :])
    return value.squeeze(batch + 1).movedim(0, batch).flatten(batch, batch + 1)
