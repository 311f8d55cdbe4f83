"""Tiny causal language models without any cache, written the way different people write them.

Every model is `forward(ids[B, S]) -> logits[B, S, V]`, takes its sizes as keywords and has the attributes `vocab` and
`max_positions`. `CACHEABLE[name](seed=0, **sizes)` builds one that the cache pass must handle; `REFUSED[name]` holds a
constructor and the word for the operation that the refusal must name.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def build(cls: Callable[..., nn.Module], seed: int = 0, **sizes) -> nn.Module:
    """A seeded model in eval mode whose logits have a standard deviation of about one."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = cls(**sizes).eval()
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape)
            if p.dim() < 2:
                p.add_(0.1 * noise)  # biases and the gains of norms stay near their defaults
            else:
                p.copy_(noise * (1.0 if "embed" in name else p[0].numel() ** -0.5))
    return model


def perturbed(model: nn.Module, scale: float = 0.3, seed: int = 1) -> nn.Module:
    """A copy of `model` with every parameter moved by `scale` of its own size: a draft that is near, not equal."""
    near = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in near.parameters():
            p.add_(scale * p.square().mean().sqrt() * torch.randn(p.shape, generator=generator))
    return near


# --- what most of the models share ---------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class GeluMLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class SwiGLU(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gate, self.up = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.down = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    """Projections around `attend(q, k, v, shared)`, all [B, heads, S, head_dim]; `shared` is made once per forward."""

    def __init__(self, dim: int, heads: int, kv_heads: int, max_positions: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.o = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, shared) -> Tensor:
        B, S, D = x.shape
        q = self.q(x).view(B, S, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(B, S, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(B, S, self.kv_heads, self.head_dim).transpose(1, 2)
        return self.o(self.attend(q, k, v, shared).transpose(1, 2).reshape(B, S, D))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, shared) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Block(nn.Module):
    def __init__(self, attention: nn.Module, dim: int, norm=RMSNorm, mlp=SwiGLU):
        super().__init__()
        self.attention, self.mlp = attention, mlp(dim)
        self.norm1, self.norm2 = norm(dim), norm(dim)

    def forward(self, x: Tensor, shared=None) -> Tensor:
        x = x + self.attention(self.norm1(x), shared)
        return x + self.mlp(self.norm2(x))


class LM(nn.Module):
    """Embedding, blocks, norm and head; a subclass names its attention and what its layers share."""

    attention: type[Attention] = Attention
    learned_positions = False

    def __init__(self, vocab=17, dim=16, layers=2, heads=4, kv_heads=None, max_positions=64):
        super().__init__()
        self.vocab, self.max_positions = vocab, max_positions
        self.embed = nn.Embedding(vocab, dim)
        self.embed_positions = nn.Embedding(max_positions, dim) if self.learned_positions else None
        args = dim, heads, kv_heads or heads, max_positions
        self.blocks = nn.ModuleList(Block(self.attention(*args), dim) for _ in range(layers))
        self.norm = RMSNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)

    def shared(self, x: Tensor):
        return None

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.embed_positions is not None:
            x = x + self.embed_positions(torch.arange(ids.shape[1], device=ids.device))
        shared = self.shared(x)
        for block in self.blocks:
            x = block(x, shared)
        return self.head(self.norm(x))


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


# --- attention as matmul and softmax -------------------------------------------------------------------------------


class EagerAttention(Attention):
    """A registered `tril` buffer cut to length, `masked_fill`, softmax, dropout."""

    def __init__(self, dim, heads, kv_heads, max_positions):
        super().__init__(dim, heads, kv_heads, max_positions)
        self.register_buffer("tril", torch.tril(torch.ones(max_positions, max_positions))[None, None])
        self.dropout = nn.Dropout(0.1)

    def attend(self, q, k, v, shared):
        S = q.shape[-2]
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        scores = scores.masked_fill(self.tril[:, :, :S, :S] == 0, float("-inf"))
        return self.dropout(F.softmax(scores, dim=-1)) @ v


class Eager(LM):
    attention = EagerAttention
    learned_positions = True


class EagerWhereAttention(Attention):
    def attend(self, q, k, v, shared):
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / self.head_dim**0.5
        scores = torch.where(shared, scores, torch.finfo(scores.dtype).min)
        return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


class EagerWhere(LM):
    attention = EagerWhereAttention
    learned_positions = True

    def shared(self, x):
        S = x.shape[1]
        return torch.ones(S, S, dtype=torch.bool, device=x.device).tril()


