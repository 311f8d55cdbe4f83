"""Where a drafted block is cut: before target and draft part.

The target has scored a block, so its distribution p and the draft's q are known behind every token of it. With W_i the
normalised weights of the particles after k drafted tokens,

    D_k = sum_i W_i sum_v max(p_ik(v) - q_ik(v), 0)

is the total variation distance between the two at the next token, averaged over the particles. The first k at which it
is too large is where the block ends: k drafted tokens are kept, and p_ik itself draws the next one.

D_k reads the first k tokens alone. So whether token k + 1 is kept never depends on what it is, and the weights of the
kept ones are those of sequential importance sampling with a shorter block: the evidence keeps its mean. A rule that
looks at the token itself, or at the weights after it, is biased.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from smc_compile.runtime.algorithms.weights import normalise


class Cuts(NamedTuple):
    """How a block may be shortened.

    Attributes:
        max_divergence: it ends where D_k is larger; 1 never ends it.
        forgets: whether both models can forget tokens. Else all blocks are kept whole.
    """

    max_divergence: float = 1.0
    forgets: bool = True

    @property
    def any(self) -> bool:
        """Whether a block may be cut for what its distributions are."""
        return self.forgets and self.max_divergence < 1


def tokens_kept(
    log_p: Tensor,
    log_q: Sequence[Tensor],
    counts: Tensor,
    steps: Tensor,
    log_w: Tensor,
    max_divergence: float,
) -> Tensor:
    """How many of K drafted tokens each request keeps: [B] int64.

    Args:
        log_p: [R, K+1, V], the target's log-probabilities behind 0 .. K tokens.
        log_q: K times [R, V], those that the tokens were drawn from.
        counts: [R, K] bool; what a text does not count adds no divergence.
        steps: [R, K] float64, what each token adds to its particle's log weight.
        log_w: [B, N], log weights before the block.
        max_divergence: the block ends where D_k is larger.
    """
    batch, n = log_w.shape
    parted = torch.stack([(log_p[:, k].exp() - q.exp()).clamp_min(0).sum(-1) for k, q in enumerate(log_q)], 1)
    parted = torch.where(counts, parted.double(), 0.0).view(batch, n, -1)  # [B, N, K]
    before = torch.cat([torch.zeros_like(steps[:, :1]), steps.cumsum(1)[:, :-1]], 1)  # [R, K], behind k tokens
    before = before.view(batch, n, -1) + log_w[:, :, None]
    divergence = (normalise(before.transpose(1, 2)) * parted.transpose(1, 2)).sum(-1)  # [B, K]
    apart = divergence > max_divergence
    return torch.where(apart.any(1), apart.int().argmax(1), apart.shape[1])
