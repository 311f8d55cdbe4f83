"""How each ATen op carries axes from its inputs to its outputs: one small rule a family; without a rule, refused."""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch import fx

from smc_compile.errors import CacheError
from smc_compile.passes.axes import key_selection, products, selections, shapes  # noqa: F401  they register rules
from smc_compile.passes.axes.axis_types import Axes, K, Typing, refuse
from smc_compile.passes.axes.helpers import (
    RULES,
    Rule,
    axis_index,
    broadcast,
    dims_of,
    plain,
    require_plain,
    rule,
    tensors,
)
from smc_compile.passes.fx_tools import arguments, op_name


def rule_for(node: fx.Node) -> Rule:
    """The rule of a node's op; pointwise ops share one, found by their tag."""
    if node.target is getitem:
        return _getitem
    name = op_name(node)
    if name in RULES:
        return RULES[name]
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        return pointwise
    raise refuse(node, f"{name} has no position-by-position form")


@rule("clone", "contiguous", "_to_copy", "to", "detach", "alias", "lift_fresh_copy", "type_as", "where", "masked_fill",
      "rand_like", "randn_like", "empty_like", "zeros_like", "ones_like", "full_like", "exponential", "exponential_",
      "fill", "log_sigmoid", "nan_to_num", "float_power", "clamp", "clip", "isin", "uniform", "multiply", "divide",
      "true_divide", "subtract", "negative", "absolute", "__or__", "__and__", "__xor__", "conj", "_conj", "real",
      "imag", "resolve_conj", "resolve_neg")  # fmt: skip
def pointwise(typing: Typing, node: fx.Node) -> Axes:
    return broadcast(typing, node, tensors([*node.args, *node.kwargs.values()]))


@rule("dropout", "feature_dropout", "alpha_dropout", "native_dropout")
def dropout(typing: Typing, node: fx.Node) -> Axes:
    bound = arguments(node)
    if bound.get("train") and bound.get("p"):
        raise CacheError(
            "the model is in training mode with dropout", f"active dropout at {node.name}", "call model.eval() first"
        )
    return typing.of(bound["input"])


def _getitem(typing: Typing, node: fx.Node) -> Axes:
    return typing.axes[node.args[0]][node.args[1]]


@rule("mean", "sum", "nansum", "var", "std", "amax", "amin", "logsumexp", "prod", "any", "all", "norm",
      "linalg_vector_norm", "argmax", "argmin", "count_nonzero", "max", "min", "var_mean", "std_mean", "aminmax",
      "median")  # fmt: skip
def reduction(typing: Typing, node: fx.Node) -> Any:
    bound = arguments(node)
    if len(tensors(node.args)) == 2:  # max(a, b) is pointwise
        return pointwise(typing, node)
    source = typing.of(bound["input"])
    dims = dims_of(bound.get("dim"), len(source))
    for d in dims:
        require_plain(node, source[d], keys_allowed=True)
    if any(source[d] == (K,) for d in dims):
        key_selection.refuse_numbers_of_keys(node)
    axes = [() if i in dims else axis for i, axis in enumerate(source) if i not in dims or bound.get("keepdim")]
    return [tuple(axes)] * len(node.meta["val"]) if isinstance(node.meta["val"], (tuple, list)) else tuple(axes)


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "logcumsumexp", "cumprod", "sort", "argsort",
      "flip", "roll", "cummax")  # fmt: skip
def along_axis(typing: Typing, node: fx.Node) -> Any:
    bound = arguments(node)
    source = typing.of(bound["input"])
    for d in dims_of(bound.get("dim", bound.get("dims", -1)), len(source)):
        require_plain(node, source[d], keys_allowed="softmax" in op_name(node))
    return [source] * len(node.meta["val"]) if isinstance(node.meta["val"], (tuple, list)) else source


@rule("topk", "kthvalue")
def topk(typing: Typing, node: fx.Node) -> Any:
    if op_name(node) == "topk" and key_selection.is_over_keys(typing, node):
        return key_selection.choice(typing, node)
    bound = arguments(node)
    source = list(typing.of(bound["input"]))
    d = axis_index(bound["dim"], len(source))
    require_plain(node, source[d])
    if isinstance(bound["k"], fx.Node):
        raise refuse(node, "as many entries are chosen as the length of the sequence says")
    if op_name(node) == "kthvalue":
        kept = [*source[:d], *([()] if bound["keepdim"] else []), *source[d + 1 :]]
    else:
        kept = [*source[:d], plain(int(bound["k"])), *source[d + 1 :]]
    return [tuple(kept)] * 2


@rule("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def normalise(typing: Typing, node: fx.Node) -> Any:
    bound = arguments(node)
    source = typing.of(bound["input"])
    for axis in source[-len(bound["normalized_shape"]) :]:
        require_plain(node, axis)
    if isinstance(node.meta["val"], (tuple, list)):
        reduced = source[: -len(bound["normalized_shape"])] + ((),) * len(bound["normalized_shape"])
        return [source] + [reduced] * (len(node.meta["val"]) - 1)
    return source


@rule("embedding")
def embedding(typing: Typing, node: fx.Node) -> Axes:
    bound = arguments(node)
    if typing.is_dependent(bound["weight"]):
        raise refuse(node, "an embedding table depends on the tokens")
    return (*typing.of(bound["indices"]), plain(node.meta["val"].shape[-1]))


@rule("one_hot")
def one_hot(typing: Typing, node: fx.Node) -> Axes:
    return (*typing.of(node.args[0]), plain(int(node.meta["val"].shape[-1])))


@rule("multinomial")
def multinomial(typing: Typing, node: fx.Node) -> Axes:
    axes = typing.of(node.args[0])
    return (*axes[:-1], plain(int(node.meta["val"].shape[-1])))


@rule("view_as_complex")
def view_as_complex(typing: Typing, node: fx.Node) -> Axes:
    source = typing.of(node.args[0])
    require_plain(node, source[-1])
    return source[:-1]


@rule("view_as_real")
def view_as_real(typing: Typing, node: fx.Node) -> Axes:
    return (*typing.of(node.args[0]), plain(2))
