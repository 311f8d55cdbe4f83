"""``y[mask] = f(x[mask])`` is ``where(mask, f(x), y)`` if f treats row by row; anything else is left as it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.traces import Step, export, op_names, rows_of, tokens
from torch import Tensor

from smc_compile.errors import CacheError
from smc_compile.passes.cache.synthesize import synthesize_cache
from smc_compile.passes.pipeline import capture
from smc_compile.passes.validate import validate

WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def put(x: Tensor, mask: Tensor, f) -> Tensor:
    y = torch.zeros_like(x)
    y[mask] = f(x[mask])
    return y


def by_token(x: Tensor) -> Tensor:
    """Tokens of one kind go through a layer, those of another through another."""
    first = x[..., 0] > 0  # [B, S]
    y = put(x, first, lambda rows: F.gelu(F.linear(rows, WEIGHT)))
    y[~first] = F.layer_norm(x[~first], (8,)) * 2
    return x + y


def by_head(x: Tensor) -> Tensor:
    """Rows of [B, S, 2, 4] picked by a mask over its first three axes, put into what was there before."""
    x = x.unflatten(-1, (2, 4))
    y = x.clone()
    y[x[..., 0] > 0.5] = torch.tanh(x[x[..., 0] > 0.5])
    return y.flatten(2)


def by_request(x: Tensor) -> Tensor:
    """A mask over requests that depends on no token."""
    return x + put(x, torch.zeros(x.shape[0]) == 0, lambda rows: F.linear(rows, WEIGHT))


WAYS = {f.__name__: f for f in (by_token, by_head, by_request)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_graph_computes_the_step_without_picking(way: str, batch: int) -> None:
    step = Step(lambda x: WAYS[way](x)[:, -1])
    lm, owned = capture(step, tokens(batch, 2))
    assert not {"index.Tensor", "index_put.default"} & set(op_names(lm.graph))
    for length in (2, 9):
        ids = tokens(batch, length)
        torch.testing.assert_close(rows_of(lm, ids, owned()), step(ids).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_the_cached_form_reproduces_it(way: str) -> None:
    def then(x: Tensor) -> Tensor:
        x = WAYS[way](x)
        return F.scaled_dot_product_attention(x, x, x.sin(), is_causal=True)[:, -1]

    lm, owned = capture(Step(then), tokens(2, 2))
    assert validate(lm, synthesize_cache(lm), owned()) < 1e-12


def test_golden_picked_rows() -> None:
    lm = export(Step(lambda x: put(x, x[..., 0] > 0, torch.tanh)[:, -1]))
    names = [name for name in op_names(lm.graph) if "sym_size" not in name]
    start = names.index("flatten.using_ints")
    assert names[start:] == [
        "flatten.using_ints",
        "tanh.default",
        "reshape.default",
        "unsqueeze.default",
        "where.self",
        "select.int",
    ]


MIXED = {
    "a sum over the picked rows": lambda x: put(x, x[..., 0] > 0, lambda rows: rows - rows.mean(0)),
    "a running sum": lambda x: put(x, x[..., 0] > 0, lambda rows: rows.cumsum(0)),
    "each row with each": lambda x: put(x, x[..., 0] > 0, lambda rows: rows * (rows[:, :1] * rows[:, 0]).sum(1, True)),
    "their number": lambda x: put(x, x[..., 0] > 0, lambda rows: rows / rows.shape[0]),
    "put elsewhere": lambda x: x.index_put((x[..., 1] > 0,), x[x[..., 1] > 0].flip(0)),
}


@pytest.mark.parametrize("then", MIXED.values(), ids=MIXED)
def test_rows_that_meet_are_refused(then) -> None:
    with pytest.raises(CacheError, match=r"data-dependent shape|cannot be traced"):
        synthesize_cache(export(Step(lambda x: then(x)[:, -1])))
