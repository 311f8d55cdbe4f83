"""A mask that is all ones masks nothing: ``mask & ones`` becomes ``mask``.

Loops hand ``attention_mask=torch.ones_like(ids)`` to models that then look up, for each row of the batch, which keys
are padding. Nothing is; without this pass the look-up would stand as a table with a batch axis.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from smc_compile.passes.fx_tools import erase_dead_code, mutated_inputs, op_name

_ONES = frozenset(["ones", "ones_like", "new_ones"])
_KEEPS = frozenset(
    ["to", "bool", "long", "int", "float", "type", "contiguous", "clone", "detach", "getitem", "narrow", "select",
     "view", "reshape", "expand", "unsqueeze", "squeeze", "flatten", "index_select"]
)  # fmt: skip
_AND = frozenset(["and_", "__and__", "logical_and", "bitwise_and"])


def drop_ones_masks(step: fx.GraphModule) -> int:
    """Rewrites the graph in place; returns how many products with ones were dropped."""
    written = {target for node in step.graph.nodes for target in mutated_inputs(node)}
    ones: set[fx.Node] = set()
    dropped = 0
    for node in step.graph.nodes:
        if node not in written and _is_ones(node, ones):
            ones.add(node)
        if op_name(node) not in _AND or len(node.args) != 2:
            continue
        kept = [arg for arg in node.args if arg not in ones]
        if len(kept) == 1 and isinstance(kept[0], fx.Node):
            node.replace_all_uses_with(kept[0])
            dropped += 1
    if dropped:
        erase_dead_code(step.graph)
        step.recompile()
    return dropped


def _is_ones(node: fx.Node, ones: set[fx.Node]) -> bool:
    name = op_name(node)
    if name in _ONES:
        return True
    if name in ("cat", "concat", "concatenate"):
        return all(source in ones for source in node.all_input_nodes)
    return name in _KEEPS and next(_sources(node), None) in ones


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """A node's first argument, if that is a node."""
    yield from (arg for arg in node.args[:1] if isinstance(arg, fx.Node))
