"""Tie passes and runtime: from a traced step and options to a program that answers requests."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor

from smc_compile.auto.choice import Choice, choose
from smc_compile.inputs.requests import build_request, check_prompt, request_seeds
from smc_compile.options import Options
from smc_compile.program.checks import beyond_training, check_request, position_limit
from smc_compile.program.model import (
    Model,
    method_for,
)
from smc_compile.result import Generation
from smc_compile.runtime.execution.incremental import CachedModel
from smc_compile.runtime.execution.region import Region
from smc_compile.runtime.execution.text_processors import TextProcessors
from smc_compile.runtime.sessions.autoregressive import AutoregressiveSession
from smc_compile.runtime.sessions.replay import Record
from smc_compile.runtime.sessions.smc import SMCSession
from smc_compile.runtime.sessions.speculative import SpeculativeSession
from smc_compile.runtime.state.request import Request, TextProcessor

log = logging.getLogger(__name__)


Session: TypeAlias = SMCSession | AutoregressiveSession | SpeculativeSession


@dataclass
class Program:
    """A compiled target and draft. One session answers every batch: its regions compile for what they meet.

    Attributes:
        rules: logits processors that read the text and compile.
        by_hand: whether requests bring processors that do not.
        choice: how N and K were chosen, where the options leave it to us; ``options`` then hold what was chosen.
        record: what records cycles to be replayed; None runs all of them from the host.
    """

    target: Model
    draft: Model | None
    options: Options
    text_processors: tuple[TextProcessor, ...] = ()
    on_host: bool = False
    analysis_seconds: float = 0.0
    choice: Choice | None = None
    record: Record | None = None
    _session: Session | None = None

    @property
    def method(self) -> str:
        return method_for(self.target, self.options)

    @property
    def rows(self) -> int:
        """Rows of a request: particles or chains."""
        alone = self.method == "autoregressive" or self.target.distribution.kind == "greedy"
        return 1 if alone else int(self.options.n_particles)

    @property
    def lookahead(self) -> int:
        return 0 if self.method == "autoregressive" else int(self.options.lookahead)

    def run(self, ids: Tensor, new_tokens: int, seeds: Tensor | None = None) -> Generation:
        """Generate ``new_tokens`` after each prompt of ``ids [B, P]``.

        Raises:
            InputError: when the prompt or the length does not fit the model.
            GenerationError: when generation breaks in the middle; ``partial`` holds the result so far.
        """
        check_prompt(ids)
        seeds = request_seeds(self.options.seed, ids) if seeds is None else seeds
        return self.answer(build_request(ids, new_tokens, seeds, eos_ids=self.options.eos_token_id))

    def answer(self, request: Request) -> Generation:
        """As ``run``, for requests that differ. The first one is what N and K are chosen for, where that is left open.

        Raises:
            OptionError: nothing that could be chosen keeps to the floors that the options set.
        """
        check_request(request, self.target, self.draft)
        if self.options.is_auto and self.method != "autoregressive":
            self.choice = choose(self, request)
            self.options = self.choice.applied(self.options)
        result = self.session.run(request)
        result.stats.n_particles, result.stats.lookahead = self.rows, self.lookahead
        result.stats.warnings += beyond_training(request, self.target, self.draft)
        for warning in result.stats.warnings:
            log.warning(warning)
        return result

    def like(self, options: Options) -> Program:
        """The same pair with other options, and a session of its own."""
        return replace(self, options=options, choice=None, _session=None)

    def room(self, request: Request, wanted: int) -> int:
        """How many new tokens, up to ``wanted``, the positions of both models leave."""
        prompt = int(request.lengths.max())
        models = [self.target] if self.draft is None else [self.target, self.draft]
        limits = (position_limit(model, prompt + wanted) for model in models)
        return min([wanted, *(limit - prompt for limit in limits if limit is not None)])

    @property
    def session(self) -> Session:
        if self._session is None:
            self._session = self._new_session()
        return self._session

    def _new_session(self) -> Session:
        o = self.options
        text_processors = TextProcessors(self.text_processors, self.on_host, o.compiler)
        if self.method == "autoregressive":
            return AutoregressiveSession(
                self.target.runtime, self.target.distribution, o.compiler, text_processors, self.record
            )
        assert self.draft is not None
        if self.method == "speculative":
            target, draft = self.target.runtime, self.draft.runtime
            assert isinstance(target, CachedModel)
            assert isinstance(draft, CachedModel)
            distributions = self.target.distribution, self.draft.distribution
            return SpeculativeSession(
                target, draft, *distributions, int(o.n_particles), self.lookahead, o.compiler, text_processors
            )
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
        )

    @property
    def regions(self) -> list[Region]:
        return [] if self._session is None else self._session.regions
