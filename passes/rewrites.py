"""Rewrites of single ops: the registry, the one driver, and the rewrites that need no file of their own.

To add one, write below a function of a node that gives its replacement (a new node, or one that is there already), or
None to leave the node as it is::

    @rewrite(aten.square.default)
    def square_as_product(node: fx.Node) -> fx.Node:
        return new_node(node, aten.mul.Tensor, node.args[0], node.args[0])

The driver hands the old node's value and source line on to the replacement, erases what nothing reads any more, and
counts in ``torch._dynamo.utils.counters["smc_compile"]`` under the function's name; ``TORCH_LOGS="+smc_compile"``
shows the counts. What a rewrite makes is not rewritten again.

An op that is easier to take apart in tensor code belongs in ``capture/decompositions.py``; rewrites of families of ops
stand in ``capture/shape_only.py`` and ``lower/skinny_products.py``.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import counters

from smc_compile.passes.fx_tools import arguments, erase_dead_code, value_without_data
from smc_compile.passes.ir import CachedLM, CausalLM

log = logging.getLogger(__name__)
aten = torch.ops.aten

Rewrite = Callable[[fx.Node], fx.Node | None]
Rewrites = dict[Any, Rewrite]  # by op

CAPTURED: Rewrites = {}  # of the graph of a CausalLM: ATen ops, each with its value
CACHED: Rewrites = {}  # of the graphs of a CachedLM, whose nodes carry no values


def rewrite(*ops: Any, stage: Rewrites = CAPTURED) -> Callable[[Rewrite], Rewrite]:
    """Register a rewrite of these ops, one an op and stage."""

    def register(function: Rewrite) -> Rewrite:
        for op in ops:
            assert op not in stage, f"two rewrites of {op}"
            stage[op] = function
        return function

    return register


def rewrite_captured(lm: CausalLM) -> CausalLM:
    """The model after the rewrites of ``CAPTURED``, in place."""
    rewrite_ops(lm.graph, CAPTURED)
    lm.graph_module.recompile()
    return lm


def rewrite_cached(cached: CachedLM) -> CachedLM:
    """The model after the rewrites of ``CACHED``, in place; its tables are left alone."""
    for module in (cached.prefill, cached.score, cached.advance):
        rewrite_ops(module.graph, CACHED)
        module.recompile()
    return cached


def rewrite_ops(graph: fx.Graph, stage: Rewrites) -> None:
    """Run the rewrites of a stage over a graph, in place, in program order."""
    counted = Counter[str]()
    nodes = dict.fromkeys(graph.nodes)
    for node in nodes:
        function = stage.get(node.target) if node.op == "call_function" else None
        if function is None:
            continue
        with graph.inserting_before(node):
            replacement = function(node)
        if replacement is None:
            continue
        if replacement not in nodes:  # an older node, as in x * 1 -> x, keeps its own
            replacement.meta = {**node.meta}
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
        counted[function.__name__] += 1
    if counted:
        erase_dead_code(graph)
        counters["smc_compile"].update(counted)
        log.debug("rewrites: %s", dict(counted))


def new_node(origin: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call on the source line of ``origin``, with its value if the graph carries values; where the graph inserts."""
    node = origin.graph.call_function(target, args, kwargs)
    node.meta = {**origin.meta}
    if "val" in origin.meta:
        node.meta["val"] = value_without_data(node)
    return node


def sizes_of(origin: fx.Node, tensor: Any) -> list[Any]:
    """The sizes of a tensor, for a rewrite of ``origin``: integers where they are fixed, else nodes."""
    return [
        size if isinstance(size, int) else new_node(origin, aten.sym_size.int, tensor, axis)
        for axis, size in enumerate(tensor.meta["val"].shape)
    ]


# ---- rewrites that need no file of their own -----------------------------------------------------------------------


@rewrite(aten.topk.default)
def topk_of_at_most_all(node: fx.Node) -> fx.Node | None:
    """Let ``topk`` of a fixed number along the sequence choose all entries where there are fewer.

    ``if S > k: scores.topk(k)`` leaves the ``topk`` in a trace of a longer sequence.
    """
    bound = arguments(node)
    scores, k, axis = bound["input"], bound["k"], bound["dim"]
    if isinstance(scores.meta["val"].shape[axis], int) or not isinstance(k, int):
        return None
    least = new_node(node, torch.sym_min, new_node(node, aten.sym_size.int, scores, axis), k)
    least.meta["val"] = k  # as in the trace, which is of a longer sequence
    return new_node(node, aten.topk.default, scores, least, axis, bound["largest"], bound["sorted"])


@rewrite(aten.select.int, aten.slice.Tensor)
def part_that_was_written(node: fx.Node) -> fx.Node | None:
    """Read back what was written to the same place: ``row = x[:, -1]; row[:, 3] = 0`` writes the row into x first."""
    source = node.args[0]
    scatter = aten.select_scatter.default if node.target is aten.select.int else aten.slice_scatter.default
    if not isinstance(source, fx.Node) or source.target is not scatter:
        return None
    written, read, rank = arguments(source), arguments(node), source.meta["val"].dim()
    place = [name for name in ("index", "start", "end", "step") if name in read]
    same_place = written["dim"] % rank == read["dim"] % rank and all(written[name] == read[name] for name in place)
    part = written["src"]
    return part if same_place and part.meta["val"].dtype == node.meta["val"].dtype else None
