"""Models that no cache can be made for: `REFUSED[name]` holds a constructor and the word for the operation that the
refusal must name."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from helpers.model_parts import build
from torch import Tensor, nn


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
