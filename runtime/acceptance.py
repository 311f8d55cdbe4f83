"""Speculative decoding by rejection: which drafted tokens the target accepts, and the token it adds.

B requests with N chains of K drafted tokens each. What is committed follows the target's law exactly, whatever the draft
(Leviathan et al., 2023; Chen et al., 2023); several chains are tried in turn (SpecInfer: Miao et al., 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .law import Law, broken, pick
from .regions import Ends, Forward, Places, Settings, State, draw, is_end
from .sampling import sample_inverse_cdf


class Accepted(NamedTuple):
    """How much of the drafts of each request was accepted."""

    length: Tensor  # [B], accepted tokens, 0 .. K
    chain: Tensor  # [B], a chain that holds them
    last: Tensor  # [B], the token behind them: from the last residual, or the bonus


def accept(p: Tensor, q: Tensor, drafted: Tensor, u: Tensor, u_last: Tensor) -> Accepted:
    """Accept or reject drafted tokens, position by position and chain after chain.

    At a position, the candidates are the chains that agree with what was accepted so far. Each token x of theirs is an
    independent draw from its q; it is accepted with probability min(1, r(x) / q(x)), where r is the target's law at
    first, and after each rejection the residual max(r - q, 0), normalised. When all candidates are rejected, the token
    is drawn from the last residual, and later positions count for nothing.

    Sums and residuals are float64, and laws are normalised in it: an error of their sum would not cancel.

    Args:
        p: [B, N, K+1, V], the target's probabilities after x_0 .. x_k of each chain.
        q: [B, N, K, V], those that x_1 .. x_K were drawn from.
        drafted: [B, N, K], x_1 .. x_K.
        u: [B, N, K], uniforms, one for each acceptance.
        u_last: [B], for the token behind the accepted ones.
    """
    batch, chains, length = drafted.shape
    rows = torch.arange(batch, device=drafted.device)
    total = q.sum(-1, dtype=torch.float64)  # [B, N, K]
    candidates = torch.ones(batch, chains, dtype=torch.bool, device=drafted.device)
    going = candidates[:, 0]  # everything was accepted so far
    count, final = torch.zeros_like(rows), None
    for k in range(length):
        law = _normalised(p[rows, _first(candidates), k])  # [B, V]
        rest, mass = law, torch.ones_like(u_last)  # the residual, and its sum: it is never divided by it
        accepted, token = torch.zeros_like(going), torch.zeros_like(rows)
        for n in range(chains):
            x, proposal = drafted[:, n, k], q[:, n, k].double() / total[:, n, k, None]
            asked = going & candidates[:, n] & ~accepted
            good = asked & (u[:, n, k] * mass * pick(proposal, x) < pick(rest, x))
            less = (rest - mass[:, None] * proposal).clamp_min(0)
            left = less.sum(-1)
            # A residual that rounding leaves empty belongs to a rejection that has probability zero but for rounding.
            less, left = torch.where((left == 0)[:, None], law, less), torch.where(left == 0, 1.0, left)
            rejected = asked & ~good
            rest, mass = torch.where(rejected[:, None], less, rest), torch.where(rejected, left, mass)
            accepted, token = accepted | good, torch.where(good, x, token)
        final = rest if final is None else torch.where(going[:, None], rest, final)
        candidates = candidates & ((drafted[:, :, k] == token[:, None]) | ~accepted[:, None])
        going, count = accepted, count + accepted
    bonus = _normalised(p[rows, _first(candidates), length])
    final = bonus if final is None else torch.where(going[:, None], bonus, final)
    return Accepted(count, _first(candidates), sample_inverse_cdf(final, u_last))


def accept_greedy(best: Tensor, drafted: Tensor) -> Accepted:
    """A drafted token is accepted when it is the target's most likely one. best: [B, K+1]; drafted: [B, K]"""
    count = (best[:, :-1] == drafted).int().cumprod(1).sum(1)
    return Accepted(count, torch.zeros_like(count), best.gather(1, count[:, None])[:, 0])


def _first(mask: Tensor) -> Tensor:
    """The first that is set: [B, N] -> [B]"""
    return mask.int().argmax(1)


def _normalised(probs: Tensor) -> Tensor:
    """Rows [B, V] in float64 that sum to 1."""
    probs = probs.double()
    return probs / probs.sum(-1, keepdim=True)


# ---- regions ---------------------------------------------------------------------------------------------------------


