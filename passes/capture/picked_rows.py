"""Rows that a mask picks, that are worked on and put back: all rows are worked on, and the mask decides at the end.

    y[mask] = f(x[mask])        becomes        y = where(mask, f(x), y)

The number of picked rows depends on values, that of all rows on shapes. ``f`` must treat each row by itself, whatever
rows stand beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import counters

from smc_compile.passes.axes.axis_types import expression
from smc_compile.passes.fx_tools import descendants, value_without_data
from smc_compile.passes.ir import CausalLM
from smc_compile.passes.rewrites import new_node, sizes_of

aten = torch.ops.aten
ROW_BY_ROW = {aten.linear.default, aten.layer_norm.default, aten.rms_norm.default, aten.clone.default,
              aten.contiguous.default, aten._to_copy.default, aten.to.dtype, aten.dropout.default}  # fmt: skip


def handle_all_rows(lm: CausalLM) -> CausalLM:
    """Rewrite, in place, each pick from a value that depends on tokens, if its rows all come back by the same mask."""
    dependent = descendants(lm.ids)
    for pick in [node for node in lm.graph.nodes if _picks(node) and node in dependent]:
        between = _between(pick)
        if between is not None:
            _rewrite(lm.graph, pick, between)
            counters["smc_compile"]["picked_rows"] += 1
    lm.graph_module.recompile()
    return lm


def _picks(node: fx.Node) -> bool:
    """``x[mask]``: one boolean index over the first axes."""
    if node.target is not aten.index.Tensor:
        return False
    indices: Any = node.args[1]
    return len(indices) == 1 and indices[0] is not None and indices[0].meta["val"].dtype == torch.bool


def _puts_back(node: fx.Node, pick: fx.Node) -> bool:
    return node.target is aten.index_put.default and node.args[1] == pick.args[1] and len(node.args) == 3


def _between(pick: fx.Node) -> list[fx.Node] | None:
    """What is computed from the picked rows, in order, up to where they are put back; None where that is not all."""
    found, stack = set(), [pick]
    while stack:
        for user in stack.pop().users:
            if user in found:
                continue
            found.add(user)
            if _puts_back(user, pick):
                if user.args[0] in found or user.args[2] not in found | {pick}:
                    return None
            elif not _is_row_by_row(user, pick):
                return None
            else:
                stack.append(user)
    return [node for node in pick.graph.nodes if node in found] if found else None


def _is_row_by_row(node: fx.Node, pick: fx.Node) -> bool:
    """Whether each row of a result comes from the same row of what was picked; rows stay the first axis."""
    target, rows = node.target, expression(pick.meta["val"].shape[0])
    known = target in ROW_BY_ROW or (isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags)
    value = node.meta.get("val")
    if not known or not isinstance(value, torch.Tensor):
        return False
    along = [i for i, size in enumerate(value.shape) if expression(size).has(*rows.free_symbols)]
    if along != [0] or expression(value.shape[0]) != rows:
        return False
    if target is aten.layer_norm.default or target is aten.rms_norm.default:
        return len(node.args[1]) < value.dim()  # type: ignore[arg-type]
    return target is not aten.linear.default or value.dim() > 1


def _rewrite(graph: fx.Graph, pick: fx.Node, between: list[fx.Node]) -> None:
    rows, mask = pick.args[0], pick.args[1][0]  # type: ignore[index]
    axes = mask.meta["val"].dim()  # type: ignore[union-attr]
    with graph.inserting_before(pick):
        every = rows if axes == 1 else new_node(pick, aten.flatten.using_ints, rows, 0, axes - 1)
    pick.replace_all_uses_with(every)  # type: ignore[arg-type]
    graph.erase_node(pick)
    for node in between:
        if node.target is not aten.index_put.default:
            node.meta["val"] = value_without_data(node)
            continue
        old, _, new = node.args
        with graph.inserting_before(node):
            new = new_node(node, aten.reshape.default, new, sizes_of(node, old))
            shown = mask
            for _ in range(old.meta["val"].dim() - axes):  # type: ignore[union-attr]
                shown = new_node(node, aten.unsqueeze.default, shown, -1)
            chosen = new_node(node, aten.where.self, shown, new, old)
        node.replace_all_uses_with(chosen)
        graph.erase_node(node)
