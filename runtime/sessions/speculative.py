"""Speculative decoding by rejection: draft N chains, score, accept, commit. Exact, whatever the draft."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from smc_compile.result import Generation
from smc_compile.runtime.algorithms.next_token import NextTokenDistribution
from smc_compile.runtime.algorithms.tensors import packed
from smc_compile.runtime.execution.acceptance import Verdict, accept_drafted, conclude, draft, propose, set_out
from smc_compile.runtime.execution.incremental import CachedModel
from smc_compile.runtime.execution.region import Region, compiled_apart
from smc_compile.runtime.execution.region_bodies import run_model
from smc_compile.runtime.execution.text_processors import TextProcessors
from smc_compile.runtime.sessions.begin import Begun, Method, begin
from smc_compile.runtime.sessions.ragged_texts import after_processors, stops
from smc_compile.runtime.sessions.run import Run, drive, not_finite, result_of
from smc_compile.runtime.state.particles import CycleState, columns, pending, write_block
from smc_compile.runtime.state.population import Population
from smc_compile.runtime.state.region_types import EosIds, is_eos
from smc_compile.runtime.state.rejections import Rejections
from smc_compile.runtime.state.request import Request
from smc_compile.runtime.state.suffix_sizes import capacity_of


@dataclass(kw_only=True)
class Committed(Population):
    """One text a request, so rows of texts are requests."""

    state: CycleState

    def append(self, tokens: Tensor, log_p: Tensor, width: Tensor, ended: Tensor) -> None:
        """Commit the first ``width`` [B] of ``tokens`` [B, K+1]; ``ended`` [B]: the last of them is the end."""
        particles = self.state.particles
        write_block(self.state.texts, tokens, log_p, self.count)
        particles = particles._replace(ended=particles.ended | ended)
        self.state = self.state._replace(particles=particles, generated=self.count + width)
        self.made = self.count.cpu()
        self.ess.append(torch.full_like(self.state.weights.log_evidence, self.copies))
        self.widths.append(width)
        self.ancestors.append(torch.arange(self.copies, device=width.device).expand(len(width), -1))

    @property
    def count(self) -> Tensor:
        """[B], generated tokens of each."""
        return self.state.generated

    def wanted(self, request: Request) -> Tensor:
        """Tokens still wanted [B]."""
        return torch.where(self.state.particles.ended, 0, (request.new_tokens - self.count).clamp_min(0))

    def lengths(self, eos_ids: EosIds) -> Tensor:
        return self.count

    def finished(self, request: Request, eos_ids: EosIds) -> Tensor:
        return self.wanted(request) == 0

    def take(self, keep: Tensor, rows: Tensor) -> Self:
        return super().take(keep, keep)


@dataclass(kw_only=True)
class SpeculativeRun(Run):
    """One call: its texts have one row a request, the models' caches N."""

    p: Committed
    chains: int  # N

    @property
    def n(self) -> int:
        return self.chains

    def by_row(self) -> None:
        super().by_row()
        self.request_eos_ids = EosIds(self.request.eos_ids, self.request.pad)

    def standing(self, generated: Tensor) -> Tensor:
        """[B], where each request goes on; one that ended with its first token stands where all have what is read."""
        return generated.clamp_min(self.unread)


