"""Repeated layers: found by structure, split off, and the split graph computes exactly what the whole one does."""

import copy
from functools import lru_cache

import pytest
import torch
from torch import fx
from torch._dynamo.utils import counters

import smc_compile
from smc_compile.pairs.llama import Llama, LlamaConfig
from smc_compile.passes.cache.synthesize import synthesize_cache
from smc_compile.passes.capture.sampler import match_sampler
from smc_compile.passes.lower import outline_layers as pass_file
from smc_compile.passes.lower.outline_layers import MIN_REPEATS, Layered, find_layers, outline
from smc_compile.passes.pipeline import capture

LAYERS = MIN_REPEATS + 2
KINDS = ("score", "advance")


class Step(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        torch.manual_seed(0)
        self.model = Llama(LlamaConfig(17, 16, layers, 2, 1, 24)).double().eval()

    def forward(self, ids):
        return torch.multinomial(torch.softmax(self.model(ids)[:, -1], -1), 1)


@lru_cache
def cached(layers):
    step = Step(layers)
    lm, owned = capture(step, torch.zeros(2, 5, dtype=torch.int64))
    return synthesize_cache(match_sampler(lm)[0]), owned


def arguments(kind):
    """Inputs for each graph: B=2 requests, N=2 particles, P=4, T=3, S=6."""
    graphs, owned = cached(LAYERS)
    ids = torch.arange(8).view(2, 4)
    _, *prompts = graphs.prefill(ids, *owned())
    generator = torch.Generator().manual_seed(1)
    suffixes = [torch.randn(4, p.shape[1], 6, p.shape[3], generator=generator, dtype=p.dtype) for p in prompts]
    slots = torch.tensor([1, 2, 3])
    tokens, positions, keys = torch.arange(12).view(4, 3), (slots + 4).expand(2, -1), torch.arange(10).expand(2, -1)
    return [tokens, positions, slots.expand(2, -1), keys, *prompts, *suffixes, *graphs.tables(10, *owned()), *owned()]


def clones(values):
    return [v.clone() for v in values]


@pytest.mark.parametrize("kind", KINDS)
def test_the_split_graph_equals_the_whole_one_bit_for_bit(kind):
    whole = getattr(cached(LAYERS)[0], kind)
    split = outline(whole)
    assert isinstance(split, Layered)
    a, b = clones(arguments(kind)), clones(arguments(kind))
    expected, actual = whole(*a), split(*b)
    pairs = zip(expected, actual, strict=True) if isinstance(expected, tuple) else [(expected, actual)]
    assert all(torch.equal(x, y) for x, y in pairs)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), "cache writes in place must agree too"


@pytest.mark.parametrize("kind", KINDS)
def test_most_layers_share_one_piece(kind):
    split = outline(getattr(cached(LAYERS)[0], kind))
    assert len(split.reads) - 2 >= LAYERS - 2


def test_no_size_crosses_between_pieces():
    split = outline(cached(LAYERS)[0].score)
    for piece in split.pieces:
        (output,) = (node for node in piece.graph.nodes if node.op == "output")
        values = output.args[0] if isinstance(output.args[0], tuple) else (output.args[0],)
        assert not any(pass_file._is_size(value) for value in values)


def test_a_graph_with_few_layers_is_left_alone():
    whole = cached(2)[0].score
    assert outline(whole) is whole


def test_a_graph_without_repetition_has_no_layers():
    graph = fx.Graph()
    x = graph.placeholder("x")
    for function in (torch.sin, torch.cos, torch.tanh, torch.exp, torch.abs, torch.neg) * 2:
        x = graph.call_function(function, (x,))
    graph.output(x)
    assert find_layers(graph) is None


def test_generation_does_not_change_when_layers_are_split(monkeypatch):
    target, draft = Step(LAYERS).model, Step(1).model
    ids = torch.arange(10).view(2, 5)
    options = dict(max_new_tokens=9, seed=0, n_particles=3, lookahead=2, compiler="eager", validate=False)
    before = counters["smc_compile"]["layers_outlined"]
    with torch.compiler.set_stance("force_eager"):
        split = smc_compile.generate(target, draft, ids, **options)
        outlined = counters["smc_compile"]["layers_outlined"]
        assert outlined > before
        monkeypatch.setattr(pass_file, "MIN_REPEATS", 10**6)
        whole = smc_compile.generate(copy.deepcopy(target), draft, ids, **options)  # another module is traced anew
    assert counters["smc_compile"]["layers_outlined"] == outlined
    assert torch.equal(split.sequences, whole.sequences)
    torch.testing.assert_close(split.log_weights, whole.log_weights, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_pieces_compiled_by_inductor_draw_the_same():
    """As they are compiled without options: head, layer and tail of the model apart, and the choice of the token."""
    ids = torch.arange(10).view(2, 5)
    options = dict(max_new_tokens=5, seed=0, method="autoregressive", validate=False)
    target, before = Step(LAYERS).model, counters["smc_compile"]["layers_outlined"]
    compiled = smc_compile.generate(target, None, ids, **options)
    assert counters["smc_compile"]["layers_outlined"] > before
    with torch.compiler.set_stance("force_eager"):
        interpreted = smc_compile.generate(target, None, ids, **options | {"compiler": "eager"})
    assert torch.equal(compiled.sequences, interpreted.sequences)
    torch.testing.assert_close(compiled.log_probs, interpreted.log_probs, rtol=0, atol=1e-9)
