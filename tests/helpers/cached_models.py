"""Tiny causal language models that keep a cache themselves, as a loop hands it around or a module registers it."""

import torch
import torch.nn.functional as F
from helpers.model_parts import RMSNorm
from torch import Tensor, nn


class SlotAttention(nn.Module):
    """Keys and values are written into registered buffers at the positions given; all of the buffer is attended to."""

    def __init__(self, dim: int, heads: int, batch: int, length: int):
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(batch, heads, length, self.head_dim), persistent=False)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        self.keys[:, :, positions] = k
        self.values[:, :, positions] = v
        y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class SlotLM(nn.Module):
    """`forward(ids [B, T], positions [T])`: registered caches, and a causal mask indexed by position.

    With `leak`, the state of the last call is added to the next: what is cached depends on how the text was cut.
    """

    def __init__(self, vocab=17, dim=16, layers=2, heads=2, batch=2, length=24, leak=0.0):
        super().__init__()
        self.vocab, self.leak = vocab, leak
        self.embed, self.place = nn.Embedding(vocab, dim), nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(SlotAttention(dim, heads, batch, length) for _ in range(layers))
        self.norms = nn.ModuleList(RMSNorm(dim) for _ in range(layers))
        self.head = nn.Linear(dim, vocab, bias=False)
        self.register_buffer("mask", torch.ones(length, length, dtype=torch.bool).tril(), persistent=False)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        mask = self.mask[None, None, positions]  # [1, 1, T, length]
        x = self.embed(ids) + self.place(positions)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x), positions, mask)
        return self.head(x) + self.leak * ids.shape[1]


class HandedAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        return self.out(y.transpose(1, 2).flatten(2)), (k, v)


class HandedLM(nn.Module):
    """`forward(ids [B, T], cache) -> (logits, cache)`: the cache is a list of (k, v), None at first."""

    def __init__(self, vocab=17, dim=16, layers=2, heads=2, max_positions=64):
        super().__init__()
        self.vocab = vocab
        self.embed, self.place = nn.Embedding(vocab, dim), nn.Embedding(max_positions, dim)
        self.blocks = nn.ModuleList(HandedAttention(dim, heads) for _ in range(layers))
        self.head = nn.Linear(dim, vocab, bias=False)

    def forward(self, ids: Tensor, cache: list | None = None) -> tuple[Tensor, list]:
        start = 0 if cache is None else cache[0][0].shape[2]
        x = self.embed(ids) + self.place(torch.arange(start, start + ids.shape[1], device=ids.device))
        kept = []
        for at, block in enumerate(self.blocks):
            y, pair = block(x, None if cache is None else cache[at])
            x = x + y
            kept.append(pair)
        return self.head(x), kept
