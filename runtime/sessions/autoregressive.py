"""The exact one-token loop with caches: one row a request, no draft, no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from smc_compile.kernels.copy_rows import RowCopy
from smc_compile.result import Generation
from smc_compile.runtime.algorithms.next_token import NextTokenDistribution
from smc_compile.runtime.algorithms.uniforms import of_token
from smc_compile.runtime.execution.incremental import RuntimeModel
from smc_compile.runtime.execution.region import Region, compiled_apart
from smc_compile.runtime.execution.region_bodies import Chosen, choose, run_model, step
from smc_compile.runtime.execution.text_processors import TextProcessors
from smc_compile.runtime.sessions.begin import Method, begin
from smc_compile.runtime.sessions.cycle import Status, where_sound
from smc_compile.runtime.sessions.ragged_texts import after_processors, stops
from smc_compile.runtime.sessions.replay import Answer, Asked, Record, Replay, replays
from smc_compile.runtime.sessions.run import Run, cycles, drive, not_finite
from smc_compile.runtime.state.particles import (
    CycleState,
    Particles,
    all_finished,
    ends_at_pending,
    ends_within,
    pending,
    write_block,
)
from smc_compile.runtime.state.region_types import EosIds, State, is_eos
from smc_compile.runtime.state.request import Request
from smc_compile.runtime.state.suffix_sizes import capacity_of


class AutoregressiveSession:
    """Draws token after token from the target, or takes the most likely one."""

    def __init__(
        self,
        target: RuntimeModel,
        distribution: NextTokenDistribution,
        compiler: str,
        text_processors: TextProcessors,
        record: Record | None = None,
    ) -> None:
        """``record`` captures tokens to be replayed (see replay.py), but none with text processors or stopping
        criteria: these run on the host."""
        self._target, self._distribution, self._text_processors = target, distribution, text_processors
        self._method = Method("autoregressive", (target,), distribution, text_processors, rows=1, particles=1, width=1)
        self._replay = Replay(record, self._on_device) if record is not None and not text_processors else None
        self._uniforms = Region("uniforms", of_token, compiler)
        self._close = Region("close", end_of_token, compiler)
        self._sizes: set[int] = set()  # batch sizes for which the regions have run
        if text_processors:
            self._step = Region("target_step", run_model(target.advance), compiler, target.whole)
            self._choose = Region("target_choose", choose(distribution), compiler)
        else:
            chosen = compiled_apart(choose(distribution), "target_choose", compiler, target.whole)
            self._step = Region("target_step", step(target.advance, chosen), compiler, target.whole)

    @property
    def regions(self) -> list[Region]:
        processed = [self._choose, *self._text_processors.regions] if self._text_processors else []
        return [self._step, *([self._uniforms, self._close] if self._replay else processed)]

    @torch.no_grad()
    def run(self, request: Request) -> Generation:
        """Generate; raises GenerationError with the partial result when the target's logits are not finite."""
        return drive(self._begin(request), (self._target,), self._sizes, self._next_token, self._result)

    @torch.no_grad()
    def cycles(self, request: Request) -> Iterator[Run]:
        """As ``run``, token by token: the run before the first one and after each. The caller may stop at any."""
        run = self._begin(request)
        yield run
        yield from cycles(run, (self._target,), self._sizes, self._next_token)

    def _begin(self, request: Request) -> Run:
        capacity = capacity_of(int(request.new_tokens.max()), 1)
        return begin(self._method, request, self.regions, capacity, replay=self._replay).run

    def _next_token(self, run: Run) -> Run:
        run.reserve(run.p.generated, (self._target,))
        undefined, run.reported = self._replayed(run) if replays(self._replay, run.request) else self._from_host(run)
        if undefined.any():
            raise not_finite(undefined, run.request, run.p.generated)
        run.p.made = run.p.made + 1
        return run

    def _token(
        self, run: Run, state: CycleState, u: Tensor, end: Callable[..., EndOfToken]
    ) -> tuple[EndOfToken, State]:
        """One token of every row, from uniforms [R], and the target's caches; an empty list where they change in place.

        As a cycle of SMC it is called from the host and recorded, and writes texts and caches in place.
        """
        generated, particles = state.generated, state.particles
        tokens = pending(state.texts.tokens, generated)
        drawn, caches = self._drawn(run, state, tokens, u)
        token, log_p, over, bad = drawn[:4]
        write_block(state.texts, token[:, None], torch.where(over, 0.0, log_p.double())[:, None], generated)
        stopped = stops(run, token[:, None], torch.ones_like(generated))[:, 0]
        after = end(over, bad, stopped, particles, token, run.eos_ids, run.request.new_tokens, generated)
        return after, caches

    def _drawn(self, run: Run, state: CycleState, tokens: Tensor, u: Tensor) -> tuple[Chosen, State]:
        """What ``step`` returns for the pending ``tokens`` [R, 1], text processors included."""
        ended = state.particles.ended | state.particles.stopped
        places, given = run.places(state.generated - 1, 1), (tokens, ended, run.eos_ids, run.settings, u)
        if not self._text_processors:
            drawn: tuple[Chosen, State]
            drawn = self._step(*given, places, state.target, run.contexts[0], None)
            return drawn
        rows, caches = self._step(tokens, places, state.target, run.contexts[0])
        live = ~(ended | is_eos(tokens, run.eos_ids)[:, 0]) & (run.remaining(state.generated) > 0)
        rows = after_processors(run, self._distribution, rows[:, None], run.no_tokens, live[:, None])[:, 0]
        return self._choose(rows, *given, None), caches

    def _from_host(self, run: Run) -> tuple[Tensor, Tensor]:
        """One token. Returns which distributions are undefined [B], and which requests have finished [B]."""
        state = run.p.state
        after, caches = self._token(run, state, run.streams.token(state.generated), end_of_token)
        run.p.state = CycleState(
            state.texts, after.particles, state.weights, caches or state.target, state.draft, after.generated
        )
        return after.undefined, after.finished

    def _replayed(self, run: Run) -> tuple[Tensor, Tensor]:
        """As ``_from_host``, in one recorded piece."""
        assert self._replay is not None
        status, _ = self._replay(run, 0)
        run.stats.replayed += status.sound
        return status.undefined > 0, status.finished > 0

    def _on_device(self, run: Run, asked: Asked, answer: Answer, _: RowCopy) -> None:
        """What is recorded: a token whose next state is written over the one before."""
        state = run.p.state
        u = self._uniforms(run.streams.seeds, state.generated)
        after, _ = self._token(run, state, u, self._close)
        state.write(state._replace(particles=after.particles, generated=after.generated))
        heard = Status(*answer.status)  # nothing is drafted, weighed or resampled: the other fields stay False
        heard.undefined.copy_(after.undefined)
        heard.finished.copy_(after.finished)

    def _result(self, run: Run, whole: bool) -> Generation:
        result = run.result(whole)
        stats = run.stats
        stats.cycles = run.p.generated - 1
        stats.score_seconds = run.clock.spent("target_step", "target_choose")
        stats.rules_seconds += run.text_processors.seconds
        return result