class SinkAttention(Attention):
    """A learned logit per head joins the softmax and is dropped after it, as in GPT-OSS."""

    def __init__(self, dim, heads, kv_heads, max_positions):
        super().__init__(dim, heads, kv_heads, max_positions)
        self.sinks = nn.Parameter(torch.linspace(-1, 1, heads))

    def attend(self, q, k, v, shared):
        B, H, S, _ = q.shape
        scores = torch.matmul(q, k.transpose(2, 3)) * self.head_dim**-0.5 + shared
        scores = torch.cat([scores, self.sinks.reshape(1, -1, 1, 1).expand(B, H, S, 1)], dim=-1)
        scores = scores - scores.max(dim=-1, keepdim=True).values
        return torch.matmul(F.softmax(scores, dim=-1)[..., :-1], v)


class Sinks(LM):
    attention = SinkAttention
    learned_positions = True

    def shared(self, x):
        S = x.shape[1]
        return torch.full((S, S), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device).triu(1)[None, None]


class SoftcapAttention(Attention):
    def attend(self, q, k, v, shared):
        scores = torch.matmul(q, k.transpose(2, 3)) * self.head_dim**-0.5
        scores = torch.tanh(scores / 2.0) * 2.0 + shared
        return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float64).to(q.dtype), v)


class Softcap(Sinks):
    """Scores and logits bounded by tanh, as in Gemma 2."""

    attention = SoftcapAttention

    def forward(self, ids):
        return torch.tanh(super().forward(ids) / 3.0) * 3.0


