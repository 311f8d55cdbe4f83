"""One cycle of SMC as a function of a state and uniforms: propose, score, weigh, resample.

Both ways to run a cycle call the same function, ``cycle_of``: the host's loop, and a recording (see replay.py) that a
GPU replays. So nothing in it is decided by the host. What only the host can do (text processors, stopping criteria,
``max_lag``) comes in as arguments that do nothing, or are not there, in a recorded cycle.

The function is pure but for what is too large to copy: it writes texts and caches in place, at slots from
``state.generated`` on. Nothing reads these before the cycle counts, so a cycle may be run again from the same state, as
it is when every particle got weight zero. Which rows of texts and caches move is said by ``CycleInfo`` and left to the
caller.

What happens at the end of a cycle is in ``end_of_cycle``. How a population is resampled is in ``algorithms/weights.py``
(when, and what becomes of weights and evidence) and ``algorithms/resampling.py`` (who leaves how many copies); the
weight of a block is computed by ``judge`` in ``execution/region_bodies.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from smc_compile.runtime.algorithms.next_token import Mixture, NextTokenDistribution
from smc_compile.runtime.algorithms.resampling import keep_survivors
from smc_compile.runtime.algorithms.tensors import packed
from smc_compile.runtime.algorithms.weights import resample_step
from smc_compile.runtime.execution.region_bodies import Judged
from smc_compile.runtime.sessions.run import Run, stops
from smc_compile.runtime.state.particles import (
    CycleState,
    Particles,
    Weights,
    all_finished,
    ends_at_pending,
    ends_within,
    own_and_source,
    shared_after,
    write_block,
)
from smc_compile.runtime.state.region_types import EosIds, Places, Settings, State


class Uniforms(NamedTuple):
    """The randomness of a cycle, in [0, 1). x_0 is the pending token of a row, x_1 .. x_K are drafted."""

    draft: Tensor  # [R, K], for x_1 .. x_K
    bonus: Tensor  # [R], for the token behind them
    ancestors: Tensor  # [B, N]
    tries: Tensor  # [B], how often the cycle has been drawn, this time included; the others are those of this try


class CycleInfo(NamedTuple):
    """What came of a cycle, besides the next state."""

    source: Tensor  # [R], the row whose text and caches row r goes on with; source[source[r]] == source[r]
    since: Tensor  # [R], the slot from which on the caches of these two rows may differ
    ess: Tensor  # [B], effective sample size before resampling
    ancestors: Tensor  # [B, N], the particle whose text particle n goes on with
    status: Tensor  # [5, B] bool, the fields of ``Status``
    settled: Tensor | None  # [B] bool, for which requests ``settle`` drew an ancestor; None where it was not asked


class Status(NamedTuple):
    """What the host has to know of a cycle: [B] bool each."""

    undefined: Tensor  # a distribution of the target is NaN
    undefined_draft: Tensor  # one of the draft is
    dead: Tensor  # every particle has weight zero
    resampled: Tensor
    finished: Tensor  # every particle has ended, or the cap is reached

    @property
    def sound(self) -> bool:
        """Whether the cycle counts. If not, its particles and weights are the ones that it began with."""
        return not bool((self.undefined | self.undefined_draft | self.dead).any())


Cycle = Callable[[CycleState, Uniforms], tuple[CycleState, CycleInfo]]
# (tokens [R, capacity] with the new block, log weights [B, N]) -> log weights [B, N], which requests were settled [B]
Settle = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Drafting(NamedTuple):
    """Where the draft stands within a block."""

    tokens: Tensor  # [R, T], those that it reads next
    block: list[Tensor]  # x_0 .. x_k, [R] each
    ended: Tensor  # [R] bool, the text ends before the last of ``tokens``
    caches: State


class ModelPair(Protocol):
    """How a cycle calls draft and target (see model_pair.py)."""

    def draft_token(
        self, run: Run, at: Drafting, remaining: Tensor, settings: Settings, u: Tensor, places: Places
    ) -> tuple[Tensor, Tensor, Tensor, State]:
        """The next token of every row [R], its log-probability [R], whether the text ended before it [R], and the
        caches; an empty list where they change in place."""
        ...

    def judge(
        self,
        run: Run,
        block: Tensor,  # [R, K+1]: x_0 .. x_K
        log_q: Tensor,  # [R, K] of x_1 .. x_K
        ended: Tensor,  # [R] bool
        stopped: Tensor,  # [R, K+1] bool: the text ends with x_k for another reason than its token
        remaining: Tensor,  # [R], tokens still wanted after x_0
        u: Tensor,  # [R]
        places: Places,
        caches: State,
    ) -> tuple[Judged, State]:
        """What the target makes of a block, and its caches; an empty list where they change in place."""
        ...


def cycle_of(
    run: Run,
    models: ModelPair,
    proposal: NextTokenDistribution | Mixture,
    end: Callable[..., EndOfCycle],
    head: int = 2,
    settle: Settle | None = None,
) -> Cycle:
    """The cycle of the requests of ``run``. From the run come only what cycles share: prompts, settings, caps.

    Args:
        proposal: the distribution that drafted tokens are drawn from.
        end: ``end_of_cycle``, compiled.
        head: how many of the last tokens the draft has not read. It never reads x_K of the cycle before, so two; one in
            the first cycle.
        settle: changes log weights so that old tokens become the same in all particles (``max_lag``).
    """

    def cycle(state: CycleState, u: Uniforms) -> tuple[CycleState, CycleInfo]:
        generated, particles, weights = state.generated, state.particles, state.weights
        block, log_q, draft = propose(run, models, proposal, state, u, head)
        remaining, width = run.remaining(generated), block.shape[1]
        over = torch.cat([particles.stopped[:, None], stops(run, block[:, 1:], width - 1)], 1)
        places = run.places(generated - 1, width)
        judged, target = models.judge(
            run, block, log_q, particles.ended, over, remaining, u.bonus, places, state.target
        )
        write_block(state.texts, judged.tokens, judged.log_p, generated)
        stopped = stops(run, judged.tokens, 1)[:, 0]
        log_w, settled = weights.log_w + judged.increments.view_as(weights.log_w), None
        if settle is not None:
            log_w, settled = settle(state.texts.tokens, log_w)
        number = generated if isinstance(generated, Tensor) else remaining.new_full((), generated)
        caps = run.request.new_tokens
        ending = end(log_w, judged, stopped, particles, weights, run.eos_ids, caps, number, u.tries, u.ancestors)
        after = CycleState(
            texts=state.texts,
            particles=ending.particles,
            weights=ending.weights,
            target=target or state.target,
            draft=draft or state.draft,
            generated=generated + width,
        )
        return after, CycleInfo(ending.source, ending.since, ending.ess, ending.ancestors, ending.status, settled)

    return cycle


def propose(
    run: Run,
    models: ModelPair,
    proposal: NextTokenDistribution | Mixture,
    state: CycleState,
    u: Uniforms,
    head: int,
) -> tuple[Tensor, Tensor, State]:
    """Draft K tokens a row. Returns x_0 .. x_K [R, K+1], log q of x_1 .. x_K [R, K], and the draft's caches."""
    generated, last = state.generated, state.generated - 1
    slots = generated - head + torch.arange(head, device=run.keys.device)
    tokens = state.texts.tokens.index_select(1, slots)  # [R, head]
    remaining = run.remaining(generated)
    settings = proposal.at_try(run.settings, u.tries.repeat_interleave(run.n))
    at = Drafting(tokens, [tokens[:, -1]], state.particles.ended | state.particles.stopped, state.draft)
    log_q = []
    for k in range(u.draft.shape[1]):
        width = at.tokens.shape[1]
        places = run.places(last + k + 1 - width, width)
        token, log_prob, ended, caches = models.draft_token(run, at, remaining, settings, packed(u.draft[:, k]), places)
        log_q.append(log_prob)
        at = Drafting(token[:, None], [*at.block, token], ended, caches or at.caches)
    return torch.stack(at.block, 1), torch.stack(log_q, 1), at.caches


