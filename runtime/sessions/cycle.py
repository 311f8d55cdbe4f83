"""One cycle of SMC as a function of a state and uniforms: propose, score, weigh, resample.

Both ways to run a cycle call the same function, ``cycle_of``: the host's loop, and a recording (see replay.py) that a
GPU replays. So nothing in it is decided by the host. What only the host can do (text processors, stopping criteria,
``max_lag``) comes in as arguments that do nothing, or are not there, in a recorded cycle.

The function is pure but for what is too large to copy: it writes texts and caches in place, at slots from
``state.generated`` on. Nothing reads these before the cycle counts, and the next one writes over what this one does
not keep: that is all it takes to drop drafted tokens. Which rows of texts and caches move is said by ``CycleInfo`` and
left to the caller.

What happens at the end of a cycle is in ``end_of_cycle``. How a population is resampled is in ``algorithms/weights.py``
(when, and what becomes of weights and evidence) and ``algorithms/resampling.py`` (who leaves how many copies); the
weight of a block is computed by ``judge`` in ``execution/region_bodies.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from smc_compile.runtime.algorithms.next_token import Mixture, NextTokenDistribution
from smc_compile.runtime.algorithms.resampling import keep_survivors
from smc_compile.runtime.algorithms.tensors import packed
from smc_compile.runtime.algorithms.weights import divergence_of, resample_step
from smc_compile.runtime.execution.region_bodies import Chosen, Judged
from smc_compile.runtime.sessions.conditioned import conditioned, state_behind
from smc_compile.runtime.sessions.ragged_texts import stops
from smc_compile.runtime.sessions.run import Run
from smc_compile.runtime.state.particles import (
    ENDLESS,
    CycleState,
    Particles,
    Weights,
    all_finished,
    columns,
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
    target: Tensor  # [R, K+1], for the target's token behind 0 .. K of them
    ancestors: Tensor  # [B, N]


class CycleInfo(NamedTuple):
    """What came of a cycle, besides the next state."""

    source: Tensor  # [R], the row whose text and caches row r goes on with; source[source[r]] == source[r]
    since: Tensor  # [R], the slot from which on the caches of these two rows may differ
    ess: Tensor  # [B], effective sample size before resampling
    cost: Tensor  # [B], as ``divergence_of`` has it of the weights before resampling
    ancestors: Tensor  # [B, N], the particle whose text particle n goes on with
    status: Tensor  # [7, B] int64, the fields of ``Status``
    settled: Tensor | None  # [B] bool, for which requests ``settle`` drew an ancestor; None where it was not asked


class Status(NamedTuple):
    """What the host has to know of a cycle: [B] each, 1 where it is so."""

    undefined: Tensor  # a distribution of the target is NaN
    undefined_draft: Tensor  # one of the draft is
    dead: Tensor  # every particle has weight zero, and the models cannot forget the block
    dropped: Tensor  # every particle would have had weight zero, so nothing of the block was kept
    resampled: Tensor
    finished: Tensor  # every particle has ended, or the cap is reached
    generated: Tensor  # how many tokens there are after it

    @property
    def broken(self) -> Tensor:
        """[B] bool: a distribution is not defined."""
        return (self.undefined | self.undefined_draft) > 0

    @property
    def sound(self) -> bool:
        """Whether the cycle counts. If not, its particles and weights are the ones that it began with."""
        return not bool((self.broken | (self.dead > 0)).any())


Cycle = Callable[[CycleState, Uniforms], tuple[CycleState, CycleInfo]]
# (tokens [R, capacity], log weights [B, N], generated tokens [B]) -> log weights [B, N], which were settled [B]
Settle = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Drafting(NamedTuple):
    """Where the draft stands within a block."""

    tokens: Tensor  # [R, T], those that it reads next
    block: list[Tensor]  # x_0 .. x_k, [R] each
    ended: Tensor  # [R] bool, the text ends before the last of ``tokens``
    caches: State
    states: list[Tensor]  # of an automaton or a guide behind x_0 .. x_k, [R] each


Enough = Callable[[Drafting, int], bool]  # after so many tokens of a block


class ModelPair(Protocol):
    """How a cycle calls draft and target (see model_pair.py)."""

    def draft_token(
        self, run: Run, at: Drafting, remaining: Tensor, settings: Settings, u: Tensor, places: Places
    ) -> tuple[Chosen, State]:
        """The next token of every row and the caches; an empty list where they change in place."""
        ...

    def judge(
        self,
        run: Run,
        block: Tensor,  # [R, K+1]: x_0 .. x_K
        log_q: Tensor,  # [R, K] of x_1 .. x_K
        proposed: Sequence[Tensor],  # K times [R, V], what they were drawn from; none where blocks are never cut
        log_w: Tensor,  # [B, N], before the block
        ended: Tensor,  # [R] bool
        stopped: Tensor,  # [R, K+1] bool: the text ends with x_k for another reason than its token
        remaining: Tensor,  # [R], tokens still wanted after x_0
        u: Tensor,  # [R, K+1]
        places: Places,
        caches: State,
        states: Tensor,  # [R, K+1], of an automaton or a guide behind x_0 .. x_K
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
    exact: bool = False,
    enough: Enough | None = None,
) -> Cycle:
    """The cycle of the requests of ``run``. From the run come only what cycles share: prompts, settings, caps.

    Args:
        proposal: the distribution that drafted tokens are drawn from.
        end: ``end_of_cycle``, compiled.
        head: how many of the last tokens the draft has not read. It never reads x_K of the cycle before, so two; one in
            the first cycle, and after an exact one.
        settle: changes log weights so that old tokens become the same in all particles (``max_lag``).
        exact: draft nothing, and let the target draw one token. The draft reads what it has not read.
        enough: whether the rest of a block counts for no text; it is then filled up. The host is asked for each token.
    """

    def cycle(state: CycleState, u: Uniforms) -> tuple[CycleState, CycleInfo]:
        particles, weights, caps = state.particles, state.weights, run.request.new_tokens
        generated = run.standing(state.generated)
        if exact:
            u = u._replace(draft=u.draft[:, :1], target=u.target[:, :1])
        at = state._replace(generated=generated)
        block, log_q, proposed, states, draft = propose(run, models, proposal, at, u, head, enough)
        if exact:
            block, log_q, proposed, states = block[:, :1], log_q[:, :0], [], states[:, :1]
        remaining, width = run.remaining(generated), block.shape[1]
        over = torch.cat([particles.stopped[:, None], stops(run, block[:, 1:], torch.full_like(caps, width - 1))], 1)
        places, before = run.places(generated - 1, width), (proposed, weights.log_w, particles.ended)
        judged, target = models.judge(
            run, block, log_q, *before, over, remaining, u.target, places, state.target, states
        )
        write_block(state.texts, judged.tokens, judged.log_p, generated)
        judged = conditioned(run, judged, states, state.texts.tokens, particles, generated)
        stopped = stops(run, judged.tokens, judged.width, only_last=True).any(1)
        log_w, settled = weights.log_w + judged.increments.view_as(weights.log_w), None
        if settle is not None:
            log_w, settled = settle(state.texts.tokens, log_w, generated + judged.width)
        ending = end(log_w, judged, stopped, particles, weights, run.eos_ids, caps, generated, u.ancestors)
        after = CycleState(
            texts=state.texts,
            particles=ending.particles,
            weights=ending.weights,
            target=target or state.target,
            draft=draft or state.draft,
            generated=ending.generated,
        )
        told = (ending.ess, ending.cost, ending.ancestors, ending.status)
        return after, CycleInfo(ending.source, ending.since, *told, settled)

    return cycle


def propose(
    run: Run,
    models: ModelPair,
    proposal: NextTokenDistribution | Mixture,
    state: CycleState,
    u: Uniforms,
    head: int,
    enough: Enough | None = None,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor, State]:
    """Draft K tokens a row. Returns x_0 .. x_K [R, K+1], log q of x_1 .. x_K [R, K], K times the distribution that they
    were drawn from [R, V] where that is asked for, the states behind x_0 .. x_K [R, K+1], and the draft's caches."""
    generated, last, texts = state.generated, state.generated - 1, state.texts.tokens
    tokens = texts.gather(1, columns(generated - head, head, len(texts)))  # [R, head]
    remaining = run.remaining(generated)
    over, states = state.particles.ended | state.particles.stopped, [state.particles.automaton]
    at = Drafting(tokens, [tokens[:, -1]], over, state.draft, states)
    log_q: list[Tensor] = []
    proposed: list[Tensor] = []
    for k in range(u.draft.shape[1]):
        if k and enough is not None and enough(at, k):
            missing = u.draft.shape[1] - k  # of values that nothing reads
            at = at._replace(block=[*at.block, *[run.eos_ids.pad] * missing])
            at = at._replace(states=at.states + at.states[-1:] * missing)
            log_q, proposed = log_q + log_q[-1:] * missing, proposed + proposed[-1:] * missing
            break
        width = at.tokens.shape[1]
        places = run.places(last + k + 1 - width, width)
        drawn, caches = models.draft_token(run, at, remaining, run.settings, packed(u.draft[:, k]), places)
        log_q.append(drawn.log_p)
        if drawn.log_probs is not None:
            proposed.append(drawn.log_probs)
        at = Drafting(
            drawn.token[:, None],
            [*at.block, drawn.token],
            drawn.ended,
            caches or at.caches,
            [*at.states, state_behind(run, at.states[-1], drawn, remaining > k)],
        )
    return torch.stack(at.block, 1), torch.stack(log_q, 1), proposed, torch.stack(at.states, 1), at.caches


