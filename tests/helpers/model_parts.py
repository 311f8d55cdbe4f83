"""What the models of the tests are made of."""

import copy
from collections.abc import Callable

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
