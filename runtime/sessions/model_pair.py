"""How a cycle calls draft and target: each in one region with what follows it, or with text processors in between.

The draft reads one token at a time, and two at the head of a cycle: the last drafted token of the cycle before, which
it has not read, and the bonus. A region compiles for one width, so there are two of the draft.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smc_compile.runtime.algorithms.next_token import Mixture, NextTokenDistribution
from smc_compile.runtime.algorithms.steering import Steering
from smc_compile.runtime.execution.cuts import Cuts
from smc_compile.runtime.execution.incremental import RuntimeModel
from smc_compile.runtime.execution.region import Region, compiled_apart
from smc_compile.runtime.execution.region_bodies import Chosen, Judged, choose, judge, run_model, score, step
from smc_compile.runtime.sessions.cycle import Drafting
from smc_compile.runtime.sessions.ragged_texts import after_processors
from smc_compile.runtime.sessions.run import Run
from smc_compile.runtime.state.region_types import Places, Settings, State, is_eos


class FusedPair:
    """A drafted token is one region, and so is the judgement of a block. Arguments and results as of ``ModelPair``."""

    def __init__(
        self,
        target: RuntimeModel,
        draft: RuntimeModel,
        distribution: NextTokenDistribution,
        draft_distribution: NextTokenDistribution | Mixture,
        compiler: str,
        cuts: Cuts,
    ) -> None:
        chosen = compiled_apart(choose(draft_distribution, cuts.any), "draft_choose", compiler, draft.whole)
        judged = compiled_apart(judge(distribution, cuts), "judge", compiler, target.whole)
        self._head = Region("draft_head", step(draft.advance, chosen), compiler, draft.whole)
        self._step = Region("draft_step", step(draft.advance, chosen), compiler, draft.whole)
        self._score = Region("score", score(target.score, judged), compiler, target.whole)

    @property
    def regions(self) -> list[Region]:
        return [self._head, self._step, self._score]

    def draft_token(
        self, run: Run, at: Drafting, remaining: Tensor, settings: Settings, u: Tensor, places: Places
    ) -> tuple[Chosen, State]:
        region = self._head if at.tokens.shape[1] == 2 else self._step
        given = (at.tokens, at.ended, run.eos_ids, settings, u)
        steering = run.steering(at.states[-1], remaining - len(at.block))
        drafted: tuple[Chosen, State] = region(*given, places, at.caches, run.contexts[1], steering)
        return drafted

    def judge(
        self,
        run: Run,
        block: Tensor,
        log_q: Tensor,
        proposed: Sequence[Tensor],
        log_w: Tensor,
        ended: Tensor,
        stopped: Tensor,
        remaining: Tensor,
        u: Tensor,
        places: Places,
        caches: State,
        states: Tensor,
    ) -> tuple[Judged, State]:
        given = (block, log_q, proposed, log_w, ended, stopped, run.eos_ids, remaining, run.settings, u)
        judged, after = self._score(*given, places, caches, run.contexts[0], steering_of_block(run, states, remaining))
        return judged, after


class ProcessedPair:
    """The models alone are regions, and so is what is drawn and judged: text processors see the rows in between.

    Arguments and results as of ``ModelPair``.
    """

    def __init__(
        self,
        target: RuntimeModel,
        draft: RuntimeModel,
        distribution: NextTokenDistribution,
        draft_distribution: NextTokenDistribution | Mixture,
        compiler: str,
        cuts: Cuts,
    ) -> None:
        self._distribution, self._draft_distribution = distribution, draft_distribution
        self._head = Region("draft_head", run_model(draft.advance), compiler, draft.whole)
        self._step = Region("draft_step", run_model(draft.advance), compiler, draft.whole)
        self._choose = Region("draft_choose", choose(draft_distribution, cuts.any), compiler)
        self._score = Region("score", run_model(target.score), compiler, target.whole)
        self._judge = Region("judge", judge(distribution, cuts), compiler)

    @property
    def regions(self) -> list[Region]:
        return [self._head, self._step, self._score, self._choose, self._judge]

    def draft_token(
        self, run: Run, at: Drafting, remaining: Tensor, settings: Settings, u: Tensor, places: Places
    ) -> tuple[Chosen, State]:
        region = self._head if at.tokens.shape[1] == 2 else self._step
        rows, caches = region(at.tokens, places, at.caches, run.contexts[1])
        drafted = torch.stack(at.block[1:], 1) if len(at.block) > 1 else run.no_tokens  # [R, k]
        live = ~(at.ended | is_eos(at.tokens[:, -1:], run.eos_ids)[:, 0]) & (remaining > drafted.shape[1])
        rows = after_processors(run, self._draft_distribution, rows[:, None], drafted, live[:, None])[:, 0]
        steering = run.steering(at.states[-1], remaining - len(at.block))
        return self._choose(rows, at.tokens, at.ended, run.eos_ids, settings, u, steering), caches

    def judge(
        self,
        run: Run,
        block: Tensor,
        log_q: Tensor,
        proposed: Sequence[Tensor],
        log_w: Tensor,
        ended: Tensor,
        stopped: Tensor,
        remaining: Tensor,
        u: Tensor,
        places: Places,
        caches: State,
        states: Tensor,
    ) -> tuple[Judged, State]:
        rows, after = self._score(block, places, caches, run.contexts[0])
        over = ended[:, None] | ((is_eos(block, run.eos_ids) | stopped).int().cumsum(1) > 0)
        live = ~over & (torch.arange(block.shape[1], device=over.device) < remaining[:, None])
        rows = after_processors(run, self._distribution, rows.view(*block.shape, -1), block[:, 1:], live)
        given = (block, log_q, proposed, log_w, ended, stopped, run.eos_ids, remaining, run.settings, u)
        return self._judge(rows.flatten(0, 1), *given, steering_of_block(run, states, remaining)), after


def steering_of_block(run: Run, states: Tensor, remaining: Tensor) -> Steering | None:
    """Before x_1 .. x_{K+1}, in ``states`` [R, K+1], with ``remaining`` [R] tokens wanted after x_0."""
    place = torch.arange(1, states.shape[1] + 1, device=states.device)
    return run.steering(states, remaining[:, None] - place)
