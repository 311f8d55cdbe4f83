"""The end of a cycle in one region: weigh, resample, commit, and what the host has to know. No decision is the host's.

Where a cycle has to be drawn again, or broke, everything stays as it was: to draw it again is to run it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from smc_compile.runtime.algorithms.resampling import keep_survivors
from smc_compile.runtime.execution.region_bodies import Judged, weigh
from smc_compile.runtime.state.population import (
    Population,
    all_finished,
    ends_at_pending,
    ends_within,
    own_and_source,
    shared_after,
)
from smc_compile.runtime.state.region_types import EosIds


class Held(NamedTuple):
    """What a population holds besides tokens and caches."""

    log_w: Tensor  # [B, N]
    log_evidence: Tensor  # [B]
    ended: Tensor  # [R]
    length: Tensor  # [R]
    shared: Tensor  # [B, N, N], as of the population

    @classmethod
    def by(cls, p: Population) -> Held:
        return cls(*(getattr(p, name) for name in cls._fields))

    def write(self, p: Population) -> None:
        """In place."""
        for name, value in self._asdict().items():
            getattr(p, name).copy_(value)


class Closed(NamedTuple):
    """A population after a cycle.

    Rows of ``status`` [5, B] bool: the target's distribution is undefined; the draft's is; every particle has weight zero; the
    population was resampled; the request has finished.
    """

    held: Held
    source: Tensor  # [R]: the row whose tokens and caches row r goes on with; it keeps its own
    since: Tensor  # [R]: before that slot their caches are the same already
    ess: Tensor  # [B]
    ancestors: Tensor  # [B, N]
    status: Tensor  # [5, B]


def close(threshold: float, method: str) -> Callable[..., Closed]:
    """After the target's judgement of a block. No text ends for another reason than its tokens."""
    weigh_and_resample = weigh(threshold, method)

    def close_cycle(
        judged: Judged, held: Held, eos_ids: EosIds, new_tokens: Tensor, generated: Tensor, tries: Tensor, u: Tensor
    ) -> Closed:
        """new_tokens, tries: [B]; made: [], before the cycle; u: [B, N]."""
        batch, n = held.log_w.shape
        of_target = judged.undefined.view(batch, n).any(1)
        of_draft = judged.increments.isnan().view(batch, n).any(1) & ~of_target
        log_w = held.log_w + judged.increments.view(batch, n)
        dead = (log_w == -math.inf).all(1)
        sound = ~(of_target | of_draft | dead).any()
        weighed = weigh_and_resample(log_w, held.log_evidence - tries.double().log(), u)
        ancestors, log_w, log_evidence, ess, resampled = weighed
        identity = torch.arange(n, device=u.device)
        ancestors = torch.where(sound, keep_survivors(ancestors), identity)  # [B, N]
        source = (ancestors + n * torch.arange(batch, device=u.device)[:, None]).flatten()
        length, ended = ends_within(held.length, held.ended, judged.over, generated)
        width = judged.tokens.shape[1]
        since = own_and_source(held.shared, ancestors).flatten()
        shared = shared_after(held.shared, ancestors, generated + width - 1)
        new = Held(log_w, log_evidence, ended[source], length[source], shared)
        new = Held(*(torch.where(sound, after, before) for after, before in zip(new, held, strict=True)))
        pending, never = judged.tokens[source, -1:], torch.zeros_like(ended)
        lengths = ends_at_pending(new.length, new.ended, pending, never, eos_ids, generated + width)
        finished = all_finished(lengths, n, generated + width, new_tokens)
        status = torch.stack([of_target, of_draft, dead, resampled & sound, finished & sound])
        return Closed(new, source, since, ess, ancestors, status)

    return close_cycle


def close_token(
    over: Tensor, bad: Tensor, held: Held, token: Tensor, eos_ids: EosIds, new_tokens: Tensor, generated: Tensor
) -> tuple[Held, Tensor]:
    """After one token of the one-token loop: what is held, and its status as of ``Closed``. over, bad, token: [B]."""
    undefined = bad & (new_tokens > generated)
    sound = ~undefined.any()
    length, ended = ends_within(held.length, held.ended, over[:, None], generated)
    length, ended = torch.where(sound, length, held.length), torch.where(sound, ended, held.ended)
    lengths = ends_at_pending(length, ended, token[:, None], torch.zeros_like(ended), eos_ids, generated + 1)
    finished = all_finished(lengths, 1, generated + 1, new_tokens)
    never = torch.zeros_like(sound).expand_as(undefined)
    return held._replace(ended=ended, length=length), torch.stack([undefined, never, never, never, finished & sound])
