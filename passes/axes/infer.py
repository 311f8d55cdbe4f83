"""Type every axis of every token-dependent value: batch, query position, key position, or other.

An axis is a tuple of atoms, outermost first, so that a reshape only regroups atoms: ``view(B*S, D)`` makes an axis of
two atoms. A size-1 axis has none. An op that would mix positions or requests is refused here, by name.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from smc_compile.passes.axes.axis_types import (
    B,
    Q,
    Typing,
    expression,
    refuse,
)
from smc_compile.passes.axes.key_selection import follow_slots
from smc_compile.passes.axes.pointwise import rule_for
from smc_compile.passes.ir import CausalLM


def type_axes(lm: CausalLM) -> Typing:
    """Assign axes to every token-dependent node of ``lm``, in one pass in program order.

    Raises:
        CacheError: naming the op that mixes positions or requests, or that no rule covers.
    """
    typing = Typing(lm, expression(lm.ids.meta["val"].shape[1]))
    typing.dependent.add(lm.ids)
    typing.axes[lm.ids] = ((B,), (Q,))
    type_nodes(typing)
    return typing


def type_nodes(typing: Typing) -> None:
    """Assign axes to every node that depends on those that have axes already.

    Raises:
        CacheError: as ``type_axes``.
    """
    for node in typing.lm.graph.nodes:
        if node.op != "call_function" or not _depends(typing, node):
            continue
        typing.dependent.add(node)
        if any(source in typing.after_last for source in node.all_input_nodes):
            typing.after_last.add(node)
        follow_slots(typing, node)
        typing.axes[node] = rule_for(node)(typing, node)
        _check(typing, node)


def _depends(typing: Typing, node: fx.Node) -> bool:
    """Whether a node's *value* depends on the tokens; sizes do not count."""
    if not _has_tensor(node.meta.get("val")):
        return False
    return any(source in typing.dependent for source in node.all_input_nodes)


def _has_tensor(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_has_tensor(item) for item in value)
    return isinstance(value, torch.Tensor)


def _check(typing: Typing, node: fx.Node) -> None:
    """The typed axes must have the sizes of the traced value: a wrong rule is caught here, not at run time."""
    values, axes = node.meta["val"], typing.axes[node]
    pairs = zip(values, axes, strict=True) if isinstance(axes, list) else [(values, axes)]
    for value, typed in pairs:
        if not isinstance(value, torch.Tensor):
            continue
        sizes = [sympy.expand(typing.axis_size(axis)) for axis in typed]
        actual = [sympy.expand(expression(size)) for size in value.shape]
        if sizes != actual:
            raise refuse(node, f"axis analysis found sizes {sizes}, the trace has {actual}")
