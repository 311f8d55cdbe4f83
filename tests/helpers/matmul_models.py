"""Models without a cache that write attention as products, or leave positions, heads or shapes less plain."""

import torch
import torch.nn.functional as F
from helpers.model_parts import LM, Attention, GeluMLP, SwiGLU
from helpers.plain_models import GPT, Llama
from torch import Tensor, nn

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
        generated = torch.bmm(hidden, self.down[ids.reshape(-1)])[:, 0]
        weighted = generated * kept.gather(1, ids).reshape(-1)[:, None]
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
