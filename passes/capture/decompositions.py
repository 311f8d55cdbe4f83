"""Ops that are taken apart before the axis analysis, in tensor code, so that attention in them is seen as a product.

A decomposition takes the op's arguments and returns what the op returns, or NotImplemented where it does not cover
them. torch.export runs them while it traces the graph again; ops in place and nested graphs go then as well.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch._inductor.decomposition import decompositions as inductor_code

from smc_compile.passes.axes.axis_types import refuse
from smc_compile.passes.capture.export_lm import user_inputs
from smc_compile.passes.fx_tools import descendants, mutated_inputs, op_name, reachable

aten = torch.ops.aten
Decompositions = dict[Any, Callable[..., Any]]  # by op

ALWAYS: Decompositions = {}
COUNTING: Decompositions = {}  # only where a graph counts tokens along the positions, as in cumsum(ids != padding)


def decomposition(op: Any, table: Decompositions = ALWAYS) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register tensor code for an op; where it is used, it is counted under its name, as a rewrite is."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            counters["smc_compile"][function.__name__] += result is not NotImplemented
            return result

        table[op] = counted
        return function

    return register


def decompose(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without ops of the tables, writes in place and nested graphs.

    Raises:
        CacheError: naming a convolution of values that depend on tokens.
    """
    _drop_idle_dropouts(program.graph)
    dependent = sorted(descendants(user_inputs(program)[0]))
    counts = any(_is_count(node) for node in _reads_tokens(user_inputs(program)[0]))
    composites = _composites(program.graph)
    if _is_functional(program.graph) and not counts and not composites:
        return program  # decomposing traces everything again, which costs as much as the export
    _refuse_convolutions(dependent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of parts of torch that torch itself still uses
        return program.run_decompositions(ALWAYS | composites | (COUNTING if counts else {}))


def _composites(graph: fx.Graph) -> dict[Any, Callable[..., Any]]:
    """Ops of other libraries for which Inductor has tensor code, such as those that quantise activations."""
    ops = {node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    return {op: inductor_code[op] for op in ops if op.namespace not in ("aten", "prims") and op in inductor_code}


DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)


def _drop_idle_dropouts(graph: fx.Graph) -> None:
    """A dropout that drops nothing returns its input itself; where it is traced again, a later write would be lost."""
    if not any(mutated_inputs(node) for node in graph.nodes):
        return
    for node in [node for node in graph.nodes if node.target in DROPOUTS]:
        source, share, drops = list(node.args) + list(node.kwargs.values())
        if isinstance(source, fx.Node) and (share == 0 or not drops):
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _reads_tokens(ids: fx.Node) -> set[fx.Node]:
    """The nodes that depend on more than how many tokens there are."""
    return reachable([ids], lambda node: [user for user in node.users if user.target is not aten.sym_size.int])


def _is_count(node: fx.Node) -> bool:
    """A running sum of integers along an axis that grows with the sequence."""
    if node.target is not aten.cumsum.default:
        return False
    source, dim = node.args[:2]
    value = source.meta["val"]  # type: ignore[union-attr]
    return not value.is_floating_point() and not isinstance(value.shape[dim], int)


def _is_functional(graph: fx.Graph) -> bool:
    """No op writes in place, and none is left to decompose or inline (`with torch.no_grad()` makes a nested graph)."""
    nested = any(
        isinstance(node.target, torch._ops.HigherOrderOperator) or op_name(node) == "_add_batch_dim"
        for node in graph.nodes
    )
    return not nested and not any(mutated_inputs(node) or node.target in ALWAYS for node in graph.nodes)


def _refuse_convolutions(dependent: Iterable[fx.Node]) -> None:
    """Refuse before minutes go by what will be refused anyway: such models often unroll to very long graphs."""
    for node in dependent:
        if str(node.target).startswith("aten.conv"):
            raise refuse(node, f"{op_name(node)} has no position-by-position form")


# ---- in tensor code --------------------------------------------------------------------------------------------------


@decomposition(aten.einsum.default)
def einsum_as_matmul(equation: str, operands: Sequence[Tensor], path: object = None) -> Tensor:
    """Two-operand einsum as permute, reshape and matmul, so that attention written with it is seen as a product."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2 or "." in equation or any(len(set(term)) != len(term) for term in terms):
        return NotImplemented
    left, right = terms
    output = output or "".join(sorted(c for c in set(left + right) if (left + right).count(c) == 1))
    size = {c: n for term, x in zip(terms, operands, strict=True) for c, n in zip(term, x.shape, strict=True)}
    batch = [c for c in left if c in right and c in output]
    summed = [c for c in left if c in right and c not in output]
    rows = [c for c in left if c not in right]
    columns = [c for c in right if c not in left]
    if any(c not in output for c in rows + columns):
        return NotImplemented
    count = [prod(size[c] for c in group) for group in (rows, summed, columns)]
    a = operands[0].permute([left.index(c) for c in batch + rows + summed])
    b = operands[1].permute([right.index(c) for c in batch + summed + columns])
    batch_sizes = [size[c] for c in batch]
    a = a.reshape([*batch_sizes, count[0], count[1]]) if len(rows) != 1 or len(summed) != 1 else a
    b = b.reshape([*batch_sizes, count[1], count[2]]) if len(columns) != 1 or len(summed) != 1 else b
    y = torch.matmul(a, b)
    if len(rows) != 1 or len(columns) != 1:
        y = y.reshape([*batch_sizes, *(size[c] for c in rows), *(size[c] for c in columns)])
    order = batch + rows + columns
    return y.permute([order.index(c) for c in output])


@decomposition(aten.baddbmm.default)
def baddbmm_as_bmm(x: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``beta * x + alpha * left @ right`` as a product and a sum: attention scores with a bias added."""
    product = torch.bmm(left, right)
    product = product if alpha == 1 else product * alpha
    if beta == 0:
        return product
    return (x if beta == 1 else x * beta) + product


@decomposition(aten.index_put.default)
def index_put_as_where(x: Tensor, indices: Sequence[Any], values: Tensor, accumulate: bool = False) -> Tensor:
    """``x[mask] = value`` with one value for all places."""
    mask = indices[0]
    if len(indices) != 1 or mask is None or mask.dtype != torch.bool or values.dim() or accumulate:
        return NotImplemented
    return torch.where(mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim())), values, x)


