"""Replay a compiled cycle on the host: prefill, propose, score, weigh, resample, commit, select."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from smc_compile.errors import GenerationError
from smc_compile.result import Generation, Stats

from . import philox
from .compiled import Region
from .models import RuntimeModel
from .regions import State, broken, draw, extend, log_law, propose, score, weigh
from .resampling import keep_survivors
from .weights import log_mean_exp, select

MAX_TRIES = 32  # how often a cycle in which every particle got weight zero is drawn again
ATTEMPT = 4  # purposes of the random streams repeat with this period, one set for every try


@dataclass(frozen=True)
class Law:
    """The target's law of the next token: what its rows are, and the temperature still to apply."""

    kind: str  # "logits", "probs" or "greedy"
    temperature: float = 1.0


@dataclass(frozen=True)
class Request:
    """One call: prompts ids [B, P], n new tokens, a seed per request [B], and the end-of-sequence token (-1: none)."""

    ids: Tensor
    new_tokens: int
    seeds: Tensor
    eos: int = -1


@dataclass
class _Population:
    """What a cycle carries. R = B*N rows; G = generated tokens so far."""

    tokens: Tensor  # [R, capacity]
    ended: Tensor  # [R] bool: an end of sequence lies before the pending token
    log_w: Tensor  # [B, N] float64
    log_evidence: Tensor  # [B] float64
    target: State
    draft: State
    made: int = 1  # tokens per row, the pending one included
    ess: list[Tensor] = field(default_factory=list)
    ancestors: list[Tensor] = field(default_factory=list)


class AutoregressiveSession:
    """The exact cached one-token loop: one row a request."""

    def __init__(self, target: RuntimeModel, law: Law, compiler: str) -> None:
        self._target, self._law = target, law
        self._greedy = law.kind == "greedy"
        self._step = Region(
            "target_step", extend(target.advance, law.kind, law.temperature, self._greedy), compiler, target.whole
        )

    @property
    def regions(self) -> list[Region]:
        return [self._step]

    @torch.no_grad()
    def run(self, request: Request) -> Generation:
        """Generate; raises GenerationError with the partial result when the target's logits are not finite."""
        clock = _Clock(self.regions)
        ids, n = request.ids, request.new_tokens
        batch, prompt = ids.shape
        rows, context, state = self._target.begin(ids, 1, max(n, 2), prompt + n)
        clock.prefilled()
        u = _uniforms(request.seeds, 1, n, philox.TARGET)[:, 0].t().contiguous()  # [n, B]
        log_p = log_law(rows, self._law.kind, self._law.temperature)
        _require_law(log_p, None)
        tokens = [draw(log_p, u[0], self._greedy)]
        ended = torch.zeros(batch, dtype=torch.bool, device=ids.device)
        eos = torch.tensor(request.eos, device=ids.device)
        for i in range(1, n):
            slots = torch.tensor([i - 1], device=ids.device)
            token, ended, bad, new = self._step(
                tokens[-1][:, None], ended, eos, u[i], _positions(slots, request), slots, state, context
            )
            state = new or state
            if bad.any():
                raise _not_finite(bad, self._result(request, tokens, clock, pad=False), i)
            tokens.append(token)
            if ended.all():
                break
        return self._result(request, tokens, clock)

    def _result(self, request: Request, tokens: list[Tensor], clock: _Clock, pad: bool = True) -> Generation:
        batch = request.ids.shape[0]
        made = torch.stack(tokens, 1)
        made = _padded(made, request) if pad else made
        sequences = torch.cat([request.ids, made], 1)
        zeros = torch.zeros(batch, 1, dtype=torch.float64, device=made.device)
        stats = clock.stats(Stats("autoregressive", made.shape[1], len(tokens) - 1))
        stats.score_seconds = self._step.seconds - clock.before[self._step.name]
        empty = zeros.new_zeros(batch, 0)
        ancestors = torch.zeros(batch, 0, 1, dtype=torch.int64, device=made.device)
        return Generation(sequences, sequences[:, None], zeros, zeros[:, 0], empty, ancestors, stats)


