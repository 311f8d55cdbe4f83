"""The exact cached one-token loop: one row a request, no draft, no weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from smc_compile.kernels.copy_rows import RowCopy
from smc_compile.result import Generation, Stats
from smc_compile.runtime.algorithms.next_token import NextTokenDistribution
from smc_compile.runtime.algorithms.tensors import mark_dynamic, packed
from smc_compile.runtime.algorithms.uniforms import Streams, of_token
from smc_compile.runtime.execution.incremental import RuntimeModel
from smc_compile.runtime.execution.region import Region, compiled_apart
from smc_compile.runtime.execution.region_bodies import choose, draw, run_model, step
from smc_compile.runtime.execution.text_processors import TextProcessors
from smc_compile.runtime.sessions.clock import Clock
from smc_compile.runtime.sessions.cycle import Held, close_token
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
from smc_compile.runtime.state.region_types import is_eos
from smc_compile.runtime.state.request import Request
from smc_compile.runtime.state.settling import Watcher
from smc_compile.runtime.state.suffix_sizes import capacity_of, first_size


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
        """``record`` captures tokens to be replayed (see replay.py); rules and stops of the host are not."""
        self._target, self._distribution, self._text_processors = target, distribution, text_processors
        self._replay = Replay(record, self._on_device) if record is not None and not text_processors else None
        self._uniforms = Region("uniforms", of_token, compiler)
        self._close = Region("close", close_token, compiler)
        self._sizes: set[int] = set()
        if text_processors:
            self._step = Region("target_step", run_model(target.advance), compiler, target.whole)
            self._choose = Region("target_choose", choose(distribution), compiler)
        else:
            chosen = compiled_apart(choose(distribution), "target_choose", compiler, target.whole)
            self._step = Region("target_step", step(target.advance, chosen), compiler, target.whole)

    @property
    def regions(self) -> list[Region]:
        text_processors = (
            [self._choose, *([self._text_processors.region] if self._text_processors.region else [])]
            if self._text_processors
            else []
        )
        return [self._step, *([self._uniforms, self._close] if self._replay else text_processors)]

    @torch.no_grad()
    def run(self, request: Request) -> Generation:
        """Generate; raises GenerationError with the partial result when the target's logits are not finite."""
        return drive(self._begin(request), (self._target,), self._sizes, self._token, self._result)

    @torch.no_grad()
    def cycles(self, request: Request) -> Iterator[Run]:
        """As ``run``, token by token: the run before the first one and after each. Whoever asks may stop at any."""
        run = self._begin(request)
        yield run
        for _ in cycles(run, (self._target,), self._sizes, self._token):
            yield run

    def _begin(self, request: Request) -> Run:
        clock, asked = Clock(self.regions), request
        self._text_processors.begin(request)
        n = int(request.new_tokens.max())
        capacity = capacity_of(n, 1)
        if replays(self._replay, request):
            request, capacity = in_shape(request, capacity)
        make_room(self._replay, request, 1, capacity, 1, self._target)
        size = first_size(capacity, request.ids.shape[1])
        rows, context, state = self._target.begin(request, 1, size)
        clock.prefilled()
        log_p = first_distribution(rows, request, self._distribution, self._text_processors)
        require_distribution(log_p, None)
        streams = Streams(request.seeds, 1, capacity, 1)
        p = Population.start(request, 1, capacity, state, [])
        p.tokens[:, 0] = draw(log_p, streams.first()[:, 0], self._distribution.kind == "greedy")
        p.log_p[:, 0] = log_p.gather(1, p.tokens[:, :1])[:, 0]
        keys = mark_dynamic(request.key_positions(size), 1)
        watcher = Watcher(request.watch) if request.watch is not None else None
        run = Run(
            asked,
            request,
            p,
            streams,
            [context],
            keys,
            clock,
            Stats("autoregressive", n, rules=self._text_processors.told()),
            [],
            watcher,
        )
        p.stopped = stops(run, run.nothing, 1)[:, 0]
        return run

    def _token(self, run: Run) -> None:
        run.reserve(run.p.generated, (self._target,))
        if replays(self._replay, run.request):
            self._replayed(run)
            return
        p, last = run.p, run.p.generated - 1
        tokens, u = packed(p.tokens[:, last:].narrow(1, 0, 1)), run.streams.token(p.generated)
        ended, places = p.ended | p.stopped, run.places(last, 1)
        given = (tokens, ended, run.eos_ids, run.settings, u)
        if self._text_processors:
            rows, state = self._step(tokens, places, p.target, run.contexts[0])
            live = ~(ended | is_eos(tokens, run.eos_ids)[:, 0]) & (run.remaining(p.generated) > 0)
            rows = after_processors(
                run, self._text_processors, self._distribution, rows[:, None], run.nothing, live[:, None]
            )[:, 0]
            token, log_p, over, bad = self._choose(rows, *given)
        else:
            token, log_p, over, bad, state = self._step(*given, places, p.target, run.contexts[0])
        bad = bad & (run.remaining(p.generated) > 0)
        if bad.any():
            raise not_finite(bad, run.request, p.generated)
        p.target = state or p.target
        p.commit(token[:, None], torch.where(over, 0.0, log_p.double())[:, None], over[:, None])
        p.stopped = stops(run, run.nothing, 1)[:, 0]

    def _replayed(self, run: Run) -> None:
        """As ``_token``, in one recorded piece."""
        assert self._replay is not None
        status, _ = self._replay(run, 0, torch.ones(run.request.batch, dtype=torch.int64))
        if status.undefined.any():
            raise not_finite(status.undefined, run.request, run.p.generated)
        run.p.generated += 1
        run.told = status.finished
        run.stats.replayed += 1

    def _on_device(self, run: Run, at: At, _: RowCopy) -> None:
        """One token, in place; what holds numbers of tokens are tensors."""
        p, last = run.p, at.generated - 1
        u, ended = self._uniforms(run.streams.seeds, at.generated), p.ended | p.stopped
        tokens = p.tokens.index_select(1, last[None])
        places, context = run.places(last, 1), run.contexts[0]
        token, log_p, over, bad, _ = self._step(tokens, ended, run.eos_ids, run.settings, u, places, p.target, context)
        held, status = self._close(over, bad, Held.by(p), token, run.eos_ids, run.request.new_tokens, at.generated)
        p.tokens.index_copy_(1, at.generated[None], token[:, None])
        p.log_p.index_copy_(1, at.generated[None], torch.where(over, 0.0, log_p.double())[:, None])
        held.write(p)
        at.status.copy_(status)

    def _result(self, run: Run, whole: bool) -> Generation:
        result = run.result(whole)
        stats = run.stats
        stats.cycles = run.p.generated - 1
        stats.score_seconds = run.clock.spent("target_step", "target_choose")
        stats.rules_seconds += self._text_processors.seconds
        return result
