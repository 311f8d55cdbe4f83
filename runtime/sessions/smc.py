"""SMC speculative decoding: the loop over cycles, from the host or by replaying what was recorded."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from smc_compile.kernels.copy_rows import RowCopy
from smc_compile.result import Generation, Stats
from smc_compile.runtime.algorithms.next_token import Mixture, NextTokenDistribution
from smc_compile.runtime.algorithms.uniforms import of_cycle
from smc_compile.runtime.execution.cuts import Cuts
from smc_compile.runtime.execution.incremental import RuntimeModel
from smc_compile.runtime.execution.region import Region
from smc_compile.runtime.execution.text_processors import TextProcessors
from smc_compile.runtime.sessions.begin import Begun, Method, begin
from smc_compile.runtime.sessions.cycle import (
    Cycle,
    CycleInfo,
    Drafting,
    Enough,
    Settle,
    Status,
    Uniforms,
    cycle_of,
    end_of_cycle,
)
from smc_compile.runtime.sessions.model_pair import FusedPair, ProcessedPair
from smc_compile.runtime.sessions.replay import Answer, Asked, Record, Replay, replays
from smc_compile.runtime.sessions.run import (
    Run,
    cycles,
    drive,
    first_distribution,
    not_finite,
    require_distribution,
    result_of,
)
from smc_compile.runtime.state.particles import copy_texts, move_texts
from smc_compile.runtime.state.region_types import is_eos
from smc_compile.runtime.state.request import Request
from smc_compile.runtime.state.settling import settle_old
from smc_compile.runtime.state.suffix_sizes import capacity_of


class Told(NamedTuple):
    """What a cycle tells of its population, as of ``CycleInfo``."""

    ess: Tensor  # [B]
    cost: Tensor  # [B]
    ancestors: Tensor  # [B, N]


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
        max_divergence: float = 1.0,
    ) -> None:
        """``record`` captures cycles to be replayed (see replay.py), but none with text processors or stopping
        criteria: these run on the host. Blocks are cut at ``max_divergence`` (see cuts.py), where caches can forget."""
        self._target, self._draft, self._draft_distribution = target, draft, draft_distribution
        self._n, self._k, self._text_processors = n_particles, lookahead, text_processors
        self._method = Method(
            "smc", (target, draft), distribution, text_processors, n_particles, n_particles, lookahead + 1
        )
        pair = ProcessedPair if text_processors else FusedPair
        cuts = Cuts(max_divergence, target.forgets and draft.forgets)
        self._pair = pair(target, draft, distribution, draft_distribution, compiler, cuts)
        self._weigh = Region("weigh", end_of_cycle(ess_threshold, resampling_method), compiler)
        self._uniforms = Region("uniforms", of_cycle(n_particles, lookahead), compiler)
        self._replay = Replay(record, self._on_device) if record is not None and not text_processors else None
        self._sizes: set[int] = set()  # batch sizes for which the regions have run

    @property
    def regions(self) -> list[Region]:
        recorded = [self._uniforms] if self._replay else []
        return [*self._pair.regions, self._weigh, *self._text_processors.regions, *recorded]

    @torch.no_grad()
    def run(self, request: Request) -> Generation:
        """Generate; raises GenerationError, with the partial result, on logits that are not finite."""
        models = (self._target, self._draft)
        return drive(self.begun(request), models, self._sizes, self.advance, result_of)

    @torch.no_grad()
    def cycles(self, request: Request) -> Iterator[Run]:
        """As ``run``, cycle by cycle: the run before the first one and after each. The caller may stop at any."""
        run = self.begun(request)
        yield run
        yield from cycles(run, (self._target, self._draft), self._sizes, self.advance)

    def begun(self, request: Request, regions: Sequence[Region] | None = None, lookahead: int | None = None) -> Run:
        """The call before its first cycle. ``regions`` that its clock watches, and the largest ``lookahead`` of its
        cycles: None for those of the session."""
        new_tokens = int(request.new_tokens.max())
        capacity = capacity_of(new_tokens, (lookahead or self._k) + 1)
        begun = begin(self._method, request, regions or self.regions, capacity, cycles=new_tokens, replay=self._replay)
        self.check_draft(begun)
        return begun.run

    def check_draft(self, begun: Begun) -> None:
        """Warn where the draft cannot write what the target can; raise GenerationError where it is undefined."""
        run, log_p, (_, rows) = begun
        log_q = first_distribution(rows, run.request, self._draft_distribution, run.text_processors)
        require_distribution(log_q, None, "draft")
        report_support(log_p, log_q, run.stats)

    def advance(self, run: Run) -> Run:
        """Run a cycle, and keep what came of it."""
        p, request, stats, number = run.p, run.request, run.stats, len(run.p.ess)
        run.reserve(p.generated + self._k, (self._target, self._draft))
        # The first cycle is never recorded: the draft reads one token at its head.
        recorded = run.unread == 2 and replays(self._replay, request)
        status, told = self._replayed(run, number) if recorded else self._from_host(run, number)
        if (dead := status.dead > 0).any() and not status.broken.any():
            status, told = self._one_token(run, number, dead)
            stats.dropped += int(dead.sum())
        if status.broken.any():
            raise not_finite(status.broken, request, p.generated, "target" if status.undefined.any() else "draft")
        short = (status.generated - p.made <= self._k) & (p.made < request.new_tokens.cpu())
        stats.cuts += int((short & (status.dropped == 0) & ~dead).sum())
        stats.dropped += int(status.dropped.sum())
        stats.resamplings += int(status.resampled.sum())
        p.widths.append((status.generated - p.made).to(told.ess.device))
        p.made, run.reported = status.generated.clone(), status.finished > 0
        p.ess.append(told.ess)
        p.ancestors.append(told.ancestors)
        p.cost = told.cost
        return run

    def _cycle(self, run: Run, settle: Settle | None = None, exact: bool = False, recorded: bool = False) -> Cycle:
        enough = None if recorded or exact else enough_for(run)
        return cycle_of(run, self._pair, self._draft_distribution, self._weigh, run.unread, settle, exact, enough)

    # ---- from the host -----------------------------------------------------------------------------------------------

    def _from_host(self, run: Run, number: int, exact: bool = False) -> tuple[Status, Told]:
        """Cycle ``number``, or one ``exact`` token in its place. Returns its status and what it tells.

        Only rows that change are copied, and of caches only slots that differ.
        """
        p = run.p
        drawn = run.streams.cycle(run.standing(p.state.generated), self._k, p.state.weights.dropped)
        uniforms = Uniforms(*drawn, run.streams.resample(number))
        after, info = self._cycle(run, self._settle(run, number), exact)(p.state, uniforms)
        status = Status(*info.status.cpu())
        told = Told(info.ess, info.cost, info.ancestors)
        if not status.sound:
            return status, told
        p.state, run.unread = after, 1 if exact else 2
        if info.settled is not None:
            run.stats.settled_early += int(info.settled.sum())
        if status.resampled.any():
            begin = time.perf_counter()
            self._copy(run, info, int(status.generated.max()))
            run.clock.resample_seconds += time.perf_counter() - begin
        return status, told

    def _one_token(self, run: Run, number: int, dead: Tensor) -> tuple[Status, Told]:
        """One token of the target in every row, where the requests ``dead`` [B] would have died of a block and the
        models cannot forget it. The others have drawn nothing that says so, and lose their block alone."""
        weights = run.p.state.weights
        dropped = weights.dropped + dead.to(weights.dropped.device)
        run.p.state = run.p.state._replace(weights=weights._replace(dropped=dropped))
        return self._from_host(run, number, exact=True)

    def _settle(self, run: Run, number: int) -> Settle | None:
        """Where the request asks for it: old tokens become the same in all particles."""
        max_lag = run.request.max_lag
        if max_lag is None:
            return None
        u = run.streams.settle(number)
        return lambda tokens, log_w, generated: settle_old(tokens, log_w, max_lag, u, generated)

    def _copy(self, run: Run, info: CycleInfo, generated: int) -> None:
        """Give rows that were not chosen the texts and caches of those that they go on with."""
        state, source = run.p.state, info.source
        rows = (source != torch.arange(len(source), device=source.device)).nonzero()[:, 0]
        copy_texts(state.texts, rows, source[rows])
        if len(rows) and bool((state.generated < run.request.new_tokens).any()):  # else no model is called again
            since, used = int(info.since[rows].min()), generated - 1
            self._target.copy_rows(state.target, rows, source[rows], since, used)
            self._draft.copy_rows(state.draft, rows, source[rows], since, used)

    # ---- recorded ----------------------------------------------------------------------------------------------------

    def _replayed(self, run: Run, number: int) -> tuple[Status, Told]:
        """As ``_from_host``, in one recorded piece."""
        assert self._replay is not None
        status, answer = self._replay(run, number)
        run.stats.replayed += status.sound
        return status, Told(answer.ess.clone(), answer.cost.clone(), answer.ancestors.clone())

    def _on_device(self, run: Run, asked: Asked, answer: Answer, copy_rows: RowCopy) -> None:
        """What is recorded: a cycle whose next state is written over the one before."""
        state = run.p.state
        generated = run.standing(state.generated)
        drawn = self._uniforms(run.streams.seeds, generated, state.weights.dropped, asked.cycle)
        after, info = self._cycle(run, recorded=True)(state, Uniforms(*drawn))
        move_texts(state.texts, info.source)
        state.write(after)
        copy_rows(info.source, info.since, state.generated.max() - 1)
        answer.write(info.status, info.ess, info.cost, info.ancestors)


def enough_for(run: Run) -> Enough:
    """Whether all texts of the requests that go on have ended, or have their last wanted token."""
    on = [number not in run.gone for number in run.request.number]
    most = int((run.request.new_tokens.cpu() - run.p.made)[torch.tensor(on)].max())

    def enough(at: Drafting, k: int) -> bool:
        return k >= most or bool((at.ended | is_eos(at.tokens[:, -1:], run.eos_ids)[:, 0]).all())

    return enough


def report_support(log_p: Tensor, log_q: Tensor, stats: Stats) -> None:
    """Warn when the draft gives no mass to tokens that the target can draw: they cannot be reached."""
    missing = torch.where(log_q.exp() == 0, log_p.double().exp(), 0.0).sum(-1).max().item()
    if missing > 1e-6:
        stats.warnings.append(
            f"the draft gives probability 0 to tokens that hold {missing:.2%} of the target's mass at the prompt: "
            "they are never drafted, so the distribution is biased; "
            "use a draft with full support"
        )
