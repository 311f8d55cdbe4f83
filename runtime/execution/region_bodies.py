"""The bodies of the compiled regions: plain functions of tensors, no Python state, no host decision.

R = B*N rows, K draft tokens a cycle. A model is given as ``forward(tokens [R, T], places, state, context) -> (logits,
state)``. Resampling copies rows of ``state``; ``context`` is shared by all particles. Logits are called ``rows``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smc_compile.runtime.algorithms.next_token import Mixture, NextTokenDistribution, broken, pick
from smc_compile.runtime.algorithms.sampling import sample_inverse_cdf
from smc_compile.runtime.algorithms.steering import (
    Steering,
    log_weights,
    normalised,
    of_position,
    state_after,
    tempered,
)
from smc_compile.runtime.execution.cuts import Cuts, tokens_kept
from smc_compile.runtime.state.region_types import EosIds, Forward, Places, Settings, State, is_eos

WHOLE = Cuts()  # blocks stay whole but where every particle would die of one


def draw(log_probs: Tensor, u: Tensor, greedy: bool) -> Tensor:
    """One token a row, by inverse CDF with one uniform, or the likeliest: [..., V], [...] -> [...]."""
    return log_probs.argmax(-1) if greedy else sample_inverse_cdf(log_probs.exp(), u)


def run_model(forward: Forward) -> Callable[..., tuple[Tensor, State]]:
    """The model alone: text processors change its logits outside the region."""

    def model_rows(tokens: Tensor, places: Places, state: State, context: Any) -> tuple[Tensor, State]:
        return forward(tokens, places, state, context)

    return model_rows


class Chosen(NamedTuple):
    """One token of every row: [R] each but ``log_probs``."""

    token: Tensor  # padding in rows that have ended
    log_p: Tensor  # its log-probability
    ended: Tensor  # bool: the text ends before it
    undefined: Tensor  # bool: NaN in the distribution of a row that has not ended
    log_probs: Tensor | None  # [R, V], that it was drawn from; where asked for
    state: Tensor | None = None  # of the automaton behind it, where texts are conditioned


def choose(distribution: NextTokenDistribution | Mixture, whole: bool = False) -> Callable[..., Chosen]:
    """A token from the logits [R, V] after ``tokens`` [R, T]; ``whole``: with the distribution."""
    greedy = distribution.kind == "greedy"

    def choose_token(
        rows: Tensor,
        tokens: Tensor,
        ended: Tensor,
        eos_ids: EosIds,
        settings: Settings,
        u: Tensor,
        steering: Steering | None = None,
    ) -> Chosen:
        log_p = distribution.log_probs(rows, {name: value[:, None] for name, value in settings.items()})
        ended = ended | is_eos(tokens[:, -1:], eos_ids)[:, 0]
        undefined = broken(log_p) & ~ended
        if steering is not None:
            log_p, _ = normalised(tempered(log_p, steering), log_weights(steering, log_p))
        token = torch.where(ended, eos_ids.pad, draw(log_p, u, greedy))
        state = None
        if steering is not None:
            state = torch.where(ended, steering.state, state_after(steering, token))
        return Chosen(token, pick(log_p, token), ended, undefined, log_p if whole else None, state)

    return choose_token


def step(forward: Forward, chosen: Callable[..., Chosen]) -> Callable[..., tuple[Chosen, State]]:
    """One token of every row: the model, then ``choose``."""

    def next_token(
        tokens: Tensor,
        ended: Tensor,
        eos_ids: EosIds,
        settings: Settings,
        u: Tensor,
        places: Places,
        state: State,
        context: Any,
        steering: Steering | None,
    ) -> tuple[Chosen, State]:
        rows, state = forward(tokens, places, state, context)  # rows: [R, V]
        return chosen(rows, tokens, ended, eos_ids, settings, u, steering), state

    return next_token


class Judged(NamedTuple):
    """How the target judges a block x_0 .. x_K.

    Of a block, the first ``width`` - 1 drafted tokens are kept, and one token of the target follows them.
    """

    increments: Tensor  # [R] float64, added to the log weights
    tokens: Tensor  # [R, K+1]: the kept tokens and the target's; padding after an end, anything after ``width``
    log_p: Tensor  # [R, K+1] float64, of these tokens under the target; 0 where they do not count
    over: Tensor  # [R, K+1] bool: the sequence ends with x_k or before
    undefined: Tensor  # [R] bool: NaN in the distribution of a token that counts
    width: Tensor  # [B], tokens that the block adds
    dropped: Tensor  # [B] bool: no drafted token is kept, since every particle would have weight zero
    state: Tensor | None = None  # [R], of the automaton behind the block, where texts are conditioned
    critic: Tensor | None = None  # [R], as of ``Particles``, where there is a critic


def judge(distribution: NextTokenDistribution, cuts: Cuts = WHOLE) -> Callable[..., Judged]:
    """From the target's logits [R*(K+1), V] over a block: what is kept of it, weight increments and the next token.

    A token counts unless it comes after the end of a sequence or after the last wanted one. The others add nothing to
    the weights; neither does the last token, since it is drawn from the target itself. Where texts are conditioned it
    is drawn from the target weighed, and adds the log of the mass that this holds.
    """

    def judge_block(
        rows: Tensor,
        block: Tensor,  # [R, K+1]: x_0 .. x_K
        log_q: Tensor,  # [R, K] of x_1 .. x_K
        proposed: Sequence[Tensor],  # K times [R, V], log-probabilities that they were drawn from; none without cuts
        log_w: Tensor,  # [B, N], before the block
        ended: Tensor,  # [R]
        stops: Tensor,  # [R, K+1] bool: the text ends with x_k for another reason than its token
        eos_ids: EosIds,
        remaining: Tensor,  # [R], tokens still wanted after x_0
        settings: Settings,
        u: Tensor,  # [R, K+1], for the target's token behind 0 .. K drafted ones
        steering: Steering | None = None,  # [R, K+1]: before x_1 .. x_{K+1}
    ) -> Judged:
        (r, width), (batch, n) = block.shape, log_w.shape
        spread = {name: value[:, None].expand(r, width).reshape(-1, 1) for name, value in settings.items()}
        log_p = distribution.log_probs(rows, spread).view(r, width, -1)
        over = ended[:, None] | ((is_eos(block, eos_ids) | stops).int().cumsum(1) > 0)
        place = torch.arange(width, device=block.device)
        counts = ~over & (place < remaining[:, None])  # [R, K+1], of the token behind x_k
        of_drafted = pick(log_p[:, :-1], block[:, 1:]).double()
        law, of_weighed = log_p, of_drafted
        if steering is not None:
            powered, weights = tempered(log_p, steering), log_weights(steering, log_p)  # [R, K+1, V]
            law = normalised(powered, weights)[0] if cuts.any else log_p
            of_weighed = pick((powered + weights)[:, :-1], block[:, 1:]).double()  # of all others none is computed
        steps = torch.where(counts[:, :-1], of_weighed - log_q.double(), 0.0)  # [R, K]

        kept = torch.full((batch,), width - 1, device=block.device)
        if cuts.any:
            kept = tokens_kept(law, proposed, counts[:, :-1], steps, log_w, cuts.max_divergence)
        increments = torch.where(place[:-1] < kept.repeat_interleave(n)[:, None], steps, 0.0).sum(1)
        dropped = torch.zeros_like(kept, dtype=torch.bool)
        if cuts.forgets:
            dropped = (log_w + increments.view(batch, n) == -math.inf).all(1)
            kept = torch.where(dropped, 0, kept)
            increments = torch.where(dropped.repeat_interleave(n), 0.0, increments)

        at = kept.repeat_interleave(n)[:, None]  # [R, 1]
        log_last = log_p[:, -1]
        if cuts.forgets:
            log_last = log_p.gather(1, at[:, :, None].expand(-1, -1, log_p.shape[-1]))[:, 0]
        log_drawn, state = log_last, None
        if steering is not None:
            at_last = of_position(steering, at)
            log_drawn, mass = normalised(tempered(log_last, at_last), log_weights(at_last, log_last))
            counted = counts.gather(1, at)[:, 0]
            increments = increments + torch.where(counted, mass.double(), 0.0)
        last = draw(log_drawn, u.gather(1, at)[:, 0], False)[:, None]  # [R, 1]
        if steering is not None:
            state = torch.where(counted, state_after(at_last, last[:, 0]), at_last.state)
        drafted = torch.cat([block[:, 1:], last], 1)
        tokens = torch.where(over, eos_ids.pad[:, None], torch.where(place == at, last, drafted))
        of_last = pick(log_last, last[:, 0]).double()[:, None]
        of_tokens = torch.where(place == at, of_last, torch.cat([of_drafted, of_last], 1))
        live = counts & (place <= at)
        undefined = (broken(log_p) & live).any(1)
        return Judged(increments, tokens, torch.where(live, of_tokens, 0.0), over, undefined, kept + 1, dropped, state)

    return judge_block


def score(forward: Forward, judged: Callable[..., Judged]) -> Callable[..., tuple[Judged, State]]:
    """The target over pending and drafted tokens, then ``judge``."""

    def score_block(
        block: Tensor,
        log_q: Tensor,
        proposed: Sequence[Tensor],
        log_w: Tensor,
        ended: Tensor,
        stops: Tensor,
        eos_ids: EosIds,
        remaining: Tensor,
        settings: Settings,
        u: Tensor,
        places: Places,
        state: State,
        context: Any,
        steering: Steering | None,
    ) -> tuple[Judged, State]:
        rows, state = forward(block, places, state, context)  # rows: [R*(K+1), V]
        given = (block, log_q, proposed, log_w, ended, stops, eos_ids, remaining, settings, u)
        return judged(rows, *given, steering), state

    return score_block
