"""Ops that read shapes only are rewritten, so that what follows them does not seem to depend on tokens."""

from __future__ import annotations

import pytest
import torch
from helpers.traces import Step, export, export_then, op_names, rows_of, tokens
from torch._dynamo.utils import counters

from smc_compile.passes.axes.infer import type_axes
from smc_compile.passes.cache.synthesize import synthesize_cache
from smc_compile.passes.rewrites import CAPTURED


def assembled(x):
    """[B, S, 10]: a new tensor written in two parts."""
    y = x.new_empty(*x.shape[:2], 10)
    y[..., :8].copy_(x)
    y[..., 8:].copy_(x.mean(-1, keepdim=True))
    return y


REWRITTEN = {
    "zeros beside a value": ("fill_new", lambda x: x * x.new_zeros(x.shape), {"new_zeros.default"}, {"full.default"}),
    "ones of a length": ("fill", lambda x: x * torch.ones(x.shape[1], 1), {"ones.default"}, {"full.default"}),
    "a number for each place": (
        "new_full",
        lambda x: x + x.new_full(x.shape, 2.5),
        {"new_full.default"},
        {"full.default"},
    ),
    "a gate spread over features": (
        "shaped_as",
        lambda x: x * x.mean(-1, True).expand_as(x),
        {"expand_as.default"},
        {"expand.default"},
    ),
    "a view like another": ("shaped_as", lambda x: x.flatten(1).view_as(x), {"view_as.default"}, {"view.default"}),
    "a tensor written in parts": (
        "copied_over",
        assembled,
        {"copy.default", "copy_.default"},
        {"full.default", "slice_scatter.default"},
    ),
}


@pytest.mark.parametrize(("rewrite", "then", "gone", "there"), REWRITTEN.values(), ids=REWRITTEN)
def test_what_reads_a_shape_is_rewritten_and_computes_the_same(rewrite, then, gone, there) -> None:
    counters.clear()
    step = Step(lambda x: then(x)[:, -1])
    lm = export(step)
    names = set(op_names(lm.graph))
    assert not gone & names
    assert there <= names
    assert counters["smc_compile"][rewrite] >= 1
    ids = tokens(2, 6)
    assert torch.equal(rows_of(lm, ids, [step.embed]), step(ids))


def test_fills_depend_on_no_token_and_make_no_table() -> None:
    lm = export_then(lambda x: (x + x.new_ones(x.shape[0], x.shape[1], 1))[:, -1])
    (fill,) = [node for node in lm.graph.nodes if op_names_of(node) == "full.default"]
    assert fill not in type_axes(lm).dependent
    assert synthesize_cache(lm).table_axes == ()


def op_names_of(node) -> str:
    return getattr(node.target, "__name__", "")


def test_a_graph_without_such_reads_is_left_alone() -> None:
    counters.clear()
    export_then(lambda x: (x * 2).tanh()[:, -1])
    assert not {rewrite.__name__ for rewrite in CAPTURED.values()} & set(counters["smc_compile"])
