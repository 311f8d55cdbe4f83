"""The driver of single-op rewrites: metadata, dead code, counts; and the rewrites that stand beside it."""

from __future__ import annotations

import torch
from torch import fx
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from smc_compile.passes.rewrites import CAPTURED, Rewrites, new_node, rewrite, rewrite_ops, sizes_of

aten = torch.ops.aten


def squared(values: bool = True) -> fx.Graph:
    """``neg(square(neg(x)))``, x [2, 3]."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    if values:
        with FakeTensorMode():
            x.meta["val"] = torch.empty(2, 3)
    for op in (aten.neg.default, aten.square.default, aten.neg.default):
        x = graph.call_function(op, (x,))
        x.meta = {"stack_trace": "where", **({"val": x.args[0].meta["val"]} if values else {})}
    graph.output(x)
    return graph


def targets(graph: fx.Graph) -> list:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def test_a_replacement_takes_the_nodes_place_value_and_source_line_and_is_counted():
    stage: Rewrites = {}

    @rewrite(aten.square.default, stage=stage)
    def square_as_product(node):
        return new_node(node, aten.mul.Tensor, node.args[0], node.args[0])

    graph = squared()
    counters.clear()
    rewrite_ops(graph, stage)
    assert targets(graph) == [aten.neg.default, aten.mul.Tensor, aten.neg.default]
    (product,) = graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    assert product.meta["stack_trace"] == "where"
    assert product.meta["val"].shape == (2, 3)
    assert counters["smc_compile"] == {"square_as_product": 1}


def test_what_only_the_old_node_read_goes_with_it():
    stage: Rewrites = {}

    @rewrite(aten.square.default, stage=stage)
    def square_as_ones(node):
        return new_node(node, aten.full.default, sizes_of(node, node.args[0]), 1.0)

    graph = squared()
    rewrite_ops(graph, stage)
    assert targets(graph) == [aten.full.default, aten.neg.default]


def test_a_node_stays_when_its_rewrite_declines_and_graphs_without_values_are_rewritten_too():
    stage: Rewrites = {}
    seen = []

    @rewrite(aten.neg.default, stage=stage)
    def second_neg(node):
        seen.append(node)
        return new_node(node, aten.abs.default, node.args[0]) if len(seen) == 2 else None

    graph = squared(values=False)
    rewrite_ops(graph, stage)
    assert targets(graph) == [aten.neg.default, aten.square.default, aten.abs.default]
    assert "val" not in graph.output_node().args[0].meta


def test_a_replacement_that_was_there_already_keeps_its_own_metadata():
    stage: Rewrites = {}

    @rewrite(aten.square.default, stage=stage)
    def no_square(node):
        return node.args[0]

    graph = squared()
    _, before, _, after, _ = graph.nodes
    before.meta["stack_trace"] = "elsewhere"
    rewrite_ops(graph, stage)
    assert after.args == (before,)
    assert before.meta["stack_trace"] == "elsewhere"


def test_a_topk_of_a_fixed_number_is_left_alone_along_an_axis_of_fixed_size():
    graph = fx.Graph()
    x = graph.placeholder("x")
    with FakeTensorMode():
        x.meta["val"] = torch.empty(2, 5)
    best = graph.call_function(aten.topk.default, (x, 3))
    graph.output(best)
    rewrite_ops(graph, CAPTURED)
    assert targets(graph) == [aten.topk.default]


def test_what_was_written_to_a_place_is_read_back_from_there():
    """``row = x[:, -1]; row[:, 3] = 0`` writes the row into x and selects it again; another row is another value."""
    graph = fx.Graph()
    x, row = graph.placeholder("x"), graph.placeholder("row")
    with FakeTensorMode():
        x.meta["val"], row.meta["val"] = torch.empty(2, 5, 3), torch.empty(2, 3)
        whole = new_node(x, aten.select_scatter.default, x, row, 1, -1)
        same = new_node(row, aten.select.int, whole, 1, -1)
        other = new_node(row, aten.select.int, whole, 1, 0)
        axis = new_node(row, aten.select.int, whole, 0, -1)
    graph.output((same, other, axis))
    rewrite_ops(graph, CAPTURED)
    found = graph.output_node().args[0]
    assert found[0] is row
    assert [node.args[0].target for node in found[1:]] == [aten.select_scatter.default] * 2
