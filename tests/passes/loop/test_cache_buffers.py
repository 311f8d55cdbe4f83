"""A preallocated cache becomes the keys themselves; what is written in other ways is refused or left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from smc_compile.errors import LoopError
from smc_compile.passes.fx_tools import op_name
from smc_compile.passes.loop.cache_buffers import BufferFree, without_buffers
from smc_compile.passes.loop.tensor_info import TensorInfo

B, H, M, D, V = 2, 2, 16, 4, 11
torch.manual_seed(0)
EMBED = torch.randn(V, H * D, dtype=torch.float64)


def by_index(cache: Tensor, k: Tensor) -> Tensor:
    cache[:, :, torch.arange(k.shape[2])] = k
    return cache


def by_slice(cache: Tensor, k: Tensor) -> Tensor:
    cache[:, :, : k.shape[2]] = k
    return cache


def by_index_copy(cache: Tensor, k: Tensor) -> Tensor:
    cache.index_copy_(2, torch.arange(k.shape[2]), k)
    return cache


def by_copy(cache: Tensor, k: Tensor) -> Tensor:
    cache[:B, :, 0 : k.shape[2]].copy_(k)
    return cache


def by_index_put(cache: Tensor, k: Tensor) -> Tensor:
    everything = slice(None)
    cache[(everything, everything, torch.arange(k.shape[2]) + 0)] = k
    return cache


def read_filled(cache: Tensor, k: Tensor) -> Tensor:
    return by_slice(cache, k)[:, :, : k.shape[2]]


WRITES = [by_index, by_slice, by_index_copy, by_copy, by_index_put, read_filled]


def fused(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, k, attn_mask=mask[: q.shape[2], : k.shape[2]])


def written_out(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~mask[: q.shape[2], : k.shape[2]], -torch.inf)
    return scores.softmax(-1) @ k


class Step(nn.Module):
    def __init__(self, write, attend) -> None:
        super().__init__()
        self.write, self.attend = write, attend

    def forward(self, ids: Tensor, cache: Tensor, mask: Tensor, table: Tensor) -> Tensor:
        x = F.embedding(ids, table).unflatten(-1, (H, D)).transpose(1, 2)
        y = self.attend(x, self.write(cache, x), mask)
        return y.transpose(1, 2).flatten(2)[:, -1].argmax(-1)


def captured(write, attend) -> tuple[fx.GraphModule, list[Tensor]]:
    """By Dynamo with a symbolic length, whose placeholder becomes ids.size(1)."""
    found: list[fx.GraphModule] = []
    ids = torch.randint(0, V, (B, 5))
    inputs = [torch.zeros(B, H, M, D, dtype=torch.float64), torch.ones(M, M, dtype=torch.bool).tril(), EMBED]
    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(ids, 1)

    def backend(gm, _):
        found.append(gm)
        return gm.forward

    torch.compile(Step(write, attend), backend=backend, fullgraph=True)(ids, *[x.clone() for x in inputs])
    (gm,) = found
    size, *tensors = [n for n in gm.graph.nodes if n.op == "placeholder"]
    ids_node = next(n for n in tensors if n.meta["example_value"].dtype == torch.int64)
    order = [n for n in tensors if n is not ids_node]
    with gm.graph.inserting_after(tensors[-1]):
        length = gm.graph.call_method("size", (ids_node, 1))
    size.replace_all_uses_with(length)
    gm.graph.erase_node(size)
    gm.graph.output_node().args = (gm.graph.output_node().args[0][0],)
    first = next(iter(gm.graph.nodes))
    if first is not ids_node:
        first.prepend(ids_node)
    gm.recompile()
    by_shape = {tuple(x.shape): x for x in inputs}
    return gm, [by_shape[tuple(n.meta["example_value"].shape)] for n in order]


def rewritten(write, attend=fused) -> tuple[BufferFree, list[Tensor]]:
    gm, inputs = captured(write, attend)
    infos = [TensorInfo(tuple(x.shape), x.dtype, i) for i, x in enumerate(inputs)]
    free = without_buffers(gm, B, infos, [None] * len(inputs))
    return free, [x for x, kept in zip(inputs, free.kept, strict=True) if kept]


@pytest.mark.parametrize("attend", [fused, written_out])
@pytest.mark.parametrize("write", WRITES)
def test_a_buffer_becomes_the_keys(write, attend):
    free, inputs = rewritten(write, attend)
    assert [(buffer.axis, buffer.length) for buffer in free.buffers] == [(2, M)]
    assert len(inputs) == 2, "the buffer is no input any more"
    assert not {"setitem", "index_copy_", "copy_"} & {op_name(node) for node in free.step.graph.nodes}
    for length in (2, 3, 7, M):
        ids = torch.randint(0, V, (B, length))
        cache, mask = torch.zeros(B, H, M, D, dtype=torch.float64), torch.ones(M, M, dtype=torch.bool).tril()
        assert torch.equal(free.step(ids, *inputs), Step(write, attend)(ids, cache, mask, EMBED))


def behind_the_first(cache: Tensor, k: Tensor) -> Tensor:
    cache[:, :, 1 : 1 + k.shape[2]] = k
    return cache


def everywhere(cache: Tensor, k: Tensor) -> Tensor:
    cache.add_(k.mean(2, keepdim=True))
    return cache


@pytest.mark.parametrize("write", [behind_the_first, everywhere])
def test_another_write_to_an_input_is_refused(write):
    with pytest.raises(LoopError, match="not at the positions of the tokens"):
        rewritten(write)


def test_a_cache_that_holds_something_is_refused():
    def behind(cache: Tensor, k: Tensor) -> Tensor:
        return torch.cat([cache, k], 2)

    with pytest.raises(LoopError, match="is not empty"):
        rewritten(behind, lambda q, k, mask: F.scaled_dot_product_attention(q, k, k))


def test_an_empty_cache_goes():
    def behind(cache: Tensor, k: Tensor) -> Tensor:
        return torch.cat([k.new_empty(0), k], 2)

    free, _ = rewritten(behind)
    assert free.grown == 1
    assert "cat" not in {op_name(node) for node in free.step.graph.nodes}
