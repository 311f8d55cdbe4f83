"""The graph of one iteration: a copy of its nodes that computes what grows with the text from ``ids.size(1)``."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from smc_compile.passes.loop.iterations import Iterations
from smc_compile.passes.loop.leaves import Leaf, replace_leaves
from smc_compile.passes.loop.lengths import Affine, Lengths

_KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack")


def build_step(
    gm: fx.GraphModule,
    iterations: Iterations,
    nodes: Sequence[fx.Node],
    growing: Lengths,
    fixed: Mapping[Leaf, Any] | None = None,
    seen: Sequence[fx.Node] = (),
    padded: bool = False,
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The graph ``forward(ids [B, S], *invariants) -> token``, and the placeholders behind the invariants.

    Args:
        nodes: those of iteration 0.
        growing: integers that become a*S + b.
        fixed: integers that become other constants.
        seen: nodes whose values are returned too.
        padded: the iteration as it was written: ``forward(buffer, length, *invariants)``.
    """
    graph = fx.Graph()
    ids = graph.placeholder("ids")
    length = graph.placeholder("length") if padded else None
    invariants = [node for node in nodes if node.op == "placeholder"]
    copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in invariants}
    for node, copy in copies.items():
        copy.meta = _kept_meta(node)
    sizes = _emit_sizes(graph, ids, length, sorted(set(growing.values())))
    by_node: dict[fx.Node, dict[int, Any]] = defaultdict(dict)
    for (node, leaf), key in growing.items():
        by_node[node][leaf] = sizes[key]
    for (node, leaf), value in (fixed or {}).items():
        by_node[node][leaf] = value
    for node in nodes:
        if node.op == "placeholder":
            continue
        history = {source: _as_read(graph, ids, length, iterations, node, source) for source in node.all_input_nodes}
        inputs = {source: copies[source] if read is None else read for source, read in history.items()}
        args, kwargs = replace_leaves(node, by_node.get(node, {}), inputs)
        copies[node] = graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        copies[node].meta = _kept_meta(node)
    token = copies[iterations.tokens[0]]
    graph.output((token, *(copies[node] for node in seen)) if seen else token)
    graph.lint()
    return fx.GraphModule(gm, graph, class_name="Step"), invariants


def _as_read(
    graph: fx.Graph, ids: fx.Node, length: fx.Node | None, iterations: Iterations, node: fx.Node, source: fx.Node
) -> fx.Node | None:
    """The text in the shape in which a node reads it, [B, S] or [S]; None if the node reads something else."""
    columns = iterations.read_length(node, source, 0)
    if columns is None:
        return None
    if length is not None and columns == iterations.length(0):
        ids = graph.call_method("narrow", (ids, 1, 0, length))
    return ids if iterations.layouts.readings[node, source].ndim == 2 else graph.call_method("squeeze", (ids, 0))


def _kept_meta(node: fx.Node) -> dict[str, Any]:
    return {key: node.meta[key] for key in _KEPT_META if key in node.meta}


def _emit_sizes(
    graph: fx.Graph, ids: fx.Node, length: fx.Node | None, wanted: Sequence[Affine]
) -> dict[Affine, fx.Node]:
    """Nodes for a*S + b; S is ids.size(1) unless it is given."""
    if not wanted:
        return {}
    length = length or graph.call_method("size", (ids, 1))
    sizes: dict[Affine, fx.Node] = {}
    for affine in wanted:
        slope, offset = affine
        value = length if slope == 1 else graph.call_function(operator.mul, (length, slope))
        sizes[affine] = graph.call_function(operator.add, (value, offset)) if offset else value
    return sizes
