"""The toolbox for graphs: names, source lines, arguments, writes, values and reachability of nodes."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from smc_compile.passes import fx_tools
from smc_compile.passes.fx_tools import call_node

aten = torch.ops.aten


@pytest.fixture
def graph() -> fx.Graph:
    return fx.Graph()


@pytest.fixture
def x(graph: fx.Graph) -> fx.Node:
    return graph.placeholder("x")


# ---- names and places ------------------------------------------------------------------------------------------------


def test_an_op_has_one_name_however_it_is_called(graph, x):
    calls = [
        graph.call_function(torch.cat, ([x, x],)),
        graph.call_method("cat", (x,)),
        graph.call_function(aten.cat.default, ([x, x],)),
    ]
    assert [fx_tools.op_name(node) for node in calls] == ["cat"] * 3
    assert fx_tools.op_name(graph.call_function(operator.getitem, (x, 0))) == "getitem"
    assert fx_tools.op_name(x) == ""


TRACE = f"""File "/home/me/torch/model.py", line 12, in forward
    y = self.layer(x)
  File "{torch.__file__.replace("__init__.py", "nn/functional.py")}", line 3, in linear
    return linear(x)
"""


def test_the_line_is_the_innermost_one_outside_torch_itself(x):
    x.meta["stack_trace"] = TRACE
    assert fx_tools.user_line(x) == "model.py:12: y = self.layer(x)"
    assert fx_tools.describe(x) == "`x` (placeholder) at model.py:12: y = self.layer(x)"


def test_a_line_whose_source_is_not_recorded_does_not_take_the_next_frame_for_it(x):
    x.meta["stack_trace"] = 'File "a.py", line 1, in f\nFile "b.py", line 2, in g\n'
    assert fx_tools.user_line(x) == "b.py:2: "


def test_a_node_without_a_trace_is_described_by_its_op(graph, x):
    assert fx_tools.user_line(x) == ""
    assert fx_tools.describe(graph.call_function(aten.neg.default, (x,))) == "`neg_default` (neg)"


# ---- reads and writes ------------------------------------------------------------------------------------------------


def test_arguments_have_the_schemas_names_and_defaults(graph, x):
    node = graph.call_function(aten.topk.default, (x, 3), {"sorted": False})
    assert fx_tools.arguments(node) == {"input": x, "k": 3, "dim": -1, "largest": True, "sorted": False}


@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: (value,), lambda value: [value]])
def test_outputs_are_one_flat_list(graph, x, wrap):
    graph.output(wrap(x))
    assert fx_tools.output_values(graph) == [x]


def test_writes_of_methods_functions_operators_and_aten_ops(graph, x):
    y = graph.placeholder("y")
    written = {
        graph.call_method("add_", (x, 1)): [x],
        graph.call_method("__add__", (x, 1)): [],
        graph.call_function(operator.setitem, (x, 0, y)): [x],
        graph.call_function(torch.nn.functional.relu, (x,), {"inplace": True}): [x],
        graph.call_function(torch.nn.functional.relu, (x, True)): [x],
        graph.call_function(torch.nn.functional.relu, (x,)): [],
        graph.call_function(torch.add, (1, 2), {"out": x}): [x],
        graph.call_function(aten.add_.Tensor, (x, y)): [x],
        graph.call_function(aten.add.Tensor, (x, y)): [],
        graph.call_function(aten.add.out, (x, x), {"out": y}): [y],
        graph.call_function(aten._foreach_add_.Scalar, ([x, y], 1)): [x, y],
        x: [],
    }
    assert {node: fx_tools.mutated_inputs(node) for node in written} == written


def test_dead_code_goes_but_inputs_and_writes_stay(graph, x):
    graph.placeholder("unused")
    graph.call_function(torch.rand, (3,))
    graph.call_method("add_", (x, 1))
    graph.output(x)
    assert fx_tools.erase_dead_code(graph)
    assert [node.name for node in graph.nodes] == ["x", "unused", "add_", "output"]
    assert not fx_tools.erase_dead_code(graph)


# ---- values ----------------------------------------------------------------------------------------------------------


def test_functions_and_methods_run_on_values(graph, x):
    values = {x: torch.tensor([1.0, 2.0])}
    function = graph.call_function(torch.stack, ([x, x],), {"dim": 1})
    method = graph.call_method("add", (x, 1), {"alpha": 2})
    assert fx_tools.run_node(function, values).tolist() == [[1.0, 1.0], [2.0, 2.0]]
    assert fx_tools.run_node(method, values).tolist() == [3.0, 4.0]
    assert fx_tools.call_node(method, [torch.tensor(1), 1], {}) == 2


def test_a_value_without_data_is_fake_even_without_operands(graph, x):
    with FakeTensorMode():
        x.meta["val"] = torch.empty(2, 3)
    double = graph.call_function(aten.add.Tensor, (x, x))
    full = graph.call_function(aten.full.default, ([10**9, 10**3], 1.0))
    assert fx_tools.value_without_data(double).shape == (2, 3)
    assert isinstance(fx_tools.value_without_data(full), FakeTensor)


# ---- reachability ----------------------------------------------------------------------------------------------------


def test_ancestors_and_descendants_include_the_node_and_come_in_order(graph, x):
    y = graph.placeholder("y")
    a = graph.call_function(torch.neg, (x,))
    b = graph.call_function(torch.add, (a, x))
    c = graph.call_function(torch.add, (y, b))
    assert sorted(fx_tools.ancestors(b)) == [x, a, b]
    assert sorted(fx_tools.descendants(a)) == [a, b, c]
    assert sorted(fx_tools.ancestors(a, y)) == [x, y, a]
    assert fx_tools.reachable([c], lambda node: node.all_input_nodes if node is c else ()) == {c, y, b}


@pytest.mark.parametrize(
    ("switch", "arguments"),
    [
        (torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, None)),
        (torch._C._set_grad_enabled, (False,)),
        (torch.manual_seed, (3,)),
    ],
)
def test_a_switch_of_torchs_state_is_not_called(switch, arguments):
    """Graphs are interpreted to learn what they compute; the process goes on as it was."""
    before = torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), torch.initial_seed()
    node = fx.Graph().call_function(switch, arguments)
    assert call_node(node, arguments, {}) is None
    assert (torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), torch.initial_seed()) == before
