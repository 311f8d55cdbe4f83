"""The exact cached one-token loop: one row a request, no draft, no weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from smc_compile.result import Generation, Stats

from .clock import Clock
from .compiled import Region, mark_dynamic, packed
from .law import Law
from .memory import require_memory
from .models import RuntimeModel
from .population import Population
from .regions import choose, draw, is_end, run_model, step
from .request import Request
from .room import capacity_of, first_size
from .rules import Rules
from .run import Run, cycles, drive, first_law, not_finite, require_law, ruled, stops
from .settling import Watcher
from .streams import Streams


class AutoregressiveSession:
    """Draws token after token from the target, or takes the most likely one."""

    def __init__(self, target: RuntimeModel, law: Law, compiler: str, rules: Rules) -> None:
        self._target, self._law, self._rules = target, law, rules
        self._sizes: set[int] = set()
        if rules:
            self._step = Region("target_step", run_model(target.advance), compiler, target.whole)
            self._choose = Region("target_choose", choose(law), compiler)
        else:
            self._step = Region("target_step", step(target.advance, law), compiler, target.whole)

    @property
    def regions(self) -> list[Region]:
        rules = [self._choose, *([self._rules.region] if self._rules.region else [])] if self._rules else []
        return [self._step, *rules]

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
        clock = Clock(self.regions)
        self._rules.begin(request)
        n = int(request.new_tokens.max())
        capacity = capacity_of(n, 1)
        require_memory(request, 1, capacity, 1, self._target)
        size = first_size(capacity, request.ids.shape[1])
        rows, context, state = self._target.begin(request, 1, size)
        clock.prefilled()
        log_p = first_law(rows, request, self._law, self._rules)
        require_law(log_p, None)
        streams = Streams(request.seeds, 1, capacity, 1)
        p = Population.start(request, 1, capacity, state, [])
        p.tokens[:, 0] = draw(log_p, streams.first()[:, 0], self._law.kind == "greedy")
        p.log_p[:, 0] = log_p.gather(1, p.tokens[:, :1])[:, 0]
        keys = mark_dynamic(request.key_positions(size), 1)
        watcher = Watcher(request.watch) if request.watch is not None else None
        run = Run(
            request,
            request,
            p,
            streams,
            [context],
            keys,
            clock,
            Stats("autoregressive", n, rules=self._rules.told()),
            [],
            watcher,
        )
        p.stopped = stops(run, run.nothing, 1)[:, 0]
        return run

    def _token(self, run: Run) -> None:
        run.reserve(run.p.made, (self._target,))
        p, last = run.p, run.p.made - 1
        tokens, u = packed(p.tokens[:, last:].narrow(1, 0, 1)), run.streams.token(p.made)
        ended, places = p.ended | p.stopped, run.places(last, 1)
        given = (tokens, ended, run.ends, run.settings, u)
        if self._rules:
            rows, state = self._step(tokens, places, p.target, run.contexts[0])
            live = ~(ended | is_end(tokens, run.ends)[:, 0]) & (run.remaining > 0)
            rows = ruled(run, self._rules, self._law, rows[:, None], run.nothing, live[:, None])[:, 0]
            token, log_p, over, bad = self._choose(rows, *given)
        else:
            token, log_p, over, bad, state = self._step(*given, places, p.target, run.contexts[0])
        bad = bad & (run.remaining > 0)
        if bad.any():
            raise not_finite(bad, run.request, p.made)
        p.target = state or p.target
        p.commit(token[:, None], torch.where(over, 0.0, log_p.double())[:, None], over[:, None])
        p.stopped = stops(run, run.nothing, 1)[:, 0]

    def _result(self, run: Run, whole: bool) -> Generation:
        result = run.result(whole)
        stats = run.stats
        stats.cycles = run.p.made - 1
        stats.score_seconds = run.clock.spent("target_step", "target_choose")
        stats.rules_seconds += self._rules.seconds
        return result