@decomposition(aten.cumsum.default, COUNTING)
def running_count_as_attention(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """A running sum of integers over the positions, as attention with weight one on every position so far.

    What is summed at each position then stands in a cache like keys and values. Sums in float64 are exact below 2^53.
    """
    if x.dtype.is_floating_point or x.dtype.is_complex or isinstance(x.shape[dim], int):
        return NotImplemented
    values = x.movedim(dim, -1).double().unsqueeze(-1)  # [..., S, 1]
    scores = torch.matmul(values, values.transpose(-2, -1))  # [..., S, S]; only their shape is used
    length = torch.arange(x.shape[dim], device=x.device)
    seen = length[None, :] <= length[:, None]
    sums = torch.matmul(torch.where(seen, scores * 0 + 1, 0.0), values).squeeze(-1)
    return sums.movedim(-1, dim).to(dtype or torch.int64)


@decomposition(aten.gather.default, COUNTING)
def gather_as_index(x: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Tensor:
    """A gather from one row that is expanded over the other axes: that row at these indices."""
    others = [i for i in range(x.dim()) if i != dim % x.dim()]
    if any(isinstance(x.shape[i], int) and x.shape[i] != 1 and x.stride(i) != 0 for i in others):
        return NotImplemented
    if any(not isinstance(size, int) for size in x.shape):
        return NotImplemented
    row = x
    for i in reversed(others):
        row = row.select(i, 0)
    return row[index]