class EndOfCycle(NamedTuple):
    """The next particles and weights, and the fields of ``CycleInfo``."""

    particles: Particles
    weights: Weights
    source: Tensor
    since: Tensor
    ess: Tensor
    ancestors: Tensor
    status: Tensor


def end_of_cycle(threshold: float, method: str) -> Callable[..., EndOfCycle]:
    """Weigh, resample and commit, in one region.

    Where a cycle has to be drawn again, or broke, particles and weights stay as they were.
    """

    def weigh_and_resample(
        log_w: Tensor,  # [B, N], the block's increments included
        judged: Judged,
        stopped: Tensor,  # [R] bool, as of ``Particles``, of the new pending token
        particles: Particles,
        weights: Weights,
        eos_ids: EosIds,
        new_tokens: Tensor,  # [B]
        generated: Tensor,  # [], before the block
        tries: Tensor,  # [B]
        u: Tensor,  # [B, N]
    ) -> EndOfCycle:
        (batch, n), width = log_w.shape, judged.tokens.shape[1]
        of_target = judged.undefined.view(batch, n).any(1)
        of_draft = judged.increments.isnan().view(batch, n).any(1) & ~of_target  # with a sound target
        dead = (log_w == -math.inf).all(1)
        sound = ~(of_target | of_draft | dead).any()

        log_evidence = weights.log_evidence - tries.double().log()
        ancestors, log_w, log_evidence, ess, resampled = resample_step(log_w, log_evidence, u, threshold, method)
        ancestors = torch.where(sound, keep_survivors(ancestors), torch.arange(n, device=u.device))  # [B, N]
        source = (ancestors + n * torch.arange(batch, device=u.device)[:, None]).flatten()
        since = own_and_source(weights.shared, ancestors).flatten()
        shared = shared_after(weights.shared, ancestors, generated + width - 1)

        length, ended = ends_within(particles.length, particles.ended, judged.over, generated)
        committed = Particles(*(value[source] for value in Particles(ended, stopped, length)))
        after = Particles(*where_sound(sound, committed, particles))
        weighed = Weights(*where_sound(sound, Weights(log_w, log_evidence, shared), weights))

        lengths = ends_at_pending(after, judged.tokens[source, -1:], eos_ids, generated + width)
        finished = all_finished(lengths, n, generated + width, new_tokens)
        status = torch.stack([of_target, of_draft, dead, resampled & sound, finished & sound])
        return EndOfCycle(after, weighed, source, since, ess, ancestors, status)

    return weigh_and_resample


def where_sound(sound: Tensor, after: tuple[Tensor, ...], before: tuple[Tensor, ...]) -> list[Tensor]:
    """The fields of ``after`` if ``sound`` [] bool, else those of ``before``."""
    return [torch.where(sound, new, old) for new, old in zip(after, before, strict=True)]
