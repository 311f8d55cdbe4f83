"""Loops around a tiny model, as the passes recover them from Dynamo's graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from smc_compile.errors import LoopError
from smc_compile.passes.loop.recover import DecodeLoop
from smc_compile.passes.pipeline import recover_loop

V, P = 11, 4


class TinyLM(nn.Module):
    """Embedding, causal attention, positions, a norm: the operators whose sizes grow with the sequence."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed, self.pos = nn.Embedding(V, 8), nn.Embedding(32, 8)
        self.norm, self.qkv, self.head = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, V)
        self.drop = nn.Dropout(dropout)
        self.register_buffer("mask", torch.ones(32, 32).tril().bool())

    def forward(self, ids):
        B, S = ids.shape
        x = self.drop(self.embed(ids) + self.pos(torch.arange(S, device=ids.device)))
        q, k, v = self.qkv(self.norm(x)).view(B, S, 2, 12).transpose(1, 2).split(4, dim=-1)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask[:S, :S])
        return self.head(x + a.transpose(1, 2).reshape(B, S, 8))


torch.manual_seed(0)
MODEL = TinyLM().eval()


def greedy(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(dim=-1)


def capture(fn: Any, *args: Any, dynamic: bool = False, parts: bool = False) -> tuple[DecodeLoop | None, list[Any]]:
    """The recovered loop and the inputs of the graph that it was recovered from."""
    found: list[Any] = []

    def backend(gm, example_inputs):
        before = gm.code
        found.append((recover_loop(gm, example_inputs, parts=parts), list(example_inputs)))
        assert gm.code == before  # the graph is left alone
        return gm.forward

    torch._dynamo.reset()
    try:
        with torch.no_grad():
            torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise (error.__cause__ or error.inner_exception) from None
    assert len(found) == 1
    return found[0]


def refusal(fn: Any, *args: Any, dynamic: bool = False) -> LoopError:
    with pytest.raises(LoopError) as caught:
        capture(fn, *args, dynamic=dynamic)
    assert caught.value.fix
    assert caught.value.why
    return caught.value


def prompt(batch: int = 2) -> torch.Tensor:
    return torch.randint(0, V, (batch, P), generator=torch.Generator().manual_seed(3))


def check_step(loop: DecodeLoop, inputs: list[Any], eager: Any, lengths: tuple[int, ...] = (1, P, P + 1, 17)) -> None:
    invariants = [inputs[i] for i in loop.invariant_indices]
    for length in lengths:
        ids = torch.randint(0, V, (loop.batch, length))
        with torch.no_grad():
            torch.manual_seed(length)
            expected = eager(ids)
            torch.manual_seed(length)
            token = loop.step(ids, *invariants)
        assert torch.equal(token.reshape(-1).long(), expected.reshape(-1).long())
