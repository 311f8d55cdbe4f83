"""The last position is selected before the ops that act on each position alone, so the head runs for one position.

A step reads the logits of its last position. As written, the head (a product with the whole vocabulary) runs over every
position of a prompt first, and its logits [B, P, V] can be larger than the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import counters

from smc_compile.passes.fx_tools import output_values
from smc_compile.passes.ir import CachedLM

aten = torch.ops.aten
# Element by element, with nothing beside the tensor that has axes of its own.
UNARY: frozenset[Callable[..., Any]] = frozenset(
    [aten.tanh.default, aten.neg.default, aten.silu.default, aten.gelu.default, aten._to_copy.default]
)
SCALED: frozenset[Callable[..., Any]] = frozenset([aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor])


def early_head(cached: CachedLM) -> CachedLM:
    """The same model; ``prefill`` and ``advance`` multiply fewer rows with the head."""
    return replace(cached, prefill=choose_early(cached.prefill), advance=choose_early(cached.advance))


def choose_early(module: fx.GraphModule) -> fx.GraphModule:
    """Where the rows [B, V] are chosen from [B, T, V], choose before the last ops of those, in place."""
    choice = output_values(module.graph)[0]
    if choice.target is aten.select.int and choice.args[1] in (1, -2) and len(choice.users) == 1:
        while _acts_on_each_position(choice.args[0]):
            choice = _swap(module.graph, choice)
            counters["smc_compile"]["choices_moved"] += 1
    module.graph.lint()
    module.recompile()
    return module


def _acts_on_each_position(node: Any) -> bool:
    """Whether an op on [B, T, D], whose result has one reader, treats all positions alike."""
    if not isinstance(node, fx.Node) or len(node.users) > 1:
        return False
    if node.target is aten.linear.default or node.target in UNARY:
        return True
    return node.target in SCALED and not any(isinstance(value, fx.Node) for value in node.args[1:])


def _swap(graph: fx.Graph, choice: fx.Node) -> fx.Node:
    """select(op(x)) becomes op(select(x)); gives the new choice."""
    op = choice.args[0]
    assert isinstance(op, fx.Node)
    x, *rest = op.args
    with graph.inserting_before(choice):
        chosen = graph.call_function(aten.select.int, (x, 1, choice.args[2]))
        moved = graph.call_function(op.target, (chosen, *rest), op.kwargs)  # type: ignore[arg-type]
    choice.replace_all_uses_with(moved)
    graph.erase_node(choice)
    graph.erase_node(op)
    return chosen
