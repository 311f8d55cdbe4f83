"""The rules that a causal model keeps between passes, and the order of its arguments."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from smc_compile.errors import SMCError
from smc_compile.passes.ir import CausalLM

aten = torch.ops.aten


def causal(op=aten.add.Tensor, outputs: int = 1, values: bool = True) -> CausalLM:
    """``op(ids, weight)``; the weight's placeholder comes first."""
    graph = fx.Graph()
    weight, ids = graph.placeholder("weight"), graph.placeholder("ids")
    result = graph.call_function(op, (ids, weight))
    with FakeTensorMode():
        for node in graph.nodes if values else ():
            node.meta["val"] = torch.empty(2, 3)
    graph.output((result,) * outputs)
    return CausalLM(fx.GraphModule({}, graph), ids, (weight,), 2, None)


def test_arguments_stand_in_the_order_of_the_placeholders() -> None:
    ids, weight = torch.zeros(2, 3), torch.ones(2, 3)
    first, second = causal().arguments(ids, [weight])
    assert first is weight
    assert second is ids


def test_a_well_formed_model_passes() -> None:
    causal().verify()


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ({"outputs": 2}, "exactly one output"),
        ({"values": False}, "node weight carries no value"),
        ({"op": aten.add_.Tensor}, "node add__tensor writes in place"),
    ],
)
def test_what_breaks_a_rule_is_named(broken, why: str) -> None:
    with pytest.raises(SMCError, match=why):
        causal(**broken).verify()
