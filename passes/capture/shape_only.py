"""Rewrite ops that read a tensor's shape, or overwrite its values, so that they no longer seem to depend on its values.

``x.new_zeros(sizes)``, ``zeros_like(x)`` and ``zeros(sizes)`` become ``full``; ``a.expand_as(x)`` and ``a.view_as(x)``
take sizes; ``copy(x, y)``, which writing into a slice leaves behind, is ``y`` in the shape of ``x``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import counters

aten = torch.ops.aten
FILLS = {aten.zeros.default: 0, aten.ones.default: 1, aten.empty.memory_format: 0}  # of sizes
LIKE = {aten.zeros_like.default: 0, aten.ones_like.default: 1, aten.empty_like.default: 0}  # of a tensor
FILLS_LIKE = {aten.new_zeros.default: 0, aten.new_ones.default: 1, aten.new_empty.default: 0}  # of a tensor and sizes
SHAPED_AS = {aten.expand_as.default: aten.expand.default, aten.view_as.default: aten.view.default,
             aten.reshape_as.default: aten.reshape.default}  # fmt: skip


def forget_values(graph: fx.Graph) -> None:
    """Rewrite every such op of ``graph`` in place; each new node carries its value."""
    for node in list(graph.nodes):
        with graph.inserting_before(node):
            replacement = _replacement(graph, node)
        if replacement is not None:
            replacement.meta = {**node.meta}
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
            counters["smc_compile"]["shape_only_reads"] += 1


def _replacement(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    if node.target in FILLS:
        return _full(graph, node, node.args[0], FILLS[node.target])  # type: ignore[index]
    if node.target in FILLS_LIKE:
        return _full(graph, node, node.args[1], FILLS_LIKE[node.target])  # type: ignore[index]
    if node.target in LIKE:
        return _full(graph, node, sizes_of(graph, node.args[0]), LIKE[node.target])  # type: ignore[index]
    if node.target is aten.full_like.default:
        return _full(graph, node, sizes_of(graph, node.args[0]), node.args[1])
    if node.target is aten.new_full.default:
        return _full(graph, node, node.args[1], node.args[2])
    if node.target in SHAPED_AS:
        source, other = node.args
        return graph.call_function(SHAPED_AS[node.target], (source, sizes_of(graph, other)))  # type: ignore[index]
    if node.target is aten.copy.default:
        old, new = node.args[:2]
        cast = graph.call_function(aten._to_copy.default, (new,), {"dtype": node.meta["val"].dtype})
        cast.meta = {**node.meta, "val": new.meta["val"].to(node.meta["val"].dtype)}  # type: ignore[union-attr]
        return graph.call_function(aten.expand.default, (cast, sizes_of(graph, old)))
    return None


def _full(graph: fx.Graph, node: fx.Node, sizes: Any, fill: Any) -> fx.Node:
    value = node.meta["val"]
    return graph.call_function(aten.full.default, (sizes, fill), {"dtype": value.dtype, "device": value.device})


def sizes_of(graph: fx.Graph, tensor: Any) -> list[Any]:
    """The sizes of a tensor: integers where they are fixed, nodes where they depend on the sequence."""
    sizes: list[Any] = []
    for i, size in enumerate(tensor.meta["val"].shape):
        if isinstance(size, int):
            sizes.append(size)
            continue
        node = graph.call_function(aten.sym_size.int, (tensor, i))
        node.meta["val"] = size
        sizes.append(node)
    return sizes
