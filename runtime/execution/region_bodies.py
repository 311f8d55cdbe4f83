"""The bodies of the compiled regions: plain functions of tensors, no Python state, no host decision.

R = B*N rows, K draft tokens a cycle. A model is given as ``forward(tokens [R, T], places, state, context) -> (logits,
state)``. Resampling copies rows of ``state``; ``context`` is shared by all particles. Logits are called ``rows``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smc_compile.runtime.algorithms.next_token import Mixture, NextTokenDistribution, broken, pick
from smc_compile.runtime.algorithms.sampling import sample_inverse_cdf
from smc_compile.runtime.state.region_types import EosIds, Forward, Places, Settings, State, is_eos


def draw(log_probs: Tensor, u: Tensor, greedy: bool) -> Tensor:
    """One token a row, by inverse CDF with one uniform, or the likeliest: [..., V], [...] -> [...]."""
    return log_probs.argmax(-1) if greedy else sample_inverse_cdf(log_probs.exp(), u)


def run_model(forward: Forward) -> Callable[..., tuple[Tensor, State]]:
    """The model alone: text processors change its logits outside the region."""

    def model_rows(tokens: Tensor, places: Places, state: State, context: Any) -> tuple[Tensor, State]:
        return forward(tokens, places, state, context)

    return model_rows


def choose(distribution: NextTokenDistribution | Mixture) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """From the logits [R, V] after ``tokens`` [R, T]: the next token, its log-probability, ended, undefined; [R] each.

    Rows that have ended get padding. A row is undefined where NaN is in its distribution and it has not ended.
    """
    greedy = distribution.kind == "greedy"

    def choose_token(
        rows: Tensor, tokens: Tensor, ended: Tensor, eos_ids: EosIds, settings: Settings, u: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        log_p = distribution.log_probs(rows, {name: value[:, None] for name, value in settings.items()})
        ended = ended | is_eos(tokens[:, -1:], eos_ids)[:, 0]
        token = torch.where(ended, eos_ids.pad, draw(log_p, u, greedy))
        return token, pick(log_p, token), ended, broken(log_p) & ~ended

    return choose_token


def step(
    forward: Forward, chosen: Callable[..., tuple[Tensor, ...]]
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, State]]:
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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, State]:
        rows, state = forward(tokens, places, state, context)  # rows: [R, V]
        token, log_p, ended, bad = chosen(rows, tokens, ended, eos_ids, settings, u)
        return token, log_p, ended, bad, state

    return next_token


class Judged(NamedTuple):
    """How the target judges a block x_0 .. x_K."""

    increments: Tensor  # [R] float64, added to the log weights
    tokens: Tensor  # [R, K+1]: x_1 .. x_K and the bonus token; padding after an end
    log_p: Tensor  # [R, K+1] float64, of these tokens under the target; 0 where they do not count
    over: Tensor  # [R, K+1] bool: the sequence ends with x_k or before
    undefined: Tensor  # [R] bool: NaN in the distribution of a token that counts


def judge(distribution: NextTokenDistribution) -> Callable[..., Judged]:
    """From the target's logits [R*(K+1), V] over a block: weight increments, the bonus token, ended and undefined rows.

    A token counts unless it comes after the end of a sequence or after the last wanted one. The others add nothing to
    the weights; neither does the bonus token, since it is drawn from the target itself.
    """

    def judge_block(
        rows: Tensor,
        block: Tensor,  # [R, K+1]: x_0 .. x_K
        log_q: Tensor,  # [R, K] of x_1 .. x_K
        ended: Tensor,  # [R]
        stops: Tensor,  # [R, K+1] bool: the text ends with x_k for another reason than its token
        eos_ids: EosIds,
        remaining: Tensor,  # [R], tokens still wanted after x_0
        settings: Settings,
        u: Tensor,  # [R]
    ) -> Judged:
        r, width = block.shape
        spread = {name: value[:, None].expand(r, width).reshape(-1, 1) for name, value in settings.items()}
        log_p = distribution.log_probs(rows, spread).view(r, width, -1)
        over = ended[:, None] | ((is_eos(block, eos_ids) | stops).int().cumsum(1) > 0)
        wanted = torch.arange(1, width, device=block.device) <= remaining[:, None]
        counts = ~over[:, :-1] & wanted  # [R, K]
        of_drafted = pick(log_p[:, :-1], block[:, 1:]).double()
        increments = torch.where(counts, of_drafted - log_q.double(), 0.0).sum(1)
        bonus = draw(log_p[:, -1], u, False)
        tokens = torch.where(over, eos_ids.pad[:, None], torch.cat([block[:, 1:], bonus[:, None]], 1))
        live = torch.cat([counts, ~over[:, -1:] & (remaining[:, None] > width - 1)], 1)
        of_tokens = torch.cat([of_drafted, pick(log_p[:, -1], bonus).double()[:, None]], 1)
        return Judged(increments, tokens, torch.where(live, of_tokens, 0.0), over, (broken(log_p) & live).any(1))

    return judge_block


def score(forward: Forward, judged: Callable[..., Judged]) -> Callable[..., tuple[Judged, State]]:
    """The target over pending and drafted tokens, then ``judge``."""

    def score_block(
        block: Tensor,
        log_q: Tensor,
        ended: Tensor,
        stops: Tensor,
        eos_ids: EosIds,
        remaining: Tensor,
        settings: Settings,
        u: Tensor,
        places: Places,
        state: State,
        context: Any,
    ) -> tuple[Judged, State]:
        rows, state = forward(block, places, state, context)  # rows: [R*(K+1), V]
        return judged(rows, block, log_q, ended, stops, eos_ids, remaining, settings, u), state

    return score_block
