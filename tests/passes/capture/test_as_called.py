"""A model that asks whether it is traced must not compute something else then."""

from __future__ import annotations

import pytest
import torch
from helpers.toys import TableLM
from helpers.traces import export_then
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from smc_compile import decode
from smc_compile.errors import CacheError, SMCError


@pytest.mark.parametrize(
    "traced",
    [
        lambda x: torch.compiler.is_compiling(),
        lambda x: not isinstance(x.shape[1], int),
        lambda x: isinstance(x, FakeTensor),
    ],
)
def test_a_model_that_does_something_else_because_it_is_traced_is_refused(traced) -> None:
    with pytest.raises(CacheError, match="computes something else while it is traced"):
        export_then(lambda x: (-x if traced(x) else x)[:, -1])


def test_one_that_does_the_same_in_another_way_is_fine() -> None:
    lm = export_then(lambda x: (x * 2 if torch.compiler.is_compiling() else x + x)[:, -1])
    assert [node.target for node in lm.graph.nodes].count(torch.ops.aten.mul.Tensor) == 1  # the branch of the trace


def test_noise_that_is_drawn_twice_is_left_to_others() -> None:
    lm = export_then(lambda x: (x + torch.rand_like(x) + torch.randn_like(x).normal_())[:, -1])
    assert lm.max_positions is None


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = TableLM(7).double()

    def forward(self, ids: Tensor) -> Tensor:
        return -self.model(ids) if torch.compiler.is_compiling() else self.model(ids)


def drawing(model, ids, n):
    for _ in range(n):
        ids = torch.cat([ids, torch.multinomial(model(ids)[:, -1].softmax(-1), 1)], 1)
    return ids


def greedy(model, ids, n):
    for _ in range(n):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("loop", [drawing, greedy])
def test_so_it_is_in_a_loop(loop) -> None:
    with pytest.raises(SMCError, match="something else while it is traced"):
        decode(loop, method="autoregressive", compiler="eager")(Asking(), torch.tensor([[0, 1, 2]]), 4)
