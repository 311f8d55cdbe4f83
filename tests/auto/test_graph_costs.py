"""Costs of a pass are exact expressions in its sizes: against counts by hand, and against torch's own counter."""

from __future__ import annotations

from functools import cache

import pytest
import sympy
import torch
from helpers.models import CACHEABLE
from helpers.plain_models import GPT
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from smc_compile.auto.graph_costs import META, SYMBOLS, Costs, PassSizes, _Recorder, interpolate, pass_costs
from smc_compile.errors import CacheError
from smc_compile.pairs.llama import Llama, LlamaConfig
from smc_compile.passes.pipeline import Traced, trace_model
from smc_compile.program.model import LastLogits

B, N, T, P, S = SYMBOLS
VOCAB, DIM, HEADS, HIDDEN = 50, 16, 4, 24
WIDTH = DIM // HEADS


@cache
def llama(layers: int, kv_heads: int) -> Traced:
    torch.manual_seed(0)
    return traced(Llama(LlamaConfig(VOCAB, DIM, layers, HEADS, kv_heads, HIDDEN, 64)))


def traced(model: nn.Module) -> Traced:
    return trace_model(LastLogits(model.eval()), torch.zeros(2, 2, dtype=torch.int64), (), False, False)


@cache
def counted(layers: int, kv_heads: int, every_position: bool = True) -> Costs:
    found = llama(layers, kv_heads)
    return pass_costs(found.cached, found.owned(), every_position)


def matrices(layers: int, kv_heads: int) -> tuple[int, int]:
    """Numbers in the weights of the layers, and in the head."""
    return layers * (2 * DIM * DIM + 2 * DIM * kv_heads * WIDTH + 3 * DIM * HIDDEN), VOCAB * DIM


@pytest.mark.parametrize(("layers", "kv_heads"), [(1, HEADS), (1, 2), (7, 2)])
def test_operations_are_those_counted_by_hand(layers, kv_heads):
    """Seven layers are outlined: one of them is run for all."""
    body, head = matrices(layers, kv_heads)
    attention = 2 * 2 * layers * HEADS * WIDTH * (P + S)  # of a query: scores and mixture
    assert sympy.expand(counted(layers, kv_heads).operations - B * N * T * (2 * (body + head) + attention)) == 0


def test_attention_at_once_is_one_kernel_a_layer():
    """Heads of 16 numbers fill the kernel's registers: scores, softmax and mixture, and every cache read once."""
    found = traced(Llama(LlamaConfig(VOCAB, 64, 2, HEADS, 2, HIDDEN, 64)))
    kernels = pass_costs(found.cached, found.owned(), True).kernels
    (kernel,) = [k for k in kernels if k.kind == "attention"]
    assert kernel.count == 2
    assert not any(k.kind == "batched" for k in kernels)
    assert sympy.expand(kernel.operations - B * N * T * 2 * 2 * 64 * (P + S)) == 0
    key_and_value = 4 * 2 * 2 * 16  # bytes of two heads
    assert kernel.bytes["prompts"] == key_and_value * B * P
    assert kernel.bytes["suffixes"] == key_and_value * B * N * S


def test_a_head_on_the_last_position_alone_has_a_row_for_each_particle():
    """Where the model selects before its head; one that selects afterwards computes the head everywhere."""

    class Picked(GPT):
        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.norm(self.blocks(self.embed(ids) + self.positions(ids)))
            return self.head(hidden[:, -1:])

    found = traced(Picked(layers=1))
    costs = pass_costs(found.cached, found.owned(), every_position=False)
    assert {k.rows for k in costs.kernels if k.kind == "linear"} == {B * N * T, B * N}


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_a_prompt_is_read_once_a_request_and_a_suffix_once_a_particle(kv_heads):
    """Keys and values of the distinct heads alone; what is new is written besides."""
    token = 2 * kv_heads * WIDTH * 4
    assert sympy.expand(counted(1, kv_heads).bytes("prompts") - token * B * P) == 0
    assert sympy.expand(counted(1, kv_heads).bytes("suffixes") - token * B * N * (S + T)) == 0


