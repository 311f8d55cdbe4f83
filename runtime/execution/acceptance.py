"""Speculative decoding by rejection: which drafted tokens the target accepts, and the token it adds.

B requests with N chains of K drafted tokens each. What is committed follows the target's distribution exactly, whatever the
draft (Leviathan et al., 2023; Chen et al., 2023); several chains are tried in turn (SpecInfer: Miao et al., 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from smc_compile.runtime.algorithms.next_token import NextTokenDistribution, broken, pick
from smc_compile.runtime.algorithms.sampling import sample_inverse_cdf
from smc_compile.runtime.execution.region_bodies import draw
from smc_compile.runtime.state.region_types import EosIds, Forward, Places, Settings, State, is_eos


class Walk(NamedTuple):
    """How far the drafts of each request were accepted, position by position."""

    candidates: Tensor  # [B, N] bool: the chain agrees with what was accepted
    going: Tensor  # [B] bool: everything was accepted so far
    length: Tensor  # [B], accepted tokens
    rest: (
        Tensor  # [B, V] float64, up to a factor the distribution of the token behind them; nothing is meant while going
    )

    @property
    def chain(self) -> Tensor:
        """The first candidate [B]."""
        return self.candidates.int().argmax(1)


def set_out(batch: int, chains: int, vocab: int, device: torch.device) -> Walk:
    """Nothing is accepted yet."""
    candidates = torch.ones(batch, chains, dtype=torch.bool, device=device)
    length = torch.zeros(batch, dtype=torch.int64, device=device)
    return Walk(
        candidates,
        torch.ones_like(length, dtype=torch.bool),
        length,
        length.new_zeros(batch, vocab, dtype=torch.float64),
    )


def accept(walk: Walk, p: Tensor, q: Tensor, drafted: Tensor, u: Tensor) -> Walk:
    """Accept or reject the tokens that the chains drafted for one position, chain after chain.

    The candidates share the accepted tokens, so theirs are independent draws from one distribution q. Each token x is accepted
    with probability min(1, r(x) / q(x)), where r is the target's distribution at first, and after each rejection the residual
    max(r - q, 0), normalised. When all are rejected, the token behind the accepted ones is to be drawn from the last
    residual.

    Up to its mass a residual is max(p - c q, 0), with c the sum of the masses of those before it: so numbers are
    carried from chain to chain, and the vocabulary is only read. Distributions are normalised and residuals summed in float64.
    NaN in a distribution rejects, and leaves NaN in ``rest``.

    Args:
        p: [B, V], the target's probabilities after the accepted tokens.
        q: [B, V], the draft's, those that the candidates among ``drafted`` [B, N] were drawn from.
        u: [B, N], uniforms.
    """
    p, q = _normalised(p), _normalised(q)
    p_drafted, q_drafted = p.gather(1, drafted), q.gather(1, drafted)  # [B, N]
    taken, mass = torch.zeros_like(p_drafted[:, 0]), torch.ones_like(p_drafted[:, 0])  # c, and the mass at c
    accepted, token = torch.zeros_like(walk.going), torch.zeros_like(walk.length)
    for n in range(drafted.shape[1]):
        asked = walk.going & walk.candidates[:, n] & ~accepted
        good = asked & (u[:, n] * mass * q_drafted[:, n] < p_drafted[:, n] - taken * q_drafted[:, n])
        accepted, token = accepted | good, torch.where(good, drafted[:, n], token)
        more = taken + mass
        left = _residual(p, q, more).sum(-1)
        # Only rounding leaves nothing: exactly, a rejection then has probability zero. The distribution takes its place.
        more, left = torch.where(left == 0, 0.0, more), torch.where(left == 0, 1.0, left)
        rejected = asked & ~good
        taken, mass = torch.where(rejected, more, taken), torch.where(rejected, left, mass)
    return Walk(
        walk.candidates & ((drafted == token[:, None]) | ~accepted[:, None]),
        accepted,
        walk.length + accepted,
        torch.where(walk.going[:, None], _residual(p, q, taken), walk.rest),
    )


def _residual(p: Tensor, q: Tensor, taken: Tensor) -> Tensor:
    """What is left of p after ``taken`` [B] times q. [B, V]"""
    return (p - taken[:, None] * q).clamp_min(0)


def arrive(walk: Walk, bonus: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The token behind the accepted ones [B], and its distribution up to a factor [B, V]: the residual, or ``bonus`` [B, V], the
    target's probabilities after a whole block. u: [B]"""
    distribution = torch.where(walk.going[:, None], bonus.double(), walk.rest)
    return sample_inverse_cdf(distribution, u), distribution


def _normalised(probs: Tensor) -> Tensor:
    """[B, V] in float64 that sum to 1."""
    probs = probs.double()
    return probs / probs.sum(-1, keepdim=True)


# ---- regions ---------------------------------------------------------------------------------------------------------


