"""Which integers of a graph are a*S + b: fitted to several lengths, derived from the shapes of one, or refused."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from smc_compile.passes.fx_tools import call_node
from smc_compile.passes.loop.concretise import concretise
from smc_compile.passes.loop.leaves import flatten, replace_leaves
from smc_compile.passes.loop.lengths import (
    LENGTH,
    Affine,
    Lengths,
    TracedCalls,
    UnclearLengths,
    Uneven,
    change_evenly,
    first_off,
    fit,
    fit_all,
    longest_text,
    same_but_for_length,
    shape_of,
    sizes_of,
    solve_lengths,
)
from smc_compile.passes.loop.tensor_info import tensor_info

B, L, D, V = 2, 7, 12, 11
small = st.integers(-20, 20)


# ---- from several lengths ------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(small, small, st.lists(st.integers(1, 50), min_size=2, max_size=5, unique=True))
def test_fit_finds_the_line(slope, offset, lengths):
    affine = Affine(slope, offset)
    assert fit([(length, affine.at(length)) for length in lengths]) == affine


@pytest.mark.parametrize("values", [(2, 4, 8), (3, 3, 4), (3, 4, 4)])
def test_fit_refuses_what_is_off_the_line(values):
    samples = list(zip((4, 5, 6), values, strict=True))
    assert fit(samples) is None
    assert first_off(samples) == samples[2]


def test_a_slope_that_is_no_integer_does_not_fit():
    samples = [(2, 1), (4, 2), (6, 3)]
    assert fit(samples) is None
    assert first_off(samples) is None


def call(target: Callable[..., Any], *args: Any) -> fx.Node:
    graph = fx.Graph()
    return graph.call_function(target, tuple(graph.placeholder("x") if arg is None else arg for arg in args))


def test_fit_all_leaves_constants_out_and_names_what_is_uneven():
    node = call(torch.narrow, None, 1, 0, 4)
    grows, stays = [(4, 9), (5, 11), (6, 13)], [(4, 1), (5, 1), (6, 1)]
    assert fit_all({(node, 0): grows, (node, 1): stays}) == {(node, 0): Affine(2, 1)}
    uneven = [(4, 2), (5, 2), (6, 3)]
    with pytest.raises(Uneven) as caught:
        fit_all({(node, 0): grows, (node, 1): uneven})
    assert (caught.value.leaf, caught.value.samples, caught.value.off) == ((node, 1), uneven, (6, 3))


# ---- one call ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "sizes"),
    [
        (call(torch.arange, 4), [4]),
        (call(torch.full, (4, 5), 9), [4, 5]),  # 9 is a value
        (call(torch.Tensor.__getitem__, None, 3), []),
        (call(torch.add, None, 4), []),
        (call(torch.transpose, None, 1, 2), []),
        (call(torch.narrow, None, 1, 0, 4), [1, 0, 4]),
        (call(torch.reshape, None, (2, -4)), [2, -4]),
    ],
)
def test_sizes_of_a_call(node, sizes):
    assert [size for _, size in sizes_of(node)] == sizes
    assert all(flatten(node)[at] == size for (_, at), size in sizes_of(node))


def test_a_slice_is_a_size_and_an_index_beside_it_is_none():
    graph = fx.Graph()
    node = graph.call_function(operator.getitem, (graph.placeholder("x"), (3, slice(1, 4), 5)))
    assert [size for _, size in sizes_of(node)] == [1, 4]


def test_axes_must_change_evenly():
    lengths = (3, 4, 6)
    assert change_evenly(lengths, [torch.empty(2, 2 * n + 1) for n in lengths])
    assert not change_evenly(lengths, [torch.empty(n // 2) for n in lengths])
    assert not change_evenly(lengths, [(torch.empty(2), torch.empty(n * n)) for n in lengths])
    assert not change_evenly(lengths, [torch.empty(2), torch.empty(2), torch.empty(2, 1)])
    assert not change_evenly(lengths, [[torch.empty(1)] * n for n in lengths])


def test_shapes_that_agree_but_for_the_length():
    assert same_but_for_length((2, 16, 4), (2, 3, 4), [16], 3)
    assert not same_but_for_length((2, 16, 4), (2, 5, 4), [16], 3)
    assert not same_but_for_length((2, 16), (2, 3, 1), [16], 3)
    nested = (torch.empty(2, 16), torch.empty(4)), (torch.empty(2, 3), torch.empty(4))
    assert same_but_for_length(*map(shape_of, nested), [16], 3)


# ---- from one length, by shapes ------------------------------------------------------------------------------------


def graph_of(function: Callable[..., Any], *args: Tensor) -> tuple[fx.GraphModule, Sequence[Any]]:
    """The graph that Dynamo hands to a backend, and its inputs."""
    found: list[tuple[fx.GraphModule, Sequence[Any]]] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append((gm, inputs))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*args)
    return found[0]


def traced(function: Callable[[Tensor, Tensor], Tensor]) -> TracedCalls:
    """``function(ids [B, L], table [V, D]) -> token [B]`` as it is traced at the length L."""
    graph = concretise(*graph_of(function, torch.zeros(B, L, dtype=torch.int64), torch.zeros(V, D))).graph
    inputs = {tensor_info(node).shape: node for node in graph.find_nodes(op="placeholder")}
    ids, table = inputs[B, L], inputs[V, D]
    nodes = [table, *(node for node in graph.nodes if node.op not in ("placeholder", "output"))]
    return TracedCalls(nodes, nodes[-1], L, {(reader, ids): (B,) for reader in ids.users}, {})


def run_at(calls: TracedCalls, lengths: Lengths, length: int) -> Tensor:
    """The calls on a text of another length, with real tensors."""
    values: dict[fx.Node, Any] = {calls.nodes[0]: torch.randn(V, D)}
    for node in calls.nodes[1:]:
        leaves = {at: affine.at(length) for (reader, at), affine in lengths.items() if reader is node}
        texts = {source: torch.zeros(B, length, dtype=torch.int64) for reader, source in calls.texts if reader is node}
        values[node] = call_node(node, *replace_leaves(node, leaves, {**values, **texts}))
    return values[calls.result]


def heads(ids, table):
    x = table[ids].view(B, L, 3, 4).transpose(1, 2)  # [B, H, L, d]
    return x.transpose(1, 2).reshape(B, L, D)[:, -1].argmax(-1)


def flat(ids, table):
    x = table[ids].reshape(B * L, D)
    return x.view(B, L, D)[:, -1].argmax(-1)


def positions(ids, table):
    x = table[ids] + torch.arange(L)[:, None]
    return x[:, -1].argmax(-1)


def relative(ids, table):
    x = table[ids] + torch.arange(2 * L - 1)[:L, None]
    return x[:, -1].argmax(-1)


def masked(ids, table):
    mask = torch.ones(L, L, dtype=torch.bool).tril()
    x = table[ids] + mask.float() @ table[ids]
    return x[:, -1].argmax(-1)


def sizes_found(calls: TracedCalls) -> list[Affine]:
    return list(solve_lengths(calls).values())


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (heads, [LENGTH, LENGTH]),
        (flat, [Affine(2, 0), LENGTH]),
        (positions, [LENGTH]),
        (masked, [LENGTH, LENGTH]),
    ],
)
def test_sizes_are_lengths(function, found):
    calls = traced(function)
    lengths = solve_lengths(calls)
    assert list(lengths.values()) == found
    for length in (1, 5, L, 23):
        assert run_at(calls, lengths, length).shape == (B,)


def test_a_number_that_need_not_be_a_length_stays_a_constant():
    """A table of 2 L - 1 positions of which L are read: it holds for other lengths as long as it is."""
    assert sizes_found(traced(relative)) == [LENGTH]


def test_known_integers_are_used_and_not_returned():
    calls = traced(positions)
    (leaf,) = solve_lengths(calls)
    assert solve_lengths(TracedCalls(calls.nodes, calls.result, L, calls.texts, {leaf: LENGTH})) == {}
    with pytest.raises(UnclearLengths) as caught:
        solve_lengths(TracedCalls(calls.nodes, calls.result, L, calls.texts, {leaf: Affine(1, 1)}))
    assert not caught.value.several


def test_a_length_that_may_be_another_size_is_refused():
    def function(ids, table):
        x = table[ids].mean(1)
        return (x[:, :1] + torch.zeros(B, L)).argmax(-1)

    with pytest.raises(UnclearLengths) as caught:
        solve_lengths(traced(function))
    assert caught.value.several
    assert caught.value.node.target is torch.zeros


def test_a_result_that_grows_is_refused():
    def function(ids, table):
        return table[ids].argmax(-1)

    calls = traced(function)
    with pytest.raises(UnclearLengths) as caught:
        solve_lengths(calls)
    assert not caught.value.several
    assert caught.value.node is calls.result


def test_a_call_that_no_reading_fits_is_named():
    def function(ids, table):
        return (table[ids].sum(-1) @ table[:L, 0]).long()

    assert sizes_found(traced(function)) == [LENGTH]

    def halves(ids, table):
        return (table[ids].sum(-1)[:, :6] @ table.new_ones(6)).long()

    with pytest.raises(UnclearLengths) as caught:
        solve_lengths(traced(halves))
    assert not caught.value.several


# ---- lengths for which a trace holds -------------------------------------------------------------------------------


def prompt_of(function: Callable[[Tensor], Tensor], length: int = 5, dynamic: bool = True) -> fx.Node:
    ids = torch.zeros(B, length, dtype=torch.int64)
    if dynamic:
        torch._dynamo.mark_dynamic(ids, 1)
    gm, _ = graph_of(function, ids)
    inputs = gm.graph.find_nodes(op="placeholder")
    return next(node for node in inputs if isinstance(node.meta["example_value"], Tensor))


def test_a_branch_on_the_length_ends_the_texts_of_a_trace():
    def branches(ids):
        return ids + 1 if ids.shape[1] <= 16 else ids - 1

    assert longest_text(prompt_of(branches)) == 16
    assert longest_text(prompt_of(branches, length=20)) is None
    assert longest_text(prompt_of(lambda ids: ids + 1)) is None
    assert longest_text(prompt_of(branches, dynamic=False)) is None
