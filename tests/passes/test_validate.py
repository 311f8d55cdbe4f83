"""A cached form that is wrong in any way is a compile error, and so is a model whose positions read later ones."""

from __future__ import annotations

import math
import operator
from dataclasses import replace

import pytest
import torch
from helpers.models import CACHEABLE
from helpers.refused_models import REFUSED
from helpers.traces import Last, export_then, model, tokens, traced
from torch import fx

from smc_compile.errors import CacheError, ValidationError
from smc_compile.passes.cache.attention_ops import attention_over_cache, hidden_later, write_cache
from smc_compile.passes.cache.position_tables import at_positions
from smc_compile.passes.cache.synthesize import synthesize_cache
from smc_compile.passes.closeness import relative_error
from smc_compile.passes.ir import CachedLM
from smc_compile.passes.pipeline import capture
from smc_compile.passes.validate import check_causal, validate


def test_every_right_form_passes_with_rounding_errors_only() -> None:
    for name in ("gpt", "llama", "sliding_window", "sinks"):
        lm, cached, owned = traced(name)
        assert validate(lm, cached, owned()) < 1e-12


# ---- broken on purpose -----------------------------------------------------------------------------------------------


def edited(cached: CachedLM, edit) -> CachedLM:
    """A copy whose score and advance graphs were edited node by node."""
    regions = {}
    for region in ("score", "advance"):
        module = getattr(cached, region)
        graph = fx.Graph()
        graph.output(graph.graph_copy(module.graph, {}))
        for node in list(graph.nodes):
            edit(graph, node)
        regions[region] = fx.GraphModule(module, graph)
    return replace(cached, **regions)


def shift_slots(graph: fx.Graph, node: fx.Node) -> None:
    if node.target is write_cache:
        with graph.inserting_before(node):
            node.args = (node.args[0], graph.call_function(torch.roll, (node.args[1], 1)), node.args[2])


def lose_the_mask(graph: fx.Graph, node: fx.Node) -> None:
    if node.target is hidden_later:
        with graph.inserting_before(node):
            last = graph.call_function(operator.add, (node.args[0], 10**6))
        node.args = (last, node.args[1])


def shift_positions(graph: fx.Graph, node: fx.Node) -> None:
    if node.target is at_positions:
        with graph.inserting_before(node):
            shifted = graph.call_function(operator.sub, (node.args[5], 1))
        node.args = (*node.args[:5], shifted, *node.args[6:])


def show_padding(graph: fx.Graph, node: fx.Node) -> None:
    """Keys of a shorter prompt's padding at positions that a query sees."""
    if node.target is hidden_later:
        with graph.inserting_before(node):
            seen = graph.call_function(torch.clamp, (node.args[1], None, 4))
        node.args = (node.args[0], seen)


def swap_prompts(graph: fx.Graph, node: fx.Node) -> None:
    if node.target is attention_over_cache:
        prompts = [n for n in graph.nodes if n.name.startswith("prompt_")]
        others = [prompts[prompts.index(mine) - 2] for mine in node.args[1:3]]  # of the other layer
        node.args = (node.args[0], *others, *node.args[3:])


@pytest.mark.parametrize("edit", [shift_slots, lose_the_mask, shift_positions, show_padding, swap_prompts])
def test_a_broken_cached_form_is_a_compile_error(edit) -> None:
    lm, cached, owned = traced("gpt")
    with pytest.raises(ValidationError, match="does not reproduce the original") as caught:
        validate(lm, edited(cached, edit), owned())
    assert "largest relative difference" in caught.value.why


def test_a_perturbed_table_is_a_compile_error() -> None:
    lm, cached, owned = traced("gpt")

    class Perturbed(torch.nn.Module):
        def forward(self, *args):
            return tuple(1.001 * table for table in cached.tables(*args))

    with pytest.raises(ValidationError, match="does not reproduce"):
        validate(lm, replace(cached, tables=Perturbed()), owned())


def test_advance_must_agree_with_score() -> None:
    lm, cached, owned = traced("gpt")
    wrong = edited(cached, shift_positions).advance
    with pytest.raises(ValidationError):
        validate(lm, replace(cached, advance=wrong), owned())


# ---- causality -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CACHEABLE)
def test_causal_models_pass(name: str) -> None:
    lm, _, owned = traced(name)
    check_causal(lm, tokens(2, 9, model(name).vocab), owned())


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("bidirectional", "scaled_dot_product_attention"),
        ("bidirectional_eager", "softmax"),
        ("peeking_mask", "scaled_dot_product_attention"),
    ],
)
def test_a_model_that_reads_later_positions_is_refused_by_op(name: str, op: str) -> None:
    lm, owned = capture(Last(REFUSED[name][0]()), torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(CacheError, match="not causal") as caught:
        validate(lm, synthesize_cache(lm), owned())
    assert f"the first op that leaks is `{op}" in caught.value.why
    assert "models.py:" in caught.value.why


# ---- tables that change as text grows --------------------------------------------------------------------------------


def positions_over_length(x):
    return (x + (torch.arange(x.shape[1]) / x.shape[1])[:, None])[:, -1]


def positions_from_the_end(x):
    return (x + torch.arange(x.shape[1] - 1, -1, -1)[:, None])[:, -1]


def normalised_table(x):
    return (x * torch.arange(x.shape[1]).double().softmax(0)[:, None])[:, -1]


@pytest.mark.parametrize("then", [positions_over_length, positions_from_the_end, normalised_table])
def test_tables_that_depend_on_the_length_are_refused(then) -> None:
    lm = export_then(then)
    weights = [torch.randn(11, 8, dtype=torch.float64)]
    with pytest.raises(CacheError, match=r"changes when the sequence grows|total length") as caught:
        validate(lm, synthesize_cache(lm), weights)
    assert "torch.arange" in caught.value.fix


# ---- the measure -----------------------------------------------------------------------------------------------------


def test_relative_error_is_in_units_of_the_spread_and_infinities_must_agree() -> None:
    x = torch.tensor([0.0, 10.0, float("-inf")])
    assert relative_error(x, x) == 0.0
    assert relative_error(x + torch.tensor([0.0, 1.0, 0.0]), x) == pytest.approx(1 / x[:2].std().item())
    assert relative_error(torch.tensor([0.0, 10.0, -1e30]), x) == float("inf")
    assert relative_error(torch.tensor([0.0, float("nan"), float("-inf")]), x) == float("inf")


def test_a_cut_may_move_by_rounding_only():
    inf = math.inf
    expected = torch.tensor([[3.0, 2.0, 1.00, -inf, -inf]])
    at_the_edge = torch.tensor([[3.0, 2.0, -inf, 1.01, -inf]])
    far_above = torch.tensor([[-inf, 2.0, 1.0, -inf, -inf]])
    assert relative_error(at_the_edge, expected) == inf
    assert relative_error(at_the_edge, expected, cut_may_move=True) == 0
    assert relative_error(far_above, expected, cut_may_move=True) > 1
    for broken in (math.nan, inf):
        assert relative_error(torch.tensor([[3.0, 2.0, broken, -inf, -inf]]), expected, cut_may_move=True) == inf