class SMCSession:
    """Sequential Monte Carlo speculative decoding with N particles a request and K draft tokens a cycle."""

    def __init__(
        self,
        target: RuntimeModel,
        draft: RuntimeModel,
        law: Law,
        draft_temperature: float,
        n_particles: int,
        lookahead: int,
        ess_threshold: float,
        resampling_method: str,
        compiler: str,
    ) -> None:
        self._target, self._draft, self._law = target, draft, law
        self._draft_temperature = draft_temperature
        self._n, self._k = n_particles, lookahead
        step = propose(draft.advance, draft_temperature)
        self._draft_step = Region("draft_step", step, compiler, draft.whole)
        self._draft_head = Region(
            "draft_head", step, compiler, draft.whole
        )  # two tokens: the last drafted one and the bonus
        self._score = Region("score", score(target.score, law.kind, law.temperature), compiler, target.whole)
        self._weigh = Region("weigh", weigh(ess_threshold, resampling_method), compiler)

    @property
    def regions(self) -> list[Region]:
        return [self._draft_head, self._draft_step, self._score, self._weigh]

    @torch.no_grad()
    def run(self, request: Request) -> Generation:
        """Generate; raises GenerationError, with the partial result, on logits not finite or a dead population."""
        clock = _Clock(self.regions)
        stats = Stats("smc", request.new_tokens)
        ids, n = request.ids, request.new_tokens
        batch, prompt = ids.shape
        cycles = math.ceil((n - 1) / (self._k + 1))
        capacity = max(cycles * (self._k + 1) + 1, 2)
        target_rows, target_context, target_state = self._target.begin(ids, self._n, capacity, prompt + n)
        draft_rows, draft_context, draft_state = self._draft.begin(ids, self._n, capacity, prompt + n)
        clock.prefilled()
        log_p = log_law(target_rows, self._law.kind, self._law.temperature)  # [B, V]
        _require_law(log_p, None)
        self._report_support(log_p, draft_rows, stats)
        streams = _Streams(request.seeds, self._n, capacity, cycles)
        first = draw(log_p[:, None].expand(-1, self._n, -1), streams.target[:, :, 0], False)
        p = _Population(
            tokens=torch.full((batch * self._n, capacity), max(request.eos, 0), device=ids.device),
            ended=torch.zeros(batch * self._n, dtype=torch.bool, device=ids.device),
            log_w=torch.zeros(batch, self._n, dtype=torch.float64, device=ids.device),
            log_evidence=torch.zeros(batch, dtype=torch.float64, device=ids.device),
            target=target_state,
            draft=draft_state,
        )
        p.tokens[:, 0] = first.flatten()
        eos = torch.tensor(request.eos, device=ids.device)
        for cycle in range(cycles):
            self._cycle(cycle, cycles, request, eos, p, streams, (target_context, draft_context), stats, clock)
            if _all_ended(p, request):
                break
        return self._result(request, p, stats, clock)

    def _cycle(
        self,
        cycle: int,
        cycles: int,
        request: Request,
        eos: Tensor,
        p: _Population,
        streams: _Streams,
        contexts: tuple[Any, Any],
        stats: Stats,
        clock: _Clock,
    ) -> None:
        batch = request.ids.shape[0]
        start, width = p.made - 1, self._k + 1  # x_0 is generated token number ``start``
        slots = torch.arange(start, start + width, device=eos.device)
        positions = _positions(slots, request)
        remaining = torch.tensor(request.new_tokens - 1 - start, device=eos.device)
        tries = torch.ones(batch, dtype=torch.int64, device=eos.device)
        for _ in range(MAX_TRIES):
            u_draft, u_bonus = streams.cycle(start, self._k, tries)
            block, log_q, draft_state = self._propose(p, eos, u_draft, request, contexts[1])
            increments, bonus, ended, bad, target_state = self._score(
                block, log_q, p.ended, eos, remaining, u_bonus, positions, slots, p.target, contexts[0]
            )
            undefined = bad | increments.isnan()  # NaN with a sound target comes from the draft
            if undefined.any():
                who = "target" if bad.any() else "draft"
                rows = undefined.view(batch, -1).any(1)
                raise _not_finite(rows, self._result(request, p, stats, clock), p.made, who)
            dead = (p.log_w + increments.view(batch, -1) == -math.inf).all(1)  # [B]
            if not dead.any():
                break
            stats.retries += int(dead.sum())
            tries = tries + dead
        else:
            raise _dead_population(dead, self._result(request, p, stats, clock), p.made, self._n, self._k)
        p.draft, p.target = draft_state or p.draft, target_state or p.target
        ancestors, p.log_w, p.log_evidence, ess, resampled = self._weigh(
            p.log_w,
            increments.view(batch, -1),
            p.log_evidence - tries.double().log(),
            streams.resample[:, :, cycle].clone(),
        )
        p.tokens[:, p.made : p.made + width] = torch.cat([block[:, 1:], bonus[:, None]], 1)
        p.ended = ended
        p.made += width
        p.ess.append(ess)
        if resampled.any():
            begin = time.perf_counter()
            ancestors = keep_survivors(ancestors)
            _permute(p, ancestors, p.made - 1, cycle + 1 < cycles, self._target, self._draft)
            stats.resamplings += int(resampled.sum())
            clock.resample_seconds += time.perf_counter() - begin
        p.ancestors.append(ancestors)

    def _propose(
        self, p: _Population, eos: Tensor, u: Tensor, request: Request, context: Any
    ) -> tuple[Tensor, Tensor, State]:
        """K tokens a row from the draft. u: [R, K]. Returns x_0..x_K [R, K+1], log q [R, K], the draft's state."""
        last = p.made - 1
        # The draft has not seen x_K of the cycle before: it enters with the bonus, as a block of two.
        first = last - 1 if last > 0 else last
        tokens, state, ended = p.tokens[:, first : last + 1].clone(), p.draft, p.ended
        chosen, log_q = [p.tokens[:, last]], []
        for k in range(self._k):
            region = self._draft_head if tokens.shape[1] == 2 else self._draft_step
            slots = torch.arange(last + k + 1 - tokens.shape[1], last + k + 1, device=eos.device)
            token, log_prob, ended, new = region(
                tokens, ended, eos, u[:, k].clone(), _positions(slots, request), slots, state, context
            )
            state = new or state
            chosen.append(token)
            log_q.append(log_prob)
            tokens = token[:, None]
        return torch.stack(chosen, 1), torch.stack(log_q, 1), state if state is not p.draft else []

    def _report_support(self, log_p: Tensor, draft_rows: Tensor, stats: Stats) -> None:
        """Warn when the draft gives no mass to tokens that the target can draw: they cannot be reached."""
        log_q = log_law(draft_rows, "logits", self._draft_temperature)
        _require_law(log_q, None, "draft")
        missing = torch.where(log_q.exp() == 0, log_p.double().exp(), 0.0).sum(-1).max().item()
        if missing > 1e-6:
            stats.warnings.append(
                f"the draft gives probability 0 to tokens that hold {missing:.2%} of the target's mass at the prompt: "
                "they are never drafted, so the law is biased; raise draft_temperature or use a draft with full support"
            )

    def _result(self, request: Request, p: _Population, stats: Stats, clock: _Clock) -> Generation:
        batch = request.ids.shape[0]
        made = min(p.made, request.new_tokens)
        tokens = p.tokens[:, :made]
        if _all_ended(p, request):
            tokens = _padded(tokens, request)
        particles = torch.cat([request.ids[:, None].expand(-1, self._n, -1), tokens.view(batch, self._n, -1)], 2)
        u = philox.uniforms(request.seeds, 1, torch.zeros(1, dtype=torch.int64, device=tokens.device), philox.SELECT)
        chosen = select(p.log_w, u[:, 0, 0])
        sequences = particles[torch.arange(batch, device=tokens.device), chosen]
        stats = clock.stats(stats)
        stats.new_tokens, stats.cycles = tokens.shape[1], len(p.ess)
        spent = {region.name: region.seconds - clock.before[region.name] for region in self.regions}
        stats.draft_seconds = spent["draft_head"] + spent["draft_step"]
        stats.score_seconds = spent["score"]
        stats.resample_seconds = spent["weigh"] + clock.resample_seconds
        no_cycles = p.log_w.new_zeros(batch, 0)
        ess = torch.stack(p.ess, 1) if p.ess else no_cycles
        none = torch.zeros(batch, 0, self._n, dtype=torch.int64, device=tokens.device)
        ancestors = torch.stack(p.ancestors, 1) if p.ancestors else none
        return Generation(sequences, particles, p.log_w, p.log_evidence + log_mean_exp(p.log_w), ess, ancestors, stats)