def propose(law: Law) -> Callable[..., tuple[Tensor, Tensor]]:
    """From the draft's rows [R, V]: a token of every row [R], and the log-probabilities it was drawn from [R, V]."""
    greedy = law.kind == "greedy"

    def propose_token(rows: Tensor, settings: Settings, u: Tensor) -> tuple[Tensor, Tensor]:
        log_q = law.log_probs(rows, {name: value[:, None] for name, value in settings.items()})
        return draw(log_q, u, greedy), log_q

    return propose_token


def draft(forward: Forward, law: Law) -> Callable[..., tuple[Tensor, Tensor]]:
    """One drafted token of every row: the model, then the draw. A cache changes in place."""
    proposed = propose(law)

    def draft_token(
        tokens: Tensor, settings: Settings, u: Tensor, places: Places, state: State, context: object
    ) -> tuple[Tensor, Tensor]:
        rows, _ = forward(tokens, places, state, context)  # rows: [R, V]
        return proposed(rows, settings, u)

    return draft_token


class Verdict(NamedTuple):
    """What a cycle commits."""

    tokens: Tensor  # [B, K+1]: the accepted ones and the one behind them; nothing is meant by later ones
    log_p: Tensor  # [B, K+1] float64 of these tokens under the target
    width: Tensor  # [B], how many of them count: up to and with an end of sequence, and no more than are wanted
    accepted: Tensor  # [B], how many of those were drafted
    ended: Tensor  # [B] bool: the last of them ends the sequence
    chain: Tensor  # [B], a chain that holds what was accepted
    undefined: Tensor  # [B] bool: a law of the target that counts is NaN
    undefined_draft: Tensor  # [B] bool


def verify(law: Law, chains: int) -> Callable[..., Verdict]:
    """From the target's rows over the blocks of all chains: what is accepted."""
    greedy = law.kind == "greedy"

    def verify_drafts(
        rows: Tensor,  # [R*(K+1), V]
        drafted: Tensor,  # [R, K]
        log_q: list[Tensor],  # K times [R, V]
        ends: Ends,  # of B requests
        wanted: Tensor,  # [B], tokens still wanted
        settings: Settings,  # [R] each
        u: Tensor,  # [B, N, K]
        u_last: Tensor,  # [B]
    ) -> Verdict:
        r, length = drafted.shape
        width = length + 1
        spread = {name: value[:, None].expand(r, width).reshape(-1, 1) for name, value in settings.items()}
        log_p = law.log_probs(rows, spread).view(r // chains, chains, width, -1)
        tokens = drafted.view(-1, chains, length)
        q = torch.stack(log_q, 1).view(r // chains, chains, length, -1)
        if greedy:
            done = accept_greedy(log_p[:, 0].argmax(-1), tokens[:, 0])
        else:
            done = accept(log_p.exp(), q.exp(), tokens, u, u_last)
        return _verdict(done, log_p, q, tokens, ends, wanted)

    return verify_drafts


def _verdict(done: Accepted, log_p: Tensor, log_q: Tensor, drafted: Tensor, ends: Ends, wanted: Tensor) -> Verdict:
    """Cut what was accepted at an end of sequence and at the length cap. log_p: [B, N, K+1, V]; log_q: [B, N, K, V]"""
    batch, _, length = drafted.shape
    requests, column = torch.arange(batch, device=drafted.device), torch.arange(length + 1, device=drafted.device)
    own = drafted[requests, done.chain]  # [B, K]
    last = done.last[:, None]
    tokens = torch.where(column < done.length[:, None], torch.cat([own, last], 1), last)
    offered = (done.length + 1).minimum(wanted)
    end = is_end(tokens, ends) & (column < offered[:, None])  # [B, K+1]
    width = torch.where(end.any(1), end.int().argmax(1) + 1, offered)
    counts = column < width[:, None]
    agreed = (drafted == own[:, None]).int().cumprod(2)  # [B, N, K]
    asked = torch.cat([torch.ones_like(agreed[:, :, :1]), agreed[:, :, :-1]], 2).bool() & counts[:, None, :-1]
    of_chain = log_p[requests, done.chain]  # [B, K+1, V]
    return Verdict(
        tokens,
        pick(of_chain, tokens).double(),
        width,
        done.length.minimum(width),
        end.any(1),
        done.chain,
        (broken(of_chain) & counts).any(1),
        (broken(log_q) & asked).flatten(1).any(1),
    )
