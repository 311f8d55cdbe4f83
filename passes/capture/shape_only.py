"""Ops that read a tensor's shape, or overwrite its values, as ops that do not seem to depend on its values.

Filled tensors (``zeros``, ``new_zeros``, ``zeros_like``, ...) become ``full``; ``a.expand_as(x)`` and ``a.view_as(x)``
take sizes; ``copy(x, y)``, which writing into a slice leaves behind, is ``y`` in the shape of ``x``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from smc_compile.passes.rewrites import new_node, rewrite, sizes_of

aten = torch.ops.aten
FILLS = {aten.zeros.default: 0, aten.ones.default: 1, aten.empty.memory_format: 0}  # of sizes
FILLS_NEW = {aten.new_zeros.default: 0, aten.new_ones.default: 1, aten.new_empty.default: 0}  # of a tensor and sizes
FILLS_LIKE = {aten.zeros_like.default: 0, aten.ones_like.default: 1, aten.empty_like.default: 0}  # of a tensor
SHAPED_AS = {aten.expand_as.default: aten.expand.default, aten.view_as.default: aten.view.default,
             aten.reshape_as.default: aten.reshape.default}  # fmt: skip


@rewrite(*FILLS)
def fill(node: fx.Node) -> fx.Node:
    return _full(node, node.args[0], FILLS[node.target])  # type: ignore[index]


@rewrite(*FILLS_NEW)
def fill_new(node: fx.Node) -> fx.Node:
    return _full(node, node.args[1], FILLS_NEW[node.target])  # type: ignore[index]


@rewrite(*FILLS_LIKE)
def fill_like(node: fx.Node) -> fx.Node:
    return _full(node, sizes_of(node, node.args[0]), FILLS_LIKE[node.target])  # type: ignore[index]


@rewrite(aten.full_like.default)
def full_like(node: fx.Node) -> fx.Node:
    return _full(node, sizes_of(node, node.args[0]), node.args[1])


@rewrite(aten.new_full.default)
def new_full(node: fx.Node) -> fx.Node:
    return _full(node, node.args[1], node.args[2])


@rewrite(*SHAPED_AS)
def shaped_as(node: fx.Node) -> fx.Node:
    source, other = node.args
    return new_node(node, SHAPED_AS[node.target], source, sizes_of(node, other))  # type: ignore[index]


@rewrite(aten.copy.default)
def copied_over(node: fx.Node) -> fx.Node:
    old, new = node.args[:2]
    cast = new_node(node, aten._to_copy.default, new, dtype=node.meta["val"].dtype)
    return new_node(node, aten.expand.default, cast, sizes_of(node, old))


def _full(node: fx.Node, sizes: Any, fill: Any) -> fx.Node:
    value = node.meta["val"]
    return new_node(node, aten.full.default, sizes, fill, dtype=value.dtype, device=value.device)