class _Streams:
    """All uniforms of one call, from the counter-based generator: a value depends on (seed, particle, step) alone."""

    def __init__(self, seeds: Tensor, n: int, tokens: int, cycles: int) -> None:
        self._seeds, self._n = seeds, n
        self.draft = _uniforms(seeds, n, tokens + 1, philox.PROPOSE)  # [B, N, G], indexed by generated token
        self.target = _uniforms(seeds, n, tokens + 1, philox.TARGET)
        self.resample = _uniforms(seeds, n, max(cycles, 1), philox.RESAMPLE)  # [B, N, C]

    def cycle(self, start: int, k: int, tries: Tensor) -> tuple[Tensor, Tensor]:
        """Uniforms for x_{start+1} .. x_{start+k} [R, K] and the bonus [R]; later tries use other streams."""
        draft = self.draft[:, :, start + 1 : start + k + 1]
        bonus = self.target[:, :, start + k + 1]
        if bool((tries > 1).any()):
            steps = torch.arange(start + 1, start + k + 2, device=tries.device)
            later = ATTEMPT * (tries - 1)  # [B]
            draft = philox.uniforms(self._seeds, self._n, steps[:-1], philox.PROPOSE + later)
            bonus = philox.uniforms(self._seeds, self._n, steps[-1:], philox.TARGET + later)
        return draft.flatten(0, 1), bonus.flatten().clone()