class EndOfCycle(NamedTuple):
    """The next particles, weights and counts, and the fields of ``CycleInfo``."""

    particles: Particles
    weights: Weights
    generated: Tensor
    source: Tensor
    since: Tensor
    ess: Tensor
    cost: Tensor
    ancestors: Tensor
    status: Tensor


def end_of_cycle(threshold: float, method: str) -> Callable[..., EndOfCycle]:
    """Weigh, resample and commit, in one region. Where a cycle broke, particles and weights stay as they were."""

    def weigh_and_resample(
        log_w: Tensor,  # [B, N], the block's increments included
        judged: Judged,
        stopped: Tensor,  # [R] bool, as of ``Particles``, of the new pending token
        particles: Particles,
        weights: Weights,
        eos_ids: EosIds,
        new_tokens: Tensor,  # [B]
        generated: Tensor,  # [B], before the block
        u: Tensor,  # [B, N]
    ) -> EndOfCycle:
        batch, n = log_w.shape
        of_target = judged.undefined.view(batch, n).any(1)
        of_draft = judged.increments.isnan().view(batch, n).any(1) & ~of_target  # with a sound target
        dead = (log_w == -math.inf).all(1)
        lost = dead if judged.state is not None else torch.zeros_like(dead)  # no other token would fit the automaton
        dead = dead & ~lost
        sound = ~(of_target | of_draft | dead).any()

        cost = divergence_of(log_w)
        ancestors, log_w, log_evidence, ess, resampled = resample_step(
            log_w, weights.log_evidence, u, threshold, method
        )
        ancestors = torch.where(sound, keep_survivors(ancestors), torch.arange(n, device=u.device))  # [B, N]
        source = (ancestors + n * torch.arange(batch, device=u.device)[:, None]).flatten()
        since = own_and_source(weights.shared, ancestors).flatten()
        made = generated + judged.width
        shared = shared_after(weights.shared, ancestors, made - 1)

        first, width = generated.repeat_interleave(n), judged.width.repeat_interleave(n)
        length, ended = ends_within(particles.length, particles.ended, judged.over, first, width)
        automaton = particles.automaton if judged.state is None else judged.state
        critic = particles.critic if judged.critic is None else judged.critic
        ending = lost.repeat_interleave(n)
        length, ended = torch.where(ending & (length == ENDLESS), first, length), ended | ending
        committed = Particles(*(value[source] for value in Particles(ended, stopped, length, automaton, critic)))
        after = Particles(*where_sound(sound, committed, particles))
        dropped = weights.dropped + judged.dropped
        weighed = Weights(*where_sound(sound, Weights(log_w, log_evidence, shared, dropped), weights))

        last = judged.tokens.gather(1, width[:, None] - 1)[source]
        lengths = ends_at_pending(after, last, eos_ids, first + width)
        finished = all_finished(lengths, n, made, new_tokens)
        made = torch.where(sound, made, generated)
        flags = [of_target, of_draft, dead, judged.dropped & sound, resampled & sound, finished & sound]
        status = torch.stack([*(flag.long() for flag in flags), made])
        return EndOfCycle(after, weighed, made, source, since, ess, cost, ancestors, status)

    return weigh_and_resample


def where_sound(sound: Tensor, after: tuple[Tensor, ...], before: tuple[Tensor, ...]) -> list[Tensor]:
    """The fields of ``after`` if ``sound`` [] bool, else those of ``before``."""
    return [torch.where(sound, new, old) for new, old in zip(after, before, strict=True)]