class SpeculativeSession:
    """Rejection sampling with N chains of K drafted tokens a cycle; one chain where the distribution is greedy."""

    def __init__(
        self,
        target: CachedModel,
        draft_model: CachedModel,
        distribution: NextTokenDistribution,
        draft_distribution: NextTokenDistribution,
        n_particles: int,
        lookahead: int,
        compiler: str,
        text_processors: TextProcessors,
    ) -> None:
        self.models = self._target, self._draft = target, draft_model
        self._distribution, self._draft_distribution = distribution, draft_distribution
        self._n, self._k = 1 if distribution.kind == "greedy" else n_particles, lookahead
        self._text_processors = text_processors
        self._method = Method(
            "speculative",
            (target, draft_model),
            distribution,
            text_processors,
            self._n,
            particles=1,
            width=lookahead + 1,
        )
        self._sizes: set[int] = set()
        proposed = compiled_apart(propose(draft_distribution), "draft_choose", compiler, draft_model.whole)
        advance = run_model(draft_model.advance) if text_processors else draft(draft_model.advance, proposed)
        self._head = Region("draft_head", advance, compiler, draft_model.whole)
        self._step = Region("draft_step", advance, compiler, draft_model.whole)
        self._choose = Region("draft_choose", propose(draft_distribution), compiler)
        self._score = Region("score", run_model(target.score), compiler, target.whole)
        self._accept = Region("accept", accept_drafted(distribution), compiler)
        self._conclude = Region("conclude", conclude(distribution), compiler)

    @property
    def regions(self) -> list[Region]:
        processed = [self._choose, *self._text_processors.regions] if self._text_processors else []
        return [self._head, self._step, self._score, self._accept, self._conclude, *processed]

    @torch.no_grad()
    def run(self, request: Request) -> Generation:
        """Generate; raises GenerationError, with the partial result, when logits are not finite."""
        return drive(self.begun(request), self.models, self._sizes, self.advance, result_of)

    def begun(
        self,
        request: Request,
        regions: Sequence[Region] | None = None,
        lookahead: int | None = None,
        check: Callable[[Begun], None] = lambda _: None,
    ) -> SpeculativeRun:
        """The call before its first cycle. ``regions`` that its clock watches, and the largest ``lookahead`` of its
        cycles: None for those of the session. ``check`` sees what the models make of the prompts."""
        capacity = capacity_of(int(request.new_tokens.max()), (lookahead or self._k) + 1)
        begun = begin(self._method, request, regions or self.regions, capacity)
        check(begun)
        run = begun.run
        state = run.p.state
        ended = is_eos(run.p.tokens, run.eos_ids)[:, 0] | state.particles.stopped
        own = {f.name: getattr(run, f.name) for f in fields(Run)}
        own["p"] = Committed(
            n=1, state=state._replace(particles=state.particles._replace(ended=ended)), made=run.p.made
        )
        own["rejections"] = Rejections.start(request, self._n, self._k)
        return SpeculativeRun(**own, chains=self._n)

    def advance(self, run: Run) -> Run:
        """Run a cycle, and keep what came of it."""
        assert isinstance(run, SpeculativeRun)
        assert run.rejections is not None
        p, rejections = run.p, run.rejections
        run.reserve(p.generated + self._k, (self._target, self._draft))
        generated = run.standing(p.count)
        drafted, log_q = self._propose(run, generated, rejections)
        verdict = self._verdict(run, generated, drafted, log_q, rejections)
        undefined = verdict.undefined | verdict.undefined_draft
        if undefined.any():
            who = "target" if verdict.undefined.any() else "draft"
            raise not_finite(undefined, run.request, p.generated, who)
        stopped = stops(run, verdict.tokens, verdict.width)  # [B, K+1]
        width = torch.where(stopped.any(1), stopped.int().argmax(1) + 1, verdict.width)
        ended = stopped.any(1) | verdict.ended
        if self._n > 1:
            self._share(run, generated, verdict.chain)
        rejections.accepted += int(verdict.accepted.minimum(width).sum())
        rejections.live += int((width > 0).sum())
        rejections.cycles += 1
        run.unread = 2
        p.append(verdict.tokens, verdict.log_p, width, ended)
        return run

    def _share(self, run: SpeculativeRun, generated: Tensor, chain: Tensor) -> None:
        """Give all rows of a request the caches of its ``chain`` [B] behind the ``generated`` [B] tokens."""
        state, rows = run.p.state, torch.arange(len(chain) * self._n, device=chain.device)
        source = (chain + self._n * torch.arange(len(chain), device=chain.device)).repeat_interleave(self._n)
        others = rows[source != rows]
        since, used = int(generated.min()) - 1, int(generated.max()) + self._k
        for model, caches in ((self._target, state.target), (self._draft, state.draft)):
            model.copy_rows(caches, others, source[others], since, used)

    def _propose(self, run: SpeculativeRun, generated: Tensor, rejections: Rejections) -> tuple[Tensor, list[Tensor]]:
        """K tokens a row from the draft [R, K], and the distributions that they were drawn from, K times [R, V]."""
        p, u, head = run.p, rejections.uniforms.draft(rejections.cycles), run.unread
        tokens = p.state.texts.tokens.gather(1, columns(generated - head, head, len(generated)))  # [B, head]
        tokens = tokens.repeat_interleave(self._n, 0)
        wanted = p.wanted(run.request).repeat_interleave(self._n)
        ended = wanted == 0
        drafted: list[Tensor] = []
        log_q: list[Tensor] = []
        most = int(wanted.max())
        for k in range(self._k):
            if k and (k >= most or bool(ended.all())):  # the rest becomes no text, whatever it is
                missing = self._k - k
                drafted, log_q = drafted + drafted[-1:] * missing, log_q + log_q[-1:] * missing
                break
            width = tokens.shape[1]
            places = run.places(generated + k - width, width)
            region = self._head if width == 2 else self._step
            uniform = packed(u[:, k])
            if self._text_processors:
                rows, _ = region(tokens, places, p.state.draft, run.contexts[1])
                so_far = torch.stack(drafted, 1) if k else run.no_tokens
                live = ~ended & (wanted > k)
                rows = after_processors(run, self._draft_distribution, rows[:, None], so_far, live[:, None])[:, 0]
                token, distribution = self._choose(rows, run.settings, uniform)
            else:
                token, distribution = region(tokens, run.settings, uniform, places, p.state.draft, run.contexts[1])
            ended = ended | is_eos(token[:, None], run.eos_ids)[:, 0]
            drafted.append(token)
            log_q.append(distribution)
            tokens = token[:, None]
        return torch.stack(drafted, 1), log_q

    def _verdict(
        self, run: SpeculativeRun, generated: Tensor, drafted: Tensor, log_q: list[Tensor], rejections: Rejections
    ) -> Verdict:
        """What the target accepts of the drafts."""
        p, width = run.p, self._k + 1
        last = pending(p.state.texts.tokens, generated).repeat_interleave(self._n, 0)
        block, places = torch.cat([last, drafted], 1), run.places(generated - 1, width)  # [R, K+1]
        rows, _ = self._score(block, places, p.state.target, run.contexts[0])
        wanted = p.wanted(run.request)
        if self._text_processors:
            over = is_eos(drafted, run.eos_ids).int().cumsum(1) > 0  # [R, K]
            over = torch.cat([torch.zeros_like(over[:, :1]), over], 1)
            live = ~over & (torch.arange(width, device=over.device) < wanted.repeat_interleave(self._n)[:, None])
            rows = rows.view(*block.shape, -1)
            rows = after_processors(run, self._distribution, rows, drafted, live).flatten(0, 1)
        batch, settings = len(wanted), run.request.settings
        rows, drafted = rows.view(batch, self._n, width, -1), drafted.view(batch, self._n, -1)
        walk = set_out(batch, self._n, self._distribution.scores(rows[:1, 0, 0]).shape[-1], rows.device)
        u = rejections.uniforms.accept(rejections.cycles)
        for k in range(self._k if self._distribution.kind != "greedy" else 0):
            q = log_q[k].view(batch, self._n, -1)
            walk = self._accept(walk, rows, q, packed(drafted[:, :, k]), settings, packed(u[:, :, k]))
        u_last = rejections.uniforms.last(rejections.cycles)
        verdict: Verdict = self._conclude(walk, rows, drafted, run.request_eos_ids, wanted, settings, u_last)
        return verdict
