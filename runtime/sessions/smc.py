"""Replay a compiled cycle on the host: prefill, propose, score, weigh, resample, commit, select."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from smc_compile.errors import GenerationError
from smc_compile.kernels.copy_rows import RowCopy
from smc_compile.result import Generation, Stats
from smc_compile.runtime.algorithms.next_token import Mixture, NextTokenDistribution
from smc_compile.runtime.algorithms.resampling import keep_survivors
from smc_compile.runtime.algorithms.tensors import mark_dynamic, packed
from smc_compile.runtime.algorithms.uniforms import Streams, of_cycle
from smc_compile.runtime.execution.incremental import RuntimeModel
from smc_compile.runtime.execution.region import Region, compiled_apart
from smc_compile.runtime.execution.region_bodies import Judged, choose, draw, judge, run_model, score, step, weigh
from smc_compile.runtime.execution.text_processors import TextProcessors
from smc_compile.runtime.sessions.clock import Clock
from smc_compile.runtime.sessions.cycle import Held, close
from smc_compile.runtime.sessions.replay import At, Record, Replay, in_shape, make_room, replays
from smc_compile.runtime.sessions.run import (
    Run,
    after_processors,
    cycles,
    drive,
    first_distribution,
    not_finite,
    require_distribution,
    stops,
)
from smc_compile.runtime.state.population import Population
from smc_compile.runtime.state.region_types import State, is_eos
from smc_compile.runtime.state.request import Request
from smc_compile.runtime.state.settling import Watcher, settle_old
from smc_compile.runtime.state.suffix_sizes import capacity_of, cycles_of, first_size

MAX_TRIES = 32  # how often a cycle in which every particle got weight zero is drawn again


class SMCSession:
    """Sequential Monte Carlo speculative decoding with N particles a request and K draft tokens a cycle."""

    def __init__(
        self,
        target: RuntimeModel,
        draft: RuntimeModel,
        distribution: NextTokenDistribution,
        draft_distribution: NextTokenDistribution | Mixture,
        n_particles: int,
        lookahead: int,
        ess_threshold: float,
        resampling_method: str,
        compiler: str,
        text_processors: TextProcessors,
        record: Record | None = None,
    ) -> None:
        """``record`` captures cycles to be replayed (see replay.py); what rules or stops of the host take part in is
        not."""
        self._target, self._draft, self._distribution, self._draft_distribution = (
            target,
            draft,
            distribution,
            draft_distribution,
        )
        self._n, self._k, self._text_processors = n_particles, lookahead, text_processors
        self._sizes: set[int] = set()  # batch sizes for which the regions have run
        self._weigh = Region("weigh", weigh(ess_threshold, resampling_method), compiler)
        self._uniforms = Region("uniforms", of_cycle(n_particles, lookahead), compiler)
        self._close = Region("close", close(ess_threshold, resampling_method), compiler)
        self._replay = Replay(record, self._on_device) if record is not None and not text_processors else None
        # Two widths of the draft: one token, and two at the head of a cycle: the last drafted token and the bonus.
        if text_processors:
            self._draft_head = Region("draft_head", run_model(draft.advance), compiler, draft.whole)
            self._draft_step = Region("draft_step", run_model(draft.advance), compiler, draft.whole)
            self._choose = Region("draft_choose", choose(draft_distribution), compiler)
            self._score = Region("score", run_model(target.score), compiler, target.whole)
            self._judge = Region("judge", judge(distribution), compiler)
        else:
            chosen = compiled_apart(choose(draft_distribution), "draft_choose", compiler, draft.whole)
            judged = compiled_apart(judge(distribution), "judge", compiler, target.whole)
            self._draft_head = Region("draft_head", step(draft.advance, chosen), compiler, draft.whole)
            self._draft_step = Region("draft_step", step(draft.advance, chosen), compiler, draft.whole)
            self._score = Region("score", score(target.score, judged), compiler, target.whole)

    @property
    def regions(self) -> list[Region]:
        found = [self._draft_head, self._draft_step, self._score, self._weigh]
        if self._text_processors:
            found += [
                self._choose,
                self._judge,
                *([self._text_processors.region] if self._text_processors.region else []),
            ]
        if self._replay:
            found += [self._uniforms, self._close]
        return found

    @torch.no_grad()
    def run(self, request: Request) -> Generation:
        """Generate; raises GenerationError, with the partial result, on logits not finite or a dead population."""
        models = (self._target, self._draft)
        return drive(self._begin(request), models, self._sizes, self._next_cycle, self._result)

    @torch.no_grad()
    def cycles(self, request: Request) -> Iterator[Run]:
        """As ``run``, cycle by cycle: the run before the first one and after each. Whoever asks may stop at any."""
        run = self._begin(request)
        yield run
        for _ in cycles(run, (self._target, self._draft), self._sizes, self._next_cycle):
            yield run

    def _next_cycle(self, run: Run) -> None:
        run.reserve(run.p.generated + self._k, (self._target, self._draft))
        if run.p.generated > 1 and replays(self._replay, run.request):  # the first cycle has a head of one token
            self._replayed(run, len(run.p.ess))
        else:
            self._cycle(run, len(run.p.ess))

    def _begin(self, request: Request) -> Run:
        clock, asked = Clock(self.regions), request
        self._text_processors.begin(request)
        stats = Stats("smc", int(request.new_tokens.max()), rules=self._text_processors.told())
        capacity = capacity_of(stats.new_tokens, self._k + 1)
        if replays(self._replay, request):
            request, capacity = in_shape(request, capacity)
        make_room(self._replay, request, self._n, capacity, self._k + 1, self._target, self._draft)
        size = first_size(capacity, request.ids.shape[1])
        rows, context, target = self._target.begin(request, self._n, size)
        draft_rows, draft_context, draft = self._draft.begin(request, self._n, size)
        clock.prefilled()
        log_p = first_distribution(rows, request, self._distribution, self._text_processors)
        require_distribution(log_p, None)
        log_q = first_distribution(draft_rows, request, self._draft_distribution, self._text_processors)
        require_distribution(log_q, None, "draft")
        report_support(log_p, log_q, stats)
        streams = Streams(request.seeds, self._n, capacity, cycles_of(stats.new_tokens, self._k + 1))
        p = Population.start(request, self._n, capacity, target, draft)
        first = draw(log_p[:, None].expand(-1, self._n, -1), streams.first(), False)
        p.tokens[:, 0] = first.flatten()
        p.log_p[:, 0] = log_p.gather(1, first).flatten()
        keys = mark_dynamic(request.key_positions(size), 1)
        watcher = Watcher(request.watch) if request.watch is not None else None
        run = Run(asked, request, p, streams, [context, draft_context], keys, clock, stats, [], watcher)
        p.stopped = stops(run, run.nothing, 1)[:, 0]
        return run

    def _cycle(self, run: Run, cycle: int) -> None:
        p, request = run.p, run.request
        batch, start = request.batch, p.generated - 1  # x_0 is generated token number ``start``
        tries = torch.ones(batch, dtype=torch.int64, device=p.tokens.device)
        for _ in range(MAX_TRIES):
            u_draft, u_bonus = run.streams.cycle(start, self._k, tries)
            block, log_q, draft_state = self._propose(run, p.generated, min(p.generated, 2), u_draft, tries)
            judged, target_state = self._judged(run, p.generated, block, log_q, u_bonus)
            increments = judged.increments.view(batch, -1)
            undefined = judged.undefined | judged.increments.isnan()  # NaN with a sound target comes from the draft
            if undefined.any():
                who = "target" if judged.undefined.any() else "draft"
                raise not_finite(undefined.view(batch, -1).any(1), request, p.generated, who)
            dead = (p.log_w + increments == -math.inf).all(1)  # [B]
            if not dead.any():
                break
            run.stats.retries += int(dead.sum())
            tries = tries + dead
        else:
            raise dead_population(dead, request, p.generated, self._n, self._k)
        p.draft, p.target = draft_state or p.draft, target_state or p.target
        p.commit(judged.tokens, judged.log_p, judged.over)
        p.stopped = stops(run, run.nothing, 1)[:, 0]
        log_w = p.log_w + increments
        if request.max_lag is not None:
            log_w, drawn = settle_old(p, log_w, request.max_lag, run.streams.settle(cycle))
            run.stats.settled_early += int(drawn.sum())
        ancestors, p.log_w, p.log_evidence, ess, resampled = self._weigh(
            log_w, p.log_evidence - tries.double().log(), run.streams.resample(cycle)
        )
        p.ess.append(ess)
        if resampled.any():
            begin = time.perf_counter()
            ancestors = keep_survivors(ancestors)
            dead_rows, source, since = p.permute(ancestors)
            if bool((p.generated < request.new_tokens).any()):  # else no model is asked again
                self._target.copy_rows(p.target, dead_rows, source, since, p.generated - 1)
                self._draft.copy_rows(p.draft, dead_rows, source, since, p.generated - 1)
            run.stats.resamplings += int(resampled.sum())
            run.clock.resample_seconds += time.perf_counter() - begin
        p.ancestors.append(ancestors)

    def _replayed(self, run: Run, cycle: int) -> None:
        """As ``_cycle``, in one recorded piece; it is run again when every particle got weight zero."""
        assert self._replay is not None
        p, request = run.p, run.request
        tries = torch.ones(request.batch, dtype=torch.int64)
        for _ in range(MAX_TRIES):
            status, at = self._replay(run, cycle, tries)
            undefined = status.undefined | status.undefined_draft
            if undefined.any():
                raise not_finite(undefined, request, p.generated, "target" if status.undefined.any() else "draft")
            if status.sound:
                break
            run.stats.retries += int(status.dead.sum())
            tries = tries + status.dead
        else:
            raise dead_population(status.dead, request, p.generated, self._n, self._k)
        p.generated += self._k + 1
        p.ess.append(at.ess.clone())
        p.ancestors.append(at.ancestors.clone())
        run.told = status.finished
        run.stats.resamplings += int(status.resampled.sum())
        run.stats.replayed += 1

    def _on_device(self, run: Run, at: At, copy_rows: RowCopy) -> None:
        """One cycle, in place; what holds numbers of tokens are tensors."""
        p = run.p
        u, u_bonus, u_ancestors = self._uniforms(run.streams.seeds, at.generated, at.cycle, at.tries)
        block, log_q, _ = self._propose(run, at.generated, 2, u, at.tries)
        judged, _ = self._judged(run, at.generated, block, log_q, u_bonus)
        closed = self._close(
            judged, Held.by(p), run.eos_ids, run.request.new_tokens, at.generated, at.tries, u_ancestors
        )
        slots = at.generated + torch.arange(self._k + 1, device=at.generated.device)
        for kept, new in ((p.tokens, judged.tokens), (p.log_p, judged.log_p)):
            kept.index_copy_(1, slots, new)
            kept.copy_(kept.index_select(0, closed.source))
        closed.held.write(p)
        copy_rows(closed.source, closed.since, at.generated + self._k)
        for told, value in ((at.status, closed.status), (at.ess, closed.ess), (at.ancestors, closed.ancestors)):
            told.copy_(value)

    def _propose(
        self, run: Run, generated: int | Tensor, head: int, u: Tensor, tries: Tensor
    ) -> tuple[Tensor, Tensor, State]:
        """K tokens a row from the draft, after the last ``head`` of the ``made`` tokens; u: [R, K], tries: [B].

        The draft has not seen x_K of the cycle before: it enters with the bonus, as a head of two.

        Returns x_0..x_K [R, K+1], log q [R, K], the draft's state.
        """
        p, last = run.p, generated - 1
        tokens = p.tokens.index_select(1, generated - head + torch.arange(head, device=p.tokens.device))
        state, ended, remaining = p.draft, p.ended | p.stopped, run.remaining(generated)
        chosen, log_q = [tokens[:, -1]], []
        settings = self._draft_distribution.at_try(run.settings, tries.repeat_interleave(self._n))
        for k in range(self._k):
            region = self._draft_head if tokens.shape[1] == 2 else self._draft_step
            places = run.places(last + k + 1 - tokens.shape[1], tokens.shape[1])
            uniform = packed(u[:, k])
            if self._text_processors:
                rows, new = region(tokens, places, state, run.contexts[1])
                live = ~(ended | is_eos(tokens[:, -1:], run.eos_ids)[:, 0]) & (remaining > k)
                so_far = torch.stack(chosen[1:], 1) if k else run.nothing
                rows = after_processors(
                    run, self._text_processors, self._draft_distribution, rows[:, None], so_far, live[:, None]
                )[:, 0]
                token, log_prob, ended, _ = self._choose(rows, tokens, ended, run.eos_ids, settings, uniform)
            else:
                token, log_prob, ended, _, new = region(
                    tokens, ended, run.eos_ids, settings, uniform, places, state, run.contexts[1]
                )
            state = new or state
            chosen.append(token)
            log_q.append(log_prob)
            tokens = token[:, None]
        return torch.stack(chosen, 1), torch.stack(log_q, 1), state if state is not p.draft else []

    def _judged(
        self, run: Run, generated: int | Tensor, block: Tensor, log_q: Tensor, u: Tensor
    ) -> tuple[Judged, State]:
        """What the target makes of the block behind ``made`` tokens, the last of them its first."""
        p, remaining = run.p, run.remaining(generated)
        by_text = torch.cat([p.stopped[:, None], stops(run, block[:, 1:], self._k)], 1)
        places = run.places(generated - 1, self._k + 1)
        given = (block, log_q, p.ended, by_text, run.eos_ids, remaining, run.settings, u)
        if not self._text_processors:
            judged, state = self._score(*given, places, p.target, run.contexts[0])
            return judged, state
        rows, state = self._score(block, places, p.target, run.contexts[0])
        over = p.ended[:, None] | ((is_eos(block, run.eos_ids) | by_text).int().cumsum(1) > 0)
        live = ~over & (torch.arange(self._k + 1, device=over.device) < remaining[:, None])
        rows = after_processors(
            run, self._text_processors, self._distribution, rows.view(*block.shape, -1), block[:, 1:], live
        )
        return self._judge(rows.flatten(0, 1), *given), state

    def _result(self, run: Run, whole: bool) -> Generation:
        result = run.result(whole)
        clock, stats = run.clock, run.stats
        stats.draft_seconds = clock.spent("draft_head", "draft_step", "draft_choose")
        stats.score_seconds = clock.spent("score", "judge")
        stats.resample_seconds = clock.spent("weigh") + clock.resample_seconds
        stats.rules_seconds += self._text_processors.seconds
        return result


def report_support(log_p: Tensor, log_q: Tensor, stats: Stats) -> None:
    """Warn when the draft gives no mass to tokens that the target can draw: they cannot be reached."""
    missing = torch.where(log_q.exp() == 0, log_p.double().exp(), 0.0).sum(-1).max().item()
    if missing > 1e-6:
        stats.warnings.append(
            f"the draft gives probability 0 to tokens that hold {missing:.2%} of the target's mass at the prompt: "
            "they are never drafted, so the distribution is biased; raise draft_temperature or use a draft with full support"
        )


def dead_population(dead: Tensor, request: Request, generated: int, n: int, k: int) -> GenerationError:
    return GenerationError(
        f"every particle has weight zero after {MAX_TRIES} tries",
        f"at generated token {generated}, request {request.number[int(dead.nonzero()[0, 0])]}: none of {n} drafts of {k} "
        "tokens is possible under the loop's sampler (it truncates to tokens that the draft does not propose)",
        "raise n_particles, lower lookahead, or truncate less; error.partial holds what was generated before",
    )
