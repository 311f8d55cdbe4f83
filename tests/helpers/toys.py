"""Toys whose distribution can be enumerated."""

import torch
import torch.nn.functional as F
from helpers.matmul_models import OneLayerOneHead
from helpers.model_parts import build
from torch import Tensor, nn


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