class ParallelBlock(nn.Module):
    """Attention and MLP side by side; all query heads read the single key and value head by broadcasting."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.norm, self.mlp = nn.LayerNorm(dim), GeluMLP(dim)
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * self.head_dim)
        self.o = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        k, v = self.kv(y).chunk(2, dim=-1)  # [B, S, head_dim]
        q = self.q(y).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        t = torch.arange(x.shape[1], device=x.device)
        scores = q @ k.mT.unsqueeze(1) / self.head_dim**0.5
        scores = scores.masked_fill(t > t[:, None], float("-inf"))
        z = (scores.softmax(-1) @ v.unsqueeze(1)).transpose(1, 2).flatten(2)
        return x + self.o(z) + self.mlp(y)


class Parallel(GPT):
    def __init__(self, dim=16, layers=2, heads=4, **sizes):
        super().__init__(dim=dim, layers=layers, heads=heads, **sizes)
        self.blocks = nn.Sequential(*(ParallelBlock(dim, heads) for _ in range(layers)))


class OneLayerOneHead(nn.Module):
    """The attention of a first tutorial: no head axis, `bmm`."""

    def __init__(self, vocab=17, dim=16, max_positions=64, gain=1.0):
        super().__init__()
        self.vocab, self.max_positions, self.dim, self.gain = vocab, max_positions, dim, gain
        self.embed, self.embed_positions = nn.Embedding(vocab, dim), nn.Embedding(max_positions, dim)
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.head = nn.Linear(dim, vocab)

    def forward(self, ids: Tensor) -> Tensor:
        S = ids.shape[1]
        x = self.embed(ids) + self.embed_positions(torch.arange(S, device=ids.device))
        scores = torch.bmm(self.query(x), self.key(x).transpose(1, 2)) / self.dim**0.5
        future = torch.tril(torch.ones(S, S, device=ids.device)) == 0
        weights = torch.softmax(scores.masked_fill(future, float("-inf")), dim=-1)
        return self.head(torch.tanh(x + self.gain * torch.bmm(weights, self.value(x))))


class DenseMixture(nn.Module):
    """Every expert on every token, weighed by a softmax gate."""

    def __init__(self, dim: int, experts: int = 3):
        super().__init__()
        self.gate = nn.Linear(dim, experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(dim) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x).softmax(dim=-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-2)
        return (gate.unsqueeze(-1) * outputs).sum(dim=-2)


class MoEDense(LM):
    learned_positions = True

    def __init__(self, dim=16, **sizes):
        super().__init__(dim=dim, **sizes)
        for block in self.blocks:
            block.mlp = DenseMixture(dim)


# --- forms that leave positions, heads or shapes less plain --------------------------------------------------------


class RoutedMLP(nn.Module):
    """Each token gathers the weights of its best experts: [B*S*K] products with a matrix each, then a sum over K."""

    def __init__(self, dim: int, experts: int = 4, chosen: int = 2):
        super().__init__()
        self.experts, self.chosen = experts, chosen
        self.router = nn.Linear(dim, experts)
        self.up = nn.Parameter(torch.empty(experts, dim, 2 * dim))
        self.down = nn.Parameter(torch.empty(experts, 2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        B, S, D = x.shape
        flat = x.view(-1, D)
        scores, ids = self.router(flat).topk(self.chosen)
        kept = torch.zeros(B * S, self.experts, dtype=x.dtype, device=x.device).scatter(1, ids, scores.softmax(-1))
        copies = flat.repeat_interleave(self.chosen, dim=0)
        hidden = F.silu(torch.bmm(copies[:, None], self.up[ids.reshape(-1)]))
        made = torch.bmm(hidden, self.down[ids.reshape(-1)])[:, 0]
        weighted = made * kept.gather(1, ids).reshape(-1)[:, None]
        return weighted.view(B * S, self.chosen, D).sum(1).view(B, S, D)


class RoutedExperts(Llama):
    def __init__(self, dim=16, **sizes):
        super().__init__(dim=dim, **sizes)
        for block in self.blocks:
            block.mlp = RoutedMLP(dim)


class MergedHeadsAttention(Attention):
    """Requests and heads merged to one axis; the ALiBi bias, of that axis too, is the addend of `baddbmm`."""

    def attend(self, q, k, v, shared):
        B, H, S, D = q.shape
        bias, mask = shared
        q, k, v = (x.reshape(B * H, S, D) for x in (q, k, v))
        scores = bias.baddbmm(q, k.mT, beta=0.5, alpha=D**-0.5).view(B, H, S, S)
        probs = scores.masked_fill(mask, -1e9).softmax(-1).view(B * H, S, S)
        return torch.bmm(probs, v).view(B, H, S, D)


class MergedHeads(LM):
    attention = MergedHeadsAttention

    def shared(self, x):
        (B, S), H = x.shape[:2], self.blocks[0].attention.heads
        slopes = 2.0 ** -torch.arange(1, H + 1, device=x.device, dtype=x.dtype)
        counted = torch.ones(B, S, device=x.device, dtype=x.dtype).cumsum(-1) - 1
        bias = (slopes[:, None] * counted[:, None]).reshape(B * H, 1, S)
        t = torch.arange(S, device=x.device)
        return bias, t[None, :] > t[:, None]


class AssembledKeysAttention(nn.Module):
    """Keys written into a new tensor in two parts: one from a latent for each head, one that all heads share."""

    def __init__(self, dim: int, heads: int, kv_heads: int, max_positions: int):
        super().__init__()
        self.heads, self.part = heads, 4
        self.q = nn.Linear(dim, heads * 2 * self.part, bias=False)
        self.latent, self.shared_key = nn.Linear(dim, 6), nn.Linear(dim, self.part)
        self.up = nn.Linear(6, heads * 2 * self.part, bias=False)
        self.o = nn.Linear(heads * self.part, dim, bias=False)

    def forward(self, x: Tensor, shared) -> Tensor:
        B, S, _ = x.shape
        q = self.q(x).view(B, S, self.heads, -1).transpose(1, 2)
        own, v = self.up(self.latent(x)).view(B, S, self.heads, -1).transpose(1, 2).split(self.part, -1)
        k = own.new_empty(*own.shape[:-1], 2 * self.part)
        k[..., : self.part].copy_(own)
        k[..., self.part :].copy_(self.shared_key(x)[:, None])
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        gate = torch.sigmoid(x.mean(-1))[:, None, :, None].expand_as(y)
        return self.o((y * gate).transpose(1, 2).reshape(B, S, -1))


class AssembledKeys(LM):
    attention = AssembledKeysAttention
    learned_positions = True


# --- models to refuse ----------------------------------------------------------------------------------------------


class Refused(nn.Module):
    """Embedding, one operation that mixes positions or rows, head."""

    def __init__(self, vocab=17, dim=16, max_positions=64):
        super().__init__()
        self.vocab, self.max_positions = vocab, max_positions
        self.embed = nn.Embedding(vocab, dim)
        self.layer = self.make_layer(dim)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab)

    def make_layer(self, dim: int) -> nn.Module | None:
        return None

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.norm(x + self.mix(x)))


class Bidirectional(Refused):
    def mix(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class BidirectionalEager(Refused):
    def mix(self, x):
        return (x @ x.mT / 4).softmax(-1) @ x


class PeekingMask(Refused):
    """A mask off by one: each position sees the next."""

    def mix(self, x):
        S = x.shape[1]
        return F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(S, S, dtype=torch.bool).tril(1))


class CausalConvolution(Refused):
    def make_layer(self, dim):
        return nn.Conv1d(dim, dim, 3, padding=2)

    def mix(self, x):
        return self.layer(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class GRU(Refused):
    def make_layer(self, dim):
        return nn.GRU(dim, dim, batch_first=True)

    def mix(self, x):
        return self.layer(x)[0]


class CumulativeMean(Refused):
    def mix(self, x):
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


class Flipped(Refused):
    def mix(self, x):
        return x.flip(1)


class FutureShift(Refused):
    """Each position sees the next, by a slice and a concatenation."""

    def mix(self, x):
        return torch.cat([x[:, 1:], x[:, -1:]], dim=1)


class SequenceMean(Refused):
    def mix(self, x):
        return x.mean(1, keepdim=True)


class BatchMean(Refused):
    """Mixes the rows of the batch, not the positions."""

    def mix(self, x):
        return x - 2 * x.mean(0)


CACHEABLE: dict[str, Callable[..., nn.Module]] = {
    name: partial(build, cls)
    for name, cls in {
        "gpt": GPT,
        "gpt_sliced_positions": GPTSlicedPositions,
        "llama": Llama,
        "llama_interleaved_rope": LlamaInterleaved,
        "llama_buffered": LlamaBuffered,
        "alibi": Alibi,
        "sliding_window": SlidingWindow,
        "eager": Eager,
        "eager_where": EagerWhere,
        "tied": Tied,
        "sinks": Sinks,
        "softcap": Softcap,
        "parallel_block": Parallel,
        "last_only_head": LastOnlyHead,
        "one_layer_one_head": OneLayerOneHead,
        "moe_dense": MoEDense,
        "additive_mask_cumsum": AdditiveMaskCumsum,
        "routed_experts": RoutedExperts,
        "merged_heads": MergedHeads,
        "assembled_keys": AssembledKeys,
    }.items()
}

REFUSED: dict[str, tuple[Callable[..., nn.Module], str]] = {
    name: (partial(build, cls), word)
    for name, cls, word in [
        ("bidirectional", Bidirectional, "attention"),
        ("bidirectional_eager", BidirectionalEager, "softmax"),
        ("peeking_mask", PeekingMask, "attention"),
        ("causal_convolution", CausalConvolution, "conv1d"),
        ("gru_lm", GRU, "gru"),
        ("cumulative_mean", CumulativeMean, "cumsum"),
        ("flipped", Flipped, "flip"),
        ("future_shift", FutureShift, "slice"),
        ("sequence_mean", SequenceMean, "mean"),
        ("batch_mean", BatchMean, "mean"),
    ]
}


# --- toys whose law can be enumerated ------------------------------------------------------------------------------


class TableLM(nn.Module):
    """A Markov chain: the logits are looked up by the last token, or by the last two (`order=2`, not cacheable)."""

    def __init__(self, vocab=4, order=1, seed=0, temperature=1.0):
        super().__init__()
        self.vocab, self.order = vocab, order
        table = torch.randn([vocab] * (order + 1), generator=torch.Generator().manual_seed(seed)) / temperature
        self.table = nn.Parameter(table)

    def forward(self, ids: Tensor) -> Tensor:
        if self.order == 1:
            return F.embedding(ids, self.table)
        return self.table[F.pad(ids[:, :-1], (1, 0)), ids]  # token 0 stands before the first


def TinyTransformerLM(vocab=4, dim=8, max_positions=32, seed=0) -> nn.Module:
    """One attention layer that outweighs the last token, so that the whole history matters. `.double()` works."""
    return build(OneLayerOneHead, seed, vocab=vocab, dim=dim, max_positions=max_positions, gain=3.0)


class GRUStep(nn.Module):
    """A recurrent model with the explicit protocol: `step(tokens[R, T], pos, state) -> (logits[R, T, V], state)`."""

    def __init__(self, vocab=5, dim=8, seed=0):
        super().__init__()
        self.vocab, self.dim = vocab, dim
        self.embed = nn.Embedding(vocab, dim)
        self.gates, self.candidate = nn.Linear(2 * dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.head = nn.Linear(dim, vocab)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * (2 * p[0].numel() ** -0.5 if p.dim() > 1 else 0.1))

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        return {"h": self.head.weight.new_zeros(batch, self.dim)}

    def step(self, tokens: Tensor, pos, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        h, logits = state["h"], []
        for t in range(tokens.shape[1]):
            x = self.embed(tokens[:, t])
            reset, update = torch.sigmoid(self.gates(torch.cat([x, h], dim=-1))).chunk(2, dim=-1)
            h = update * h + (1 - update) * torch.tanh(self.candidate(torch.cat([x, reset * h], dim=-1)))
            logits.append(self.head(h))
        return torch.stack(logits, dim=1), {"h": h}

    def forward(self, ids: Tensor) -> Tensor:
        return self.step(ids, 0, self.initial_state(ids.shape[0]))[0]