def propose(distribution: NextTokenDistribution) -> Callable[..., tuple[Tensor, Tensor]]:
    """From the draft's rows [R, V]: a token of every row [R], and the log-probabilities it was drawn from [R, V].

    Greedy acceptance asks for no distribution of the draft's: [R, 0].
    """

    def propose_token(rows: Tensor, settings: Settings, u: Tensor) -> tuple[Tensor, Tensor]:
        log_q = distribution.log_probs(rows, {name: value[:, None] for name, value in settings.items()})
        return draw(log_q, u, False), log_q

    def propose_likeliest(rows: Tensor, settings: Settings, u: Tensor) -> tuple[Tensor, Tensor]:
        scores = distribution.staged(rows, {name: value[:, None] for name, value in settings.items()})
        return scores.argmax(-1), scores[:, :0]

    return propose_likeliest if distribution.kind == "greedy" else propose_token


def draft(forward: Forward, proposed: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """One drafted token of every row: the model, then the draw (see ``propose``). A cache changes in place."""

    def draft_token(
        tokens: Tensor, settings: Settings, u: Tensor, places: Places, state: State, context: object
    ) -> tuple[Tensor, Tensor]:
        rows, _ = forward(tokens, places, state, context)  # rows: [R, V]
        return proposed(rows, settings, u)

    return draft_token


def accept_drafted(distribution: NextTokenDistribution) -> Callable[..., Walk]:
    """``accept`` from the target's rows [B, N, K+1, V], at the next position of the blocks."""

    def accept_position(
        walk: Walk,
        rows: Tensor,
        log_q: Tensor,  # [B, N, V], the draft's at this position
        drafted: Tensor,  # [B, N]
        settings: Settings,  # [B] each
        u: Tensor,  # [B, N]
    ) -> Walk:
        # All candidates share the accepted tokens, and with them both distributions; those of the first one are read.
        requests, chain = torch.arange(len(rows), device=rows.device), walk.chain
        own = rows[requests, chain, walk.length]  # [B, V]
        log_p = distribution.log_probs(own, {name: value[:, None] for name, value in settings.items()})
        return accept(walk, log_p.exp(), log_q[requests, chain].exp(), drafted, u)

    return accept_position


class Verdict(NamedTuple):
    """What a cycle commits."""

    tokens: Tensor  # [B, K+1]: the accepted ones and the one behind them; nothing is meant by later ones
    log_p: Tensor  # [B, K+1] float64 of these tokens under the target
    width: Tensor  # [B], how many of them count: up to and with an end of sequence, and no more than are wanted
    accepted: Tensor  # [B], how many of those were drafted
    ended: Tensor  # [B] bool: the last of them ends the sequence
    chain: Tensor  # [B], a chain that holds what was accepted
    undefined: Tensor  # [B] bool: a distribution of the target that counts is NaN
    undefined_draft: Tensor  # [B] bool: one of the draft


def conclude(distribution: NextTokenDistribution) -> Callable[..., Verdict]:
    """The end of a cycle: the token behind the accepted ones, and what of it all counts."""
    greedy = distribution.kind == "greedy"

    def conclude_cycle(
        walk: Walk,
        rows: Tensor,  # [B, N, K+1, V], the target's
        drafted: Tensor,  # [B, N, K]
        eos_ids: EosIds,  # of B requests
        wanted: Tensor,  # [B], tokens still wanted
        settings: Settings,  # [B] each
        u: Tensor,  # [B]
    ) -> Verdict:
        batch, _, length = drafted.shape
        requests, column = torch.arange(batch, device=rows.device), torch.arange(length + 1, device=rows.device)
        chain = walk.chain
        own = drafted[requests, chain]  # [B, K]
        spread = {name: value[:, None].expand(-1, length + 1).reshape(-1, 1) for name, value in settings.items()}
        log_p = distribution.log_probs(rows[requests, chain].flatten(0, 1), spread).view(batch, length + 1, -1)
        if greedy:
            best = log_p.argmax(-1)  # [B, K+1]
            accepted = (best[:, :-1] == own).int().cumprod(1).sum(1)
            last, lost = best.gather(1, accepted[:, None]), torch.zeros_like(walk.going)
        else:
            accepted = walk.length
            token, behind = arrive(walk, log_p[:, -1].exp(), u)
            last, lost = token[:, None], broken(behind)
        tokens = torch.where(column < accepted[:, None], torch.cat([own, last], 1), last)
        offered = (accepted + 1).minimum(wanted)
        end = is_eos(tokens, eos_ids) & (column < offered[:, None])  # [B, K+1]
        width = torch.where(end.any(1), end.int().argmax(1) + 1, offered)
        undefined = (broken(log_p) & (column < width[:, None])).any(1)
        return Verdict(
            tokens,
            pick(log_p, tokens).double(),
            width,
            accepted.minimum(width),
            end.any(1),
            chain,
            undefined,
            lost & (accepted < width) & ~undefined,
        )

    return conclude_cycle