class EndOfToken(NamedTuple):
    """What came of a token."""

    particles: Particles  # the next ones; those before where a distribution is undefined
    generated: Tensor  # [B], with it
    undefined: Tensor  # [B] bool: the distribution of a token that counts is NaN
    finished: Tensor  # [B] bool: the text has ended, or the cap is reached


def end_of_token(
    over: Tensor,  # [B] bool: the text has ended before the new token
    bad: Tensor,  # [B] bool: the distribution of the new token is NaN
    stopped: Tensor,  # [B] bool, as of ``Particles``, of the new token
    particles: Particles,
    token: Tensor,  # [B], the new one
    eos_ids: EosIds,
    new_tokens: Tensor,  # [B]
    generated: Tensor,  # [B], before it
) -> EndOfToken:
    """Commit a token."""
    undefined = bad & (new_tokens > generated)
    length, ended = ends_within(particles.length, particles.ended, over[:, None], generated, torch.ones_like(generated))
    committed = particles._replace(ended=ended, stopped=stopped, length=length)
    after = Particles(*where_sound(~undefined.any(), committed, particles))
    lengths = ends_at_pending(after, token[:, None], eos_ids, generated + 1)
    return EndOfToken(after, generated + 1, undefined, all_finished(lengths, 1, generated + 1, new_tokens))
