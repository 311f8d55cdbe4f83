"""Ops that are taken apart before the axis analysis, so that attention written with them is seen as a product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor


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


def baddbmm_as_bmm(x: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``beta * x + alpha * left @ right`` as a product and a sum: attention scores with a bias added."""
    product = torch.bmm(left, right)
    product = product if alpha == 1 else product * alpha
    if beta == 0:
        return product
    return (x if beta == 1 else x * beta) + product


def index_put_as_where(x: Tensor, indices: Sequence[Any], values: Tensor, accumulate: bool = False) -> Tensor:
    """``x[mask] = value`` with one value for all places."""
    mask = indices[0]
    if len(indices) != 1 or mask is None or mask.dtype != torch.bool or values.dim() or accumulate:
        return NotImplemented
    return torch.where(mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim())), values, x)


def running_count_as_attention(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """A running sum of integers over the positions, as attention with weight one on every position so far.

    What is summed at each position then stands in a cache like keys and values. Sums in float64 are exact below 2^53.
    """
    if x.dtype.is_floating_point or x.dtype.is_complex or isinstance(x.shape[dim], int):
        return NotImplemented
    values = x.movedim(dim, -1).double().unsqueeze(-1)  # [..., S, 1]
    scores = torch.matmul(values, values.transpose(-2, -1))  # their value is of no account, that they stand [S, S] is
    length = torch.arange(x.shape[dim], device=x.device)
    seen = length[None, :] <= length[:, None]
    sums = torch.matmul(torch.where(seen, scores * 0 + 1, 0.0), values).squeeze(-1)
    return sums.movedim(-1, dim).to(dtype or torch.int64)


def gather_as_index(x: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Tensor:
    """A gather from rows that are all the same, one row expanded: the row at these indices."""
    others = [i for i in range(x.dim()) if i != dim % x.dim()]
    if any(isinstance(x.shape[i], int) and x.shape[i] != 1 and x.stride(i) != 0 for i in others):
        return NotImplemented
    if any(not isinstance(size, int) for size in x.shape):
        return NotImplemented
    row = x
    for i in reversed(others):
        row = row.select(i, 0)
    return row[index]


DECOMPOSED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.einsum.default: einsum_as_matmul,
    torch.ops.aten.index_put.default: index_put_as_where,
    torch.ops.aten.baddbmm.default: baddbmm_as_bmm,
}
# Only where a graph counts tokens of some kind along the positions, as in cumsum(ids != padding).
COUNTING: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.cumsum.default: running_count_as_attention,
    torch.ops.aten.gather.default: gather_as_index,
}
