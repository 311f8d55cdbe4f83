"""A sampler of one row, ``model(ids)[0, -1]`` of shape [V], as a sampler of rows.

    logits = y[0, -1]; token = sample(logits)         becomes         token = vmap(lambda row: sample(row[-1]))(y)

The batch of the loop is one, and ``y`` is [1, S, V]. A compiled program asks its model for many rows at once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from smc_compile.passes.fx_tools import erase_dead_code, mutated_inputs, op_name, output_values, reachable
from smc_compile.passes.loop.tensor_info import tensor_info


class RowByRow:
    """A graph ``(row, *others) -> result`` for one row, called on rows [B, ...]."""

    __name__ = "row_by_row"

    def __init__(self, graph: fx.GraphModule, count: int) -> None:
        self.graph = graph
        self.rows: Callable[..., Tensor] = torch.vmap(graph, in_dims=(0, *(None,) * count), randomness="different")

    def __call__(self, *inputs: Any) -> Tensor:
        return self.rows(*inputs)

    def __repr__(self) -> str:
        return f"row_by_row:\n{self.graph.code}"


def sample_rows(step: fx.GraphModule, traced: Sequence[fx.Node]) -> fx.GraphModule:
    """The step ``forward(ids [B, S], *inputs) -> token``, whose batch axis lives on if its sampler picks the one row.

    ``traced`` are the nodes of the iteration that the step was made of; they know their shapes.
    """
    ids = next(iter(step.graph.nodes))
    (token,) = output_values(step.graph)
    picks = {node.name for node in traced if _picks_the_row(node)}
    found = (n for n in reversed(step.graph.nodes) if n.name in picks and _depends_by(token, ids, n))
    pick = next(found, None)
    if pick is None:
        return step
    graph = fx.Graph()
    behind = reachable([pick], lambda node: node.users)
    row = graph.placeholder("row")
    copies: dict[fx.Node, fx.Node] = {}
    nodes = [node for node in step.graph.nodes if node in behind and node.op != "output"]
    if any(op_name(target) in _VIEWS and target is not pick for node in nodes for target in mutated_inputs(node)):
        return step
    others = dict.fromkeys(
        source for node in nodes for source in node.all_input_nodes if source not in behind and node is not pick
    )
    for source in others:
        copies[source] = graph.placeholder(source.name)
    masks = {node.name for node in traced if (info := tensor_info(node)) is not None and info.dtype == torch.bool}
    for node in nodes:
        if mutated_inputs(node):
            (target,) = mutated_inputs(node)
            copies[target] = copies[node] = _written(graph, node, masks, copies)
        else:
            copies[node] = _of_row(graph, row, node) if node is pick else graph.node_copy(node, copies.__getitem__)
    graph.output(copies[token])
    rowwise = RowByRow(fx.GraphModule(step, graph, class_name="Row"), len(others))
    with step.graph.inserting_after(nodes[-1]):
        rows = step.graph.call_function(rowwise, (pick.args[0], *others))
        rows.meta = {key: value for key, value in token.meta.items() if key != "tensor"}
    token.replace_all_uses_with(rows, delete_user_cb=lambda user: user.op == "output")
    for node in reversed(nodes):
        if not node.users:
            step.graph.erase_node(node)
    erase_dead_code(step.graph)
    step.graph.lint()
    step.recompile()
    return step


_VIEWS = frozenset(
    ["getitem", "select", "view", "narrow", "squeeze", "unsqueeze", "transpose", "t", "reshape", "expand"]
)


def _written(graph: fx.Graph, node: fx.Node, masks: set[str], copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """A write in place as a new value: writes to rows have no form for several rows."""
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), copies.__getitem__)
    index = node.args[1] if op_name(node) == "setitem" else None
    if isinstance(index, fx.Node) and index.name in masks:
        return graph.call_function(torch.where, (args[1], args[2], args[0]))
    name = op_name(node).removesuffix("_")
    if node.op == "call_method" and hasattr(torch.Tensor, name):
        return graph.call_method(name, args, kwargs)
    return graph.create_node(node.op, node.target, args, kwargs)


def _picks_the_row(node: fx.Node) -> bool:
    """``y[0]``, ``y[0, -1]``, ``y.select(0, 0)`` or ``y.squeeze(0)`` of scores [1, ...]."""
    name = op_name(node)
    source = node.args[0] if node.args else None
    info = tensor_info(source) if isinstance(source, fx.Node) else None
    if info is None or not info.dtype.is_floating_point or len(info.shape) < 2 or info.shape[0] != 1:
        return False
    if name == "getitem":
        index = node.args[1]
        first = index[0] if isinstance(index, tuple | list) and index else index
        return type(first) is int and first in (0, -1)
    if name == "select":
        return node.args[1:] in ((0, 0), (0, -1))
    return name == "squeeze" and node.args[1:] == (0,)


def _of_row(graph: fx.Graph, row: fx.Node, pick: fx.Node) -> fx.Node:
    """What the pick leaves of the one row."""
    index = pick.args[1] if op_name(pick) == "getitem" else ()
    rest = tuple(index[1:]) if isinstance(index, tuple | list) else ()
    return graph.call_function(operator.getitem, (row, rest)) if rest else graph.call_method("clone", (row,))


def _depends_by(token: Any, ids: fx.Node, pick: fx.Node) -> bool:
    """Whether the token depends on the values of the ids by the pick alone."""

    def sources(node: fx.Node) -> list[fx.Node]:
        return [] if node is pick or op_name(node) == "size" else node.all_input_nodes

    found = reachable([token], sources)
    return pick in found and ids not in found
