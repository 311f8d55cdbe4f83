"""The head runs for the position that is read, and nothing else changes."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from smc_compile.pairs.llama import Llama, LlamaConfig
from smc_compile.passes.cache.synthesize import synthesize_cache
from smc_compile.passes.lower.early_head import choose_early, early_head
from smc_compile.passes.pipeline import capture
from smc_compile.program.model import LastLogits

aten = torch.ops.aten


class Capped(nn.Module):
    """Logits that are scaled and bounded after the head."""

    def __init__(self) -> None:
        super().__init__()
        self.lm = Llama(LlamaConfig(17, 16, 2, 2, 1, 24))

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.lm(ids) / 30.0) * 30.0


def test_head_and_what_follows_it_see_one_position():
    lm, _ = capture(LastLogits(Capped().eval()), torch.zeros(2, 2, dtype=torch.int64))
    cached = early_head(synthesize_cache(lm))
    for graph in (cached.prefill.graph, cached.advance.graph):
        tail = [node.target for node in graph.nodes if node.op == "call_function"][-5:]
        assert tail[0] is aten.select.int
        assert tail[1] is aten.linear.default
        assert aten.select.int not in tail[1:]


def test_the_score_pass_keeps_all_positions():
    lm, _ = capture(LastLogits(Llama(LlamaConfig(17, 16, 2, 2, 1, 24)).eval()), torch.zeros(2, 2, dtype=torch.int64))
    before = synthesize_cache(lm)
    targets = [node.target for node in before.score.graph.nodes]
    assert [node.target for node in early_head(before).score.graph.nodes] == targets


def choice_of(op) -> fx.GraphModule:
    class Step(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return (aten.select.int(op(x, w), 1, -1),)

    return fx.symbolic_trace(Step())


def test_numbers_are_the_same():
    x, w = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)

    def op(x, w):
        return aten.mul.Tensor(aten.tanh.default(aten.linear.default(x, w)), 3.0)

    expected = op(x, w)[:, -1]
    module = choose_early(choice_of(op))
    assert next(n.target for n in module.graph.nodes if n.op == "call_function") is aten.select.int
    torch.testing.assert_close(module(x, w)[0], expected)


def test_what_mixes_positions_or_is_read_twice_stays():
    mixing = choice_of(lambda x, w: aten.cumsum.default(x, 1))
    by_tensor = choice_of(lambda x, w: aten.mul.Tensor(x, w))

    def shared(x, w):
        y = aten.linear.default(x, w)
        return aten.add.Tensor(y, y)

    for module in (mixing, by_tensor, choice_of(shared)):
        targets = [node.target for node in module.graph.nodes]
        assert [node.target for node in choose_early(module).graph.nodes] == targets
