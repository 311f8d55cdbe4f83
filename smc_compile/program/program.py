"""A compiled target and draft under fixed options, which answers requests."""

from __future__ import annotations

import logging
import math
import weakref
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

from smc_compile.options import Options
from smc_compile.program.checks import beyond_training, check_request, position_limit
from smc_compile.program.draft_distribution import rejected
from smc_compile.program.method import method_for
from smc_compile.program.model import Model
from smc_compile.result import Generation
from smc_compile.runtime.execution.incremental import CachedModel
from smc_compile.runtime.execution.region import Region
from smc_compile.runtime.execution.text_processors import TextProcessors
from smc_compile.runtime.sessions.autoregressive import AutoregressiveSession
from smc_compile.runtime.sessions.replay import Record
from smc_compile.runtime.sessions.smc import SMCSession
from smc_compile.runtime.sessions.speculative import SpeculativeSession
from smc_compile.runtime.sessions.switching import SwitchingSession, Tradeoff
from smc_compile.runtime.state.request import Request, TextProcessor

log = logging.getLogger(__name__)

FAR = 0.1  # nats a token: a text that may be further from the target than this is warned of

Session: TypeAlias = SMCSession | AutoregressiveSession | SpeculativeSession | SwitchingSession


@dataclass(eq=False)
class Program:
    """A compiled target and draft. One session answers every batch: its regions compile for what they meet.

    Attributes:
        options: with N and K as numbers, unless the method has no use for them (see ``smc_compile.auto.choice``).
        text_processors: those that compile; they belong to the program.
        on_host: whether each request brings text processors of its own, which run on the host.
        record: what records cycles to be replayed; None runs all of them from the host.
        warnings: what every result of the program says in ``stats.warnings``.
        tradeoff: for "auto", by what SMC and exact speculation take turns; None before it is known.
    """

    target: Model
    draft: Model | None
    options: Options
    text_processors: tuple[TextProcessor, ...] = ()
    on_host: bool = False
    record: Record | None = None
    warnings: tuple[str, ...] = ()
    tradeoff: Tradeoff | None = None

    @property
    def method(self) -> str:
        """The method that runs: a greedy loop has no use for particles."""
        return method_for(self.target, self.options)

    @property
    def vocabulary(self) -> int:
        """Tokens that target and draft share; 0 where models with a state of their own do not tell."""
        return self.target.distribution.vocab or self.target.vocab_size or 0

    @property
    def rows(self) -> int:
        """Rows of a request: particles or chains."""
        alone = self.method == "autoregressive" or self.target.distribution.kind == "greedy"
        return 1 if alone else int(self.options.n_particles)

    @property
    def lookahead(self) -> int:
        """Draft tokens per cycle; 0 in the one-token loop."""
        return 0 if self.method == "autoregressive" else int(self.options.lookahead)

    def answer(self, request: Request) -> Generation:
        """Generate for each request of the batch.

        Raises:
            InputError: a prompt or a length does not fit the models.
            GenerationError: generation breaks in the middle; ``partial`` holds the result so far.
        """
        return self.warned(self.drawn(request))

    def drawn(self, request: Request) -> Generation:
        """As ``answer``, of a part of an answer: how far the whole is from the target is not said yet."""
        check_request(request, self.target, self.draft)
        result = self.session.run(request)
        result.stats.n_particles, result.stats.lookahead = self.rows, self.lookahead
        result.stats.warnings += self.warnings
        result.stats.warnings += beyond_training(request, self.target, self.draft)
        return replace(result, _program=weakref.ref(self))

    def warned(self, result: Generation) -> Generation:
        """The same with warnings where the law of the texts may be far from the target's. All warnings are logged."""
        far, dropped = float(result.kl_bound_per_token.nanmean()), int(result.dropped.sum())
        ways = ["raise n_particles", "lower lookahead"]
        if self.method == "auto":
            ways = ["lower max_kl_per_token", 'use method="speculative", exact']
        elif self.forgets:
            ways += ["lower max_divergence"] * (self.options.max_divergence > 0) + ['use method="speculative", exact']
        found = []
        for b, evidence in enumerate(result.log_evidence.tolist() if result.stats.potentials else []):
            if evidence == -math.inf:
                length, name = int(result.new_lengths[b]), result.stats.potentials[b]
                result.stats.warnings.append(
                    f"all particles of request {b} have died at new token {length}: nothing of what they wrote there "
                    f"fits {name}, within max_new_tokens; the text ends there, unfinished"
                )
        if dropped:
            found.append(
                f"every particle would have died {dropped} times, and what was drafted was dropped: the texts are "
                "biased by that, log_evidence is too high, and no kl_bound is known"
            )
        if far > FAR:
            found.append(
                f"the law of these texts may be {far:.2g} nats a token from the target's (kl_bound, "
                f"{int((result.dropped == 0).sum())} requests)"
            )
        result.stats.warnings += [f"{warning}: {', or '.join(ways)}" for warning in found]
        for warning in result.stats.warnings:
            log.warning(warning)
        return result

    @property
    def forgets(self) -> bool:
        """Whether the models can forget drafted tokens: caches that the compiler made can, a model's own state not."""
        models = [model for model in (self.target, self.draft) if model is not None]
        return all(model.runtime.forgets for model in models)

    def under(self, options: Options) -> Program:
        """The same pair under other options, with a session of its own."""
        return replace(self, options=options)

    def positions_left(self, request: Request, wanted: int) -> int:
        """How many new tokens, up to ``wanted``, the positions of both models leave behind the prompts."""
        prompt = int(request.lengths.max())
        models = [self.target] if self.draft is None else [self.target, self.draft]
        limits = (position_limit(model, prompt + wanted) for model in models)
        return min([wanted, *(limit - prompt for limit in limits if limit is not None)])

    @cached_property
    def session(self) -> Session:
        """What runs the requests; made when it is first asked for."""
        o = self.options
        text_processors = TextProcessors(self.text_processors, self.on_host, o.compiler)
        if self.method == "autoregressive":
            return AutoregressiveSession(
                self.target.runtime, self.target.distribution, o.compiler, text_processors, self.record
            )
        assert self.draft is not None
        if self.method == "speculative":
            return self._exact(int(o.n_particles), self.lookahead, text_processors)
        smc = self._smc(text_processors)
        if self.method == "smc":
            return smc
        assert self.tradeoff is not None
        exact = self._exact(1, self.tradeoff.exact_lookahead, text_processors)
        return SwitchingSession(smc, exact, self.rows, self.lookahead, self.tradeoff)

    def _exact(self, chains: int, lookahead: int, text_processors: TextProcessors) -> SpeculativeSession:
        assert self.draft is not None
        target, draft = self.target.runtime, self.draft.runtime
        assert isinstance(target, CachedModel)
        assert isinstance(draft, CachedModel)
        distributions = self.target.distribution, rejected(self.draft.distribution)
        return SpeculativeSession(
            target, draft, *distributions, chains, lookahead, self.options.compiler, text_processors
        )

    def _smc(self, text_processors: TextProcessors) -> SMCSession:
        o = self.options
        assert self.draft is not None
        return SMCSession(
            self.target.runtime,
            self.draft.runtime,
            self.target.distribution,
            self.draft.distribution,
            self.rows,
            self.lookahead,
            o.ess_threshold,
            o.resampling_method,
            o.compiler,
            text_processors,
            self.record,
            o.max_divergence,
        )

    @property
    def regions(self) -> list[Region]:
        """The compiled regions of the session, none before the first request."""
        return self.session.regions if "session" in vars(self) else []
