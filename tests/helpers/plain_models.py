"""Models without a cache, with fused attention: as GPT, as Llama, and with masks handed in."""

import torch
import torch.nn.functional as F
from helpers.model_parts import LM, Attention, Block, GeluMLP
from torch import Tensor, nn

# --- GPT -----------------------------------------------------------------------------------------------------------


class FusedAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.dim = heads, dim
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, shared=None) -> Tensor:
        B, S, D = x.size()
        q, k, v = self.qkv(x).split(self.dim, dim=2)
        q = q.view(B, S, self.heads, D // self.heads).transpose(1, 2)
        k = k.view(B, S, self.heads, D // self.heads).transpose(1, 2)
        v = v.view(B, S, self.heads, D // self.heads).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).contiguous().view(B, S, D))


class GPT(nn.Module):
    def __init__(self, vocab=17, dim=16, layers=2, heads=2, max_positions=64):
        super().__init__()
        self.vocab, self.max_positions = vocab, max_positions
        self.embed = nn.Embedding(vocab, dim)
        self.embed_positions = nn.Embedding(max_positions, dim)
        self.blocks = nn.Sequential(
            *(Block(FusedAttention(dim, heads), dim, nn.LayerNorm, GeluMLP) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)

    def positions(self, ids: Tensor) -> Tensor:
        return self.embed_positions(torch.arange(ids.size(1), device=ids.device))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(ids) + self.positions(ids))))


class GPTSlicedPositions(GPT):
    """Positions as a slice of a bare parameter."""

    def __init__(self, dim=16, max_positions=64, **sizes):
        super().__init__(dim=dim, max_positions=max_positions, **sizes)
        self.embed_positions = nn.Parameter(torch.zeros(max_positions, dim))

    def positions(self, ids: Tensor) -> Tensor:
        return self.embed_positions[: ids.size(1)]


class Tied(GPT):
    """The head is the embedding matrix; embeddings are scaled up as in Gemma."""

    def __init__(self, dim=16, **sizes):
        super().__init__(dim=dim, **sizes)
        self.scale = dim**0.5
        self.head = None
        self.embed.weight = None
        self.weight = nn.Parameter(torch.empty(self.vocab, dim))

    def forward(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.weight) * self.scale + self.positions(ids)
        return F.linear(self.norm(self.blocks(x)), self.weight)


class LastOnlyHead(GPT):
    """A bias on the logits that depends on the position."""

    def __init__(self, max_positions=64, **sizes):
        super().__init__(max_positions=max_positions, **sizes)
        self.position_bias = nn.Parameter(torch.zeros(max_positions, self.vocab))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.position_bias[: ids.shape[1]]


# --- Llama ---------------------------------------------------------------------------------------------------------


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def angles(positions: Tensor, head_dim: int) -> Tensor:
    frequencies = 100.0 ** (-torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    return positions.float()[:, None] * frequencies


class LlamaAttention(Attention):
    """Grouped queries by `repeat_interleave`, rotation by halves."""

    def attend(self, q, k, v, shared):
        cos, sin = shared
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
        v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Llama(LM):
    """Rotary tables computed in forward, once for all layers."""

    attention = LlamaAttention

    def __init__(self, kv_heads=2, **sizes):
        super().__init__(kv_heads=kv_heads, **sizes)

    def shared(self, x):
        a = angles(torch.arange(x.shape[1], device=x.device), self.blocks[0].attention.head_dim)
        a = torch.cat((a, a), dim=-1)
        return a.cos().to(x.dtype), a.sin().to(x.dtype)


class InterleavedAttention(Attention):
    """Even and odd features rotated in pairs, grouped queries by `expand`, tables computed in each layer."""

    def rotate(self, x: Tensor) -> Tensor:
        a = angles(torch.arange(x.shape[2], device=x.device), self.head_dim).to(x.dtype)
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * a.cos() - odd * a.sin(), even * a.sin() + odd * a.cos()), dim=-1).flatten(-2)

    def repeat(self, x: Tensor) -> Tensor:
        B, G, S, D = x.shape
        return x[:, :, None].expand(B, G, self.heads // G, S, D).reshape(B, self.heads, S, D)

    def attend(self, q, k, v, shared):
        k, v = self.repeat(self.rotate(k)), self.repeat(v)
        return F.scaled_dot_product_attention(self.rotate(q), k, v, is_causal=True)


class LlamaInterleaved(Llama):
    attention = InterleavedAttention

    def shared(self, x):
        return None


class BufferedAttention(Attention):
    """Rotary tables as buffers cut to length, grouped queries left to SDPA."""

    def __init__(self, dim, heads, kv_heads, max_positions):
        super().__init__(dim, heads, kv_heads, max_positions)
        a = angles(torch.arange(max_positions), self.head_dim).repeat(1, 2)
        self.register_buffer("cos", a.cos(), persistent=False)
        self.register_buffer("sin", a.sin(), persistent=False)

    def attend(self, q, k, v, shared):
        S = q.shape[-2]
        q = q * self.cos[:S] + rotate_half(q) * self.sin[:S]
        k = k * self.cos[:S] + rotate_half(k) * self.sin[:S]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class LlamaBuffered(Llama):
    attention = BufferedAttention

    def shared(self, x):
        return None


# --- masks handed to SDPA ------------------------------------------------------------------------------------------


class MaskedAttention(Attention):
    def attend(self, q, k, v, shared):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=shared)


class Alibi(LM):
    """A float mask: distance times a slope per head, minus infinity in the future."""

    attention = MaskedAttention

    def shared(self, x):
        S, heads = x.shape[1], self.blocks[0].attention.heads
        t = torch.arange(S, device=x.device)
        slopes = 2.0 ** -torch.arange(1, heads + 1, device=x.device)
        bias = (t[None, :] - t[:, None]) * slopes[:, None, None]
        return bias.masked_fill(t[None, :] > t[:, None], float("-inf"))[None].to(x.dtype)


class SlidingWindow(LM):
    """A boolean mask: the last four positions."""

    attention = MaskedAttention

    def shared(self, x):
        t = torch.arange(x.shape[1], device=x.device)
        q, k = t[:, None], t[None, :]
        return ((k <= q) & (k > q - 4))[None, None]


class AdditiveMaskCumsum(LM):
    """Positions counted with `cumsum`; two additive masks, a `triu` of -inf and a window on the distance."""

    attention = MaskedAttention

    def __init__(self, dim=16, max_positions=64, **sizes):
        super().__init__(dim=dim, max_positions=max_positions, **sizes)
        self.embed_counts = nn.Embedding(max_positions + 1, dim)

    def shared(self, x):
        S = x.shape[1]
        t = torch.ones(S, device=x.device).cumsum(0)
        far = torch.where(t[:, None] - t[None, :] < 6, 0.0, torch.finfo(torch.float32).min)
        return (torch.triu(torch.full((S, S), float("-inf"), device=x.device), diagonal=1) + far).to(x.dtype)

    def forward(self, ids):
        t = torch.ones(ids.shape[1], dtype=torch.long, device=ids.device).cumsum(0)
        x = self.embed(ids) + self.embed_counts(t)
        mask = self.shared(x)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))
