"""Speculative decoding by rejection: which drafted tokens the target accepts, and the token after them.

B requests with N chains of K drafted tokens each. The committed tokens follow the target's distribution exactly,
whatever the draft is (Leviathan et al., 2023; Chen et al., 2023). Several chains are tried in turn (SpecInfer: Miao et
al., 2023).
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
    """How far the drafted tokens of each request are accepted, while positions are decided one after the other."""

    candidates: Tensor  # [B, N] bool: the chain begins with the accepted tokens
    going: Tensor  # [B] bool: no position has been rejected so far
    length: Tensor  # [B], number of accepted tokens
    rest: Tensor  # [B, V] float64, distribution of the token after them, not normalised; undefined where ``going``

    @property
    def chain(self) -> Tensor:
        """Index of the first candidate [B]."""
        return self.candidates.int().argmax(1)


def set_out(batch: int, chains: int, vocab: int, device: torch.device) -> Walk:
    """The walk before the first position."""
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

    The candidates share the accepted tokens, so their tokens here are independent draws from one distribution q. A
    token x is accepted with probability min(1, r(x) / q(x)). There r is first the target's distribution p; each
    rejection replaces it by the residual max(r - q, 0), normalised. When all candidates are rejected, the next token is
    to be drawn from the last residual.

    Not normalised, a residual is max(p - c q, 0), where c is the sum of the masses of p and the residuals before it.
    So only numbers are carried from chain to chain, and the vocabulary is only read. Distributions are normalised and
    residuals summed in float64. NaN in a distribution rejects, and leaves NaN in ``rest``.

    Args:
        p: [B, V], the target's probabilities after the accepted tokens.
        q: [B, V], the draft's probabilities there, from which the candidates' tokens were drawn.
        drafted: [B, N], the token of each chain.
        u: [B, N], uniforms.
    """
    p, q = _normalised(p), _normalised(q)
    p_drafted, q_drafted = p.gather(1, drafted), q.gather(1, drafted)  # [B, N]
    taken, mass = (
        torch.zeros_like(p_drafted[:, 0]),
        torch.ones_like(p_drafted[:, 0]),
    )  # c, and the mass of the residual at c
    accepted, token = torch.zeros_like(walk.going), torch.zeros_like(walk.length)
    for n in range(drafted.shape[1]):
        asked = walk.going & walk.candidates[:, n] & ~accepted
        good = asked & (u[:, n] * mass * q_drafted[:, n] < p_drafted[:, n] - taken * q_drafted[:, n])
        accepted, token = accepted | good, torch.where(good, drafted[:, n], token)
        more = taken + mass
        left = _residual(p, q, more).sum(-1)
        # Only rounding leaves nothing, since a rejection then has probability zero. The residual becomes p again.
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
    """max(p - taken q, 0). p, q: [B, V]; taken: [B]."""
    return (p - taken[:, None] * q).clamp_min(0)


def arrive(walk: Walk, bonus: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The token after the accepted ones [B], and its distribution [B, V], not normalised.

    That is the residual, or after a whole accepted block ``bonus`` [B, V], the target's probabilities there. u: [B].
    """
    distribution = torch.where(walk.going[:, None], bonus.double(), walk.rest)
    return sample_inverse_cdf(distribution, u), distribution


def _normalised(probs: Tensor) -> Tensor:
    """Probabilities [B, V] in float64, with sum 1."""
    probs = probs.double()
    return probs / probs.sum(-1, keepdim=True)


# ---- regions ---------------------------------------------------------------------------------------------------------


def propose(distribution: NextTokenDistribution) -> Callable[..., tuple[Tensor, Tensor]]:
    """A region: from the draft's logits [R, V] a token of every row [R], and log-probabilities [R, V].

    The token is drawn from those. Greedy acceptance needs no distribution of the draft: [R, 0].
    """

    def propose_token(rows: Tensor, settings: Settings, u: Tensor) -> tuple[Tensor, Tensor]:
        log_q = distribution.log_probs(rows, {name: value[:, None] for name, value in settings.items()})
        return draw(log_q, u, False), log_q

    def propose_likeliest(rows: Tensor, settings: Settings, u: Tensor) -> tuple[Tensor, Tensor]:
        scores = distribution.warped(rows, {name: value[:, None] for name, value in settings.items()})
        return scores.argmax(-1), scores[:, :0]

    return propose_likeliest if distribution.kind == "greedy" else propose_token


def draft(forward: Forward, proposed: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A region: the draft, then ``propose``. Caches change in place."""

    def draft_token(
        tokens: Tensor, settings: Settings, u: Tensor, places: Places, state: State, context: object
    ) -> tuple[Tensor, Tensor]:
        rows, _ = forward(tokens, places, state, context)  # rows: [R, V]
        return proposed(rows, settings, u)

    return draft_token


def accept_drafted(distribution: NextTokenDistribution) -> Callable[..., Walk]:
    """A region: ``accept`` at the next position of the blocks, from the target's logits ``rows`` [B, N, K+1, V]."""

    def accept_position(
        walk: Walk,
        rows: Tensor,
        log_q: Tensor,  # [B, N, V], log-probabilities of the draft at this position
        drafted: Tensor,  # [B, N]
        settings: Settings,  # [B] each
        u: Tensor,  # [B, N]
    ) -> Walk:
        # All candidates share the accepted tokens, and so both distributions: those of the first one are read.
        requests, chain = torch.arange(len(rows), device=rows.device), walk.chain
        own = rows[requests, chain, walk.length]  # [B, V]
        log_p = distribution.log_probs(own, {name: value[:, None] for name, value in settings.items()})
        return accept(walk, log_p.exp(), log_q[requests, chain].exp(), drafted, u)

    return accept_position


class Verdict(NamedTuple):
    """The tokens that a cycle commits."""

    tokens: Tensor  # [B, K+1]: the accepted tokens and the one after them; the rest is filled up
    log_p: Tensor  # [B, K+1] float64, log-probabilities of these tokens under the target
    width: Tensor  # [B], how many of them are committed: up to the end of the sequence, and no more than wanted
    accepted: Tensor  # [B], how many of the committed were drafted
    ended: Tensor  # [B] bool: the last committed token ends the sequence
    chain: Tensor  # [B], index of a chain that begins with the accepted tokens
    undefined: Tensor  # [B] bool: NaN in a distribution of the target at a committed token
    undefined_draft: Tensor  # [B] bool: NaN in the draft's distribution there


def conclude(distribution: NextTokenDistribution) -> Callable[..., Verdict]:
    """A region, the last of a cycle: the token after the accepted ones, and how many tokens are committed."""
    greedy = distribution.kind == "greedy"

    def conclude_cycle(
        walk: Walk,
        rows: Tensor,  # [B, N, K+1, V], the target's logits
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