def test_every_weight_is_read_once_whatever_the_rows_and_tied_ones_too():
    """The embedding is the head: read as a whole there, and by the row where tokens are looked up."""
    costs = counted(1, 2)
    whole = sum(k.count * k.weight_bytes for k in costs.kernels)
    assert whole == 4 * sum(matrices(1, 2))
    assert {str(k.rows) for k in costs.kernels if k.kind == "linear"} == {"B*N*T"}
    gains = 3 * DIM * 4
    looked_up = sympy.expand(costs.bytes("weights") - whole - gains)
    assert looked_up.coeff(B * N * T) * B * N * T == looked_up, "nothing else is left"
    assert looked_up.coeff(B * N * T) % (DIM * 4) == 0


@pytest.mark.parametrize("name", ["gpt", "llama", "eager"])
@pytest.mark.parametrize("sizes", [(1, 1, 2, 3, 5), (2, 3, 4, 6, 9), (1, 5, 1, 11, 8)])
def test_operations_are_those_that_torch_counts(name, sizes):
    found = model_named(name)
    at = dict(zip(SYMBOLS, sizes, strict=True))
    assert torch_counts(found, PassSizes(*sizes)) == costs_named(name).operations.subs(at)


@cache
def model_named(name: str) -> Traced:
    return traced(CACHEABLE[name]())


@cache
def costs_named(name: str) -> Costs:
    return pass_costs(model_named(name).cached, model_named(name).owned(), True)


def torch_counts(found: Traced, z: PassSizes) -> int:
    """Of the same graph, run with data."""
    cached, weights = found.cached, found.owned()

    def cache_of(rows: int, length: int) -> list[Tensor]:
        return [torch.zeros(rows, c.heads, length, c.width, dtype=c.dtype) for c in cached.sites]

    tokens = torch.zeros(z.rows, z.tokens, dtype=torch.int64)
    positions = (z.prompt + torch.arange(z.tokens)).expand(z.batch, -1)
    slots, keys = (torch.arange(count).expand(z.batch, -1) for count in (z.tokens, z.prompt + z.suffix))
    places = (positions, slots, keys)
    caches = [*cache_of(z.batch, z.prompt), *cache_of(z.rows, z.suffix)]
    tables = cached.tables(z.prompt + z.suffix, *weights)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cached.score(tokens, *places, *caches, *tables, *weights)
    return counter.get_total_flops()


# ---- what a compiler fuses ------------------------------------------------------------------------------------------


def kernels(function, *inputs: Tensor, weights: tuple[Tensor, ...] = ()) -> list[tuple[str, int]]:
    """Names and bytes."""
    recorder = _Recorder(weights, (), ())
    with torch.no_grad(), recorder:
        result = function(*inputs)
    recorder.finish(result)
    return [(record.name, sum(record.numbers[2:])) for record in recorder.records]


X, W = torch.empty(8, 4, device=META), torch.empty(4, 4, device=META)  # 128 and 64 bytes


def test_element_wise_operations_are_one_kernel_that_reads_each_operand_once():
    assert kernels(lambda x: (x.exp() * x + x).t(), X) == [("elementwise", 256)]


def test_a_reduction_computes_what_it_reduces():
    assert kernels(lambda x: x.exp().sum(1), X) == [("sum", 128 + 32)]


def test_a_product_reads_what_is_in_memory():
    found = kernels(lambda x: (x.exp() @ W).relu(), X, weights=(W,))
    assert found == [("elementwise", 256), ("mm", 128 + 64 + 128), ("elementwise", 256)]


def test_an_index_reads_the_entries_it_names():
    index = torch.empty(2, dtype=torch.int64, device=META)
    assert kernels(lambda x: x[index], X) == [("elementwise", 16 + 32 + 32)]


def test_a_write_moves_what_is_new():
    index = torch.empty(2, dtype=torch.int64, device=META)
    assert kernels(lambda x: x.index_copy_(0, index, x.new_empty(2, 4) + 1), X) == [("index_copy_", 16 + 32)]


def test_what_is_no_polynomial_is_refused():
    def squared(z: PassSizes):
        recorder = _Recorder((), (), ())
        with recorder:
            result = torch.empty(z.tokens, z.tokens, device=META).exp()
        recorder.finish(result)
        return recorder.records

    with pytest.raises(CacheError, match="no sum of products"):
        interpolate(squared)


def test_another_number_of_kernels_is_refused():
    def some(z: PassSizes):
        recorder = _Recorder((), (), ())
        with recorder:
            results = [torch.empty(4, device=META).exp() for _ in range(z.tokens)]
        recorder.finish(results)
        return recorder.records

    with pytest.raises(CacheError, match="depends on the sizes"):
        interpolate(some)
