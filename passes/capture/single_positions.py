"""Look-ups of one known position, however they are written, as slices: ``x[:, [-1]]`` is ``x[:, -1:]``.

nanoGPT runs its head on ``x[:, [-1], :]``; others use ``index_select`` with ``torch.tensor([S - 1])``, or ``narrow``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from smc_compile.passes.fx_tools import arguments, op_name
from smc_compile.passes.rewrites import new_node, rewrite

aten = torch.ops.aten
END = 2**63 - 1
_KEEPS = frozenset(
    ["lift_fresh_copy", "lift_fresh", "detach", "detach_", "to", "_to_copy", "clone", "alias", "view", "reshape",
     "unsqueeze", "squeeze", "contiguous"]
)  # fmt: skip


@rewrite(aten.index.Tensor)
def index_of_one_position(node: fx.Node) -> fx.Node | None:
    """``x[:, [-1]]``; ``x[:, i]`` with a tensor of no axes."""
    source, indices = node.args
    used = [(d, index) for d, index in enumerate(indices) if index is not None]  # type: ignore[union-attr, arg-type]
    if len(used) != 1:
        return None
    ((d, index),) = used
    at = known_integer(index)
    rank = index.meta["val"].dim()
    if at is None or rank > 1:
        return None
    return _sliced(node, source, d, at) if rank else new_node(node, aten.select.int, source, d, at)


@rewrite(aten.index_select.default)
def index_select_of_one_position(node: fx.Node) -> fx.Node | None:
    """``x.index_select(1, torch.tensor([S - 1]))``."""
    source, d, index = node.args
    at = known_integer(index)
    return None if at is None else _sliced(node, source, d, at)


@rewrite(aten.narrow.default)
def narrow_as_slice(node: fx.Node) -> fx.Node | None:
    """``x.narrow(1, S - 1, 1)``."""
    bound = arguments(node)
    start, length = bound["start"], bound["length"]
    if length == 1:
        return _sliced(node, bound["input"], bound["dim"], start)
    end = start + length if isinstance(start, int) and isinstance(length, int) else None
    if end is None and start == 0:
        end = length
    return None if end is None else new_node(node, aten.slice.Tensor, bound["input"], bound["dim"], start, end)


def _sliced(node: fx.Node, source: Any, d: Any, at: Any) -> fx.Node:
    """The slice that holds one position, which may be a node for an integer."""
    length = source.meta["val"].shape[d]
    value = at.meta["val"] if isinstance(at, fx.Node) else at
    if value == -1 or _same(value, length - 1):
        return new_node(node, aten.slice.Tensor, source, d, -1, END)
    if isinstance(at, fx.Node):
        end = new_node(node, torch.ops.aten.add, at, 1)
        end.meta["val"] = value + 1
        return new_node(node, aten.slice.Tensor, source, d, at, end)
    return new_node(node, aten.slice.Tensor, source, d, at, at + 1)


def _same(value: Any, other: Any) -> bool:
    """Whether two sizes are the same expression."""
    values = [v.node.expr if isinstance(v, torch.SymInt) else v for v in (value, other)]
    return bool(values[0] == values[1])


def known_integer(node: Any) -> Any:
    """The one integer that a tensor holds, as a number or as the node of a size; None where that is not known."""
    while isinstance(node, fx.Node) and op_name(node) in _KEEPS:
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return None
    name = op_name(node)
    if name in ("stack", "cat") and len(node.args[0]) == 1:  # type: ignore[arg-type]
        return known_integer(node.args[0][0])  # type: ignore[index]
    if name in ("scalar_tensor", "full") and node.meta["val"].numel() == 1:
        value = node.args[0] if name == "scalar_tensor" else node.args[1]
        whole = not node.meta["val"].dtype.is_floating_point
        return value if whole and isinstance(value, int | fx.Node) and not isinstance(value, bool) else None
    constant = node.meta.get("constant")
    if constant is None or constant.numel() != 1 or constant.dtype not in (torch.int64, torch.int32):
        return None
    return int(constant)
