"""A look-up at one known index is a slice: index_select, gather and ``x[:, tensor]`` become ``x[:, v : v + 1]``."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from smc_compile.passes.fx_tools import op_name
from smc_compile.passes.loop.tensor_info import tensor_info
from smc_compile.passes.loop.token_labels import LOOKUPS, Layouts, LookupIndex


def simplify_lookups(layouts: Layouts) -> int:
    """Rewrites, in place, look-ups in floating tensors whose index is a known number; returns how many."""
    count = 0
    for node in layouts.nodes:
        if op_name(node) not in LOOKUPS or not any((node, source) in layouts.places for source in node.all_input_nodes):
            continue
        info = tensor_info(node)
        if info is None or not info.dtype.is_floating_point:
            continue
        index = _in_brackets(layouts, node) if op_name(node) == "getitem" else _along_axis(layouts, node)
        if index is not None:
            table = node.args[0]
            node.op, node.target, node.args, node.kwargs = "call_function", operator.getitem, (table, index), {}
            count += 1
    return count


def _position(v: int) -> slice:
    return slice(v, None if v == -1 else v + 1)


def _along_axis(layouts: Layouts, node: fx.Node) -> tuple[slice, ...] | None:
    """The slices that stand for index_select(x, dim, index), gather(x, dim, index), take_along_dim(x, index, dim)."""
    name = op_name(node)
    order = ("indices", "dim") if name == "take_along_dim" else ("dim", "index")
    given: dict[str, Any] = {**dict(zip(order, node.args[1:], strict=False)), **node.kwargs}
    index, dim = given.get("index", given.get("indices")), given.get("dim")
    place = layouts.places.get((node, index)) if isinstance(index, fx.Node) else None
    table = tensor_info(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    if place is None or place.index is None or table is None or not isinstance(dim, int):
        return None
    dim %= len(table.shape)
    expected = (1,) if name == "index_select" else (*table.shape[:dim], 1, *table.shape[dim + 1 :])
    broadcast = name == "take_along_dim" and len(place.shape) == len(expected) and place.shape[dim] == 1
    scalar = name == "index_select" and place.shape == ()
    if place.shape != expected and not broadcast and not scalar:
        return None
    return (*(slice(None),) * dim, _position(place.index))


def _in_brackets(layouts: Layouts, node: fx.Node) -> tuple[Any, ...] | None:
    """The subscript of ``x[:, i]`` or ``x[arange(B), i]`` with the position that i is known to hold; None if not."""
    index = node.args[1] if isinstance(node.args[1], tuple | list) else (node.args[1],)
    places: dict[int, LookupIndex] = {}
    for at, item in enumerate(index):
        if isinstance(item, fx.Node):
            if (node, item) not in layouts.places:
                return None
            places[at] = layouts.places[node, item]
    plain = list(index)
    if len(places) == 1:
        ((at, place),) = places.items()
        if place.index is None or place.shape not in ((), (1,)):
            return None
        plain[at] = _position(place.index) if place.shape else place.index
        return tuple(plain)
    table = tensor_info(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    if list(places) != [0, 1] or table is None or places[1].index is None:
        return None
    rows, column = places[0], places[1]
    if not rows.counts or rows.shape != table.shape[:1] or column.shape not in ((), (1,), rows.shape):
        return None
    return (slice(None), column.index, *plain[2:])
