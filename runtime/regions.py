"""The bodies of the compiled regions: plain functions of tensors, no Python state, no host decision.

R = B*N rows, K draft tokens a cycle. A model is given as ``forward(tokens [R, T], positions [T], slots [T], state,
context) -> (rows, state)``; ``state`` is what particles permute, ``context`` what they share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .sampling import sample_inverse_cdf
from .weights import resample_step

State = list[Tensor]
Forward = Callable[[Tensor, Tensor, Tensor, State, Any], tuple[Tensor, State]]


def log_law(rows: Tensor, kind: str, temperature: float) -> Tensor:
    """Normalised log-probabilities [..., V] of rows: logits, or unnormalised probabilities; float32 at least."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if kind == "probs":
        return rows.log() - rows.sum(-1, keepdim=True).log()
    return torch.log_softmax(rows if temperature == 1.0 else rows / temperature, -1)


def broken(log_probs: Tensor) -> Tensor:
    """Rows [...] whose law is undefined: NaN anywhere (an infinite or NaN logit gives that)."""
    return log_probs.isnan().any(-1)


def draw(log_probs: Tensor, u: Tensor, greedy: bool) -> Tensor:
    """One token a row: inverse CDF with one uniform, or the mode. [..., V], [...] -> [...]"""
    return log_probs.argmax(-1) if greedy else sample_inverse_cdf(log_probs.exp(), u)


def pick(log_probs: Tensor, token: Tensor) -> Tensor:
    """log-probability of the chosen token: [..., V], [...] -> [...]"""
    return log_probs.gather(-1, token[..., None])[..., 0]


def propose(forward: Forward, temperature: float) -> Callable[..., tuple[Tensor, Tensor, Tensor, State]]:
    """Draft step: the next token of every row from the draft, and its log-probability; ended rows repeat EOS."""

    def draft_step(
        tokens: Tensor,
        ended: Tensor,
        eos: Tensor,
        u: Tensor,
        positions: Tensor,
        slots: Tensor,
        state: State,
        context: Any,
    ) -> tuple[Tensor, Tensor, Tensor, State]:
        rows, state = forward(tokens, positions, slots, state, context)  # rows: [R, V]
        log_q = log_law(rows, "logits", temperature)
        ended = ended | (tokens[:, -1] == eos)
        token = torch.where(ended, eos, draw(log_q, u, False))
        return token, pick(log_q, token), ended, state

    return draft_step


def score(
    forward: Forward, kind: str, temperature: float
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, State]]:
    """Target pass over pending and drafted tokens: weight increments, the bonus token, which rows ended or broke.

    Increments after the end of a sequence and beyond the length cap are zero; the bonus is drawn from the target itself
    and adds none.
    """

    def score_block(
        block: Tensor,  # [R, K+1]: x_0 .. x_K
        log_q: Tensor,  # [R, K] of x_1 .. x_K
        ended: Tensor,
        eos: Tensor,
        remaining: Tensor,  # tokens still wanted after x_0
        u: Tensor,  # [R]
        positions: Tensor,
        slots: Tensor,
        state: State,
        context: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, State]:
        r, width = block.shape
        rows, state = forward(block, positions, slots, state, context)  # rows: [R*(K+1), V]
        log_p = log_law(rows, kind, temperature).view(r, width, -1)
        over = ended[:, None] | ((block == eos).int().cumsum(1) > 0)  # [R, K+1]: nothing counts after x_k
        wanted = torch.arange(1, width, device=block.device) <= remaining
        counts = ~over[:, :-1] & wanted  # [R, K]
        increments = torch.where(counts, pick(log_p[:, :-1], block[:, 1:]).double() - log_q.double(), 0.0).sum(1)
        bonus = torch.where(over[:, -1], eos, draw(log_p[:, -1], u, False))
        live = torch.cat([counts, ~over[:, -1:] & (remaining > width - 1)], 1)
        return increments, bonus, over[:, -1].contiguous(), (broken(log_p) & live).any(1), state

    return score_block


def extend(
    forward: Forward, kind: str, temperature: float, greedy: bool
) -> Callable[..., tuple[Tensor, Tensor, Tensor, State]]:
    """Autoregressive step: the next token of every row from the target."""

    def target_step(
        tokens: Tensor,
        ended: Tensor,
        eos: Tensor,
        u: Tensor,
        positions: Tensor,
        slots: Tensor,
        state: State,
        context: Any,
    ) -> tuple[Tensor, Tensor, Tensor, State]:
        rows, state = forward(tokens, positions, slots, state, context)
        log_p = log_law(rows, kind, temperature)
        ended = ended | (tokens[:, -1] == eos)
        token = torch.where(ended, eos, draw(log_p, u, greedy))
        return token, ended, broken(log_p) & ~ended, state

    return target_step


def weigh(threshold: float, method: str) -> Callable[..., tuple[Tensor, ...]]:
    """Add increments [B, N] to the weights and resample the requests whose population degenerated."""

    def weigh_and_resample(log_w: Tensor, increments: Tensor, log_evidence: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        return resample_step(log_w + increments, log_evidence, u, threshold, method)

    return weigh_and_resample


def unify(caches: Sequence[Tensor], dim: int) -> None:
    """Tell the compiler that all caches share one length, so that it carries one symbol and not one a layer."""
    for cache in caches[1:]:
        torch._check(cache.shape[dim] == caches[0].shape[dim])