class _Clock:
    """Wall-clock of one call, and what the regions had spent before it."""

    def __init__(self, regions: list[Region]) -> None:
        self._regions = regions
        self._start = time.perf_counter()
        self.before = {region.name: region.seconds for region in regions}
        self._compiled = sum(region.compile_seconds for region in regions)
        self._prefill = 0.0
        self.resample_seconds = 0.0

    def prefilled(self) -> None:
        self._prefill = time.perf_counter() - self._start

    def stats(self, stats: Stats) -> Stats:
        stats.compile_seconds = sum(region.compile_seconds for region in self._regions) - self._compiled
        stats.seconds = time.perf_counter() - self._start - stats.compile_seconds
        stats.prefill_seconds = self._prefill
        return stats


def _positions(slots: Tensor, request: Request) -> Tensor:
    """Where suffix slots stand in the sequence. Tokens past the cap stay on its last position: nothing reads them."""
    prompt = request.ids.shape[1]
    return (slots + prompt).clamp(max=prompt + request.new_tokens - 1)


def _uniforms(seeds: Tensor, n: int, steps: int, purpose: int) -> Tensor:
    return philox.uniforms(seeds, n, torch.arange(steps, device=seeds.device), purpose)


def _permute(
    p: _Population, ancestors: Tensor, used: int, copy_states: bool, target: RuntimeModel, draft: RuntimeModel
) -> None:
    """Give every dead row its ancestor's tokens and state; survivors keep their place and are not written."""
    batch, n = ancestors.shape
    flat = (ancestors + n * torch.arange(batch, device=ancestors.device)[:, None]).flatten()
    dead = (flat != torch.arange(batch * n, device=flat.device)).nonzero()[:, 0]
    source = flat[dead]
    p.tokens[dead] = p.tokens[source]
    p.ended[dead] = p.ended[source]
    if not copy_states:
        return
    target.copy_rows(p.target, dead, source, used)
    draft.copy_rows(p.draft, dead, source, used)


def _padded(tokens: Tensor, request: Request) -> Tensor:
    """Generated tokens [R, G] cut or padded with EOS to the requested length."""
    missing = request.new_tokens - tokens.shape[1]
    return torch.nn.functional.pad(tokens, (0, missing), value=max(request.eos, 0)) if missing > 0 else tokens


def _all_ended(p: _Population, request: Request) -> bool:
    return request.eos >= 0 and bool((p.ended | (p.tokens[:, p.made - 1] == request.eos)).all())


def _require_law(log_probs: Tensor, partial: Any, who: str = "target") -> None:
    bad = broken(log_probs)
    if bad.any():
        raise _not_finite(bad, partial, 0, who)


def _not_finite(bad: Tensor, partial: Any, made: int, who: str = "target") -> GenerationError:
    rows = bad.nonzero()[:, 0].tolist()
    return GenerationError(
        f"the {who}'s logits are NaN or infinite",
        f"at generated token {made}, request {rows[0]}" + (f" and {len(rows) - 1} more" if len(rows) > 1 else ""),
        "check the weights and the dtype (overflow in float16?); error.partial holds what was generated before",
        partial,
    )


def _dead_population(dead: Tensor, partial: Any, made: int, n: int, k: int) -> GenerationError:
    return GenerationError(
        f"every particle has weight zero after {MAX_TRIES} tries",
        f"at generated token {made}, request {int(dead.nonzero()[0, 0])}: none of {n} drafts of {k} tokens is possible "
        "under the loop's sampler (it truncates to tokens that the draft does not propose)",
        "raise n_particles, lower lookahead, or truncate less; error.partial holds what was generated before",
        partial,
    )
