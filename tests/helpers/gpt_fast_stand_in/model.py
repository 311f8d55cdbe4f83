"""A model with the interface of gpt-fast's: one matrix for queries, keys and values, and rotary pairs of neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class ModelArgs:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    dim: int
    intermediate_size: int
    n_local_heads: int
    rope_base: float
    norm_eps: float


def turn(x: Tensor, position: Tensor, base: float) -> Tensor:
    """x [H, S, d] as d/2 complex numbers, each turned by an angle of its own."""
    d = x.shape[-1]
    angles = position[:, None] * base ** (-torch.arange(0, d, 2) / d)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, a: ModelArgs) -> None:
        super().__init__()
        self.a, head = a, a.dim // a.n_head
        self.wqkv = nn.Linear(a.dim, (a.n_head + 2 * a.n_local_heads) * head, bias=False)
        self.wo = nn.Linear(a.dim, a.dim, bias=False)
        self.keys = self.values = torch.empty(0)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        a, heads = self.a, self.wqkv(x)[0].unflatten(-1, (-1, self.a.dim // self.a.n_head)).transpose(0, 1)
        q, k, v = heads.split([a.n_head, a.n_local_heads, a.n_local_heads])
        self.keys[:, position], self.values[:, position] = turn(k, position, a.rope_base), v
        mask = torch.arange(self.keys.shape[1]) <= position[:, None]
        read = [t.repeat_interleave(a.n_head // a.n_local_heads, 0) for t in (self.keys, self.values)]
        y = F.scaled_dot_product_attention(turn(q, position, a.rope_base), *read, attn_mask=mask)
        return self.wo(y.transpose(0, 1).flatten(1)[None])


class FeedForward(nn.Module):
    def __init__(self, a: ModelArgs) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(a.dim, a.intermediate_size, bias=False) for _ in range(2))
        self.w2 = nn.Linear(a.intermediate_size, a.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.silu(self.w1(x))
        return self.w2(gate * self.w3(x))


class Layer(nn.Module):
    def __init__(self, a: ModelArgs) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(a), FeedForward(a)
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(a.dim, a.norm_eps) for _ in range(2))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), position)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    def __init__(self, a: ModelArgs) -> None:
        super().__init__()
        self.config = a
        self.tok_embeddings = nn.Embedding(a.vocab_size, a.dim)
        self.layers = nn.ModuleList(Layer(a) for _ in range(a.n_layer))
        self.norm = nn.RMSNorm(a.dim, a.norm_eps)
        self.output = nn.Linear(a.dim, a.vocab_size, bias=False)

    def setup_caches(self, max_batch_size: int, max_seq_length: int) -> None:
        a = self.config
        shape, dtype = (a.n_local_heads, max_seq_length, a.dim // a.n_head), self.output.weight.dtype
        for layer in self.layers:
            layer.attention.keys, layer.attention.values = (
                torch.zeros(shape, dtype=dtype),
                torch.zeros(shape, dtype=dtype),
            )

    def forward(self, ids: Tensor, input_pos: Tensor) -> Tensor:
        x = self.tok_embeddings(ids)
        for layer in self.layers:
            x = layer(x, input_pos)
        return self.output(self.norm(x))
