"""One call while it runs, and the loop over its cycles: what all methods share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smc_compile.errors import GenerationError
from smc_compile.result import Generation, Stats
from smc_compile.runtime.algorithms.next_token import Mixture, NextTokenDistribution, broken
from smc_compile.runtime.algorithms.steering import Steering
from smc_compile.runtime.algorithms.tensors import mark_dynamic
from smc_compile.runtime.algorithms.uniforms import Streams
from smc_compile.runtime.execution.incremental import RuntimeModel
from smc_compile.runtime.execution.region import begin_run, with_own_run
from smc_compile.runtime.execution.text_processors import RequestProcessors
from smc_compile.runtime.sessions.clock import Clock
from smc_compile.runtime.state.population import Outcome, Population, assemble, outcome
from smc_compile.runtime.state.region_types import EosIds, Places, Settings
from smc_compile.runtime.state.rejections import Rejections
from smc_compile.runtime.state.request import Request
from smc_compile.runtime.state.settling import Watcher
from smc_compile.runtime.state.suffix_sizes import next_size

CACHES = ("target", "draft")  # fields of a state, in the order of models and contexts


@dataclass
class Run:
    """One call while it runs: the requests that go on, and what became of those that have finished.

    Attributes:
        asked: all requests as the caller gave them.
        request: those that go on, B of them.
        p: their particles.
        contexts: what the particles of a request share, of the target and, if there is one, the draft.
        keys: [B, P+S], positions of what the caches hold.
        text_processors: those of this call.
        outcomes: what became of the others.
        reported: [B] bool, which requests have finished, where the last cycle has reported it.
        unread: how many of the last tokens the draft has not read.
        rejections: of exact speculation, where it takes part.
        gone: numbers of the requests whose outcomes are known.
    """

    asked: Request
    request: Request
    p: Population
    streams: Streams
    contexts: list[Any]
    keys: Tensor
    clock: Clock
    stats: Stats
    text_processors: RequestProcessors
    outcomes: list[Outcome]
    watcher: Watcher | None = None
    reported: Tensor | None = None
    unread: int = 1
    rejections: Rejections | None = None

    def __post_init__(self) -> None:
        self.gone: set[int] = set()
        self.by_row()

    @property
    def n(self) -> int:
        """Rows of a request in the models' caches."""
        return self.p.n

    def by_row(self) -> None:
        """Set what regions read of each row: end ids, padding and settings of its request. [B, ...] -> [R, ...]"""
        r, n = self.request, self.n
        self.eos_ids = EosIds(r.eos_ids.repeat_interleave(n, 0), r.pad.repeat_interleave(n))
        self.settings: Settings = {name: value.repeat_interleave(n) for name, value in r.settings.items()}
        self.rows = r.rows(n)
        self.no_tokens = r.ids[:, :0].repeat_interleave(n, 0)  # [R, 0]

    def remaining(self, generated: Tensor) -> Tensor:
        """[R], tokens still wanted when so many [B] are generated."""
        return (self.request.new_tokens - generated).repeat_interleave(self.p.n)

    def steering(self, state: Tensor, left: Tensor) -> Steering | None:
        """Of rows in these states [R] or [R, T], with so many tokens left behind the next one; None where texts are
        conditioned on nothing."""
        return steering_of(self.request, state, left)

    def standing(self, generated: Tensor) -> Tensor:
        """[B], where each request goes on: a batch may hold some that have finished, and those stand still."""
        return generated.minimum(self.request.new_tokens.clamp_min(2))

    def places(self, first: Tensor, count: int) -> Places:
        """Where ``count`` tokens go from slot ``first`` [B] of the suffixes on."""
        slots = first[:, None] + torch.arange(count, device=self.keys.device)
        return Places(self.request.positions(slots), slots, self.keys)

    def finished(self) -> Tensor:
        """Which requests have finished [B] bool."""
        return self.p.finished(self.request, self.eos_ids) if self.reported is None else self.reported

    def reserve(self, slots: int, models: Sequence[RuntimeModel]) -> None:
        """Let the suffixes of these models grow until they have ``slots`` slots."""
        prompt = self.request.ids.shape[1]
        size = self.keys.shape[1] - prompt
        slots = min(slots, self.p.state.texts.tokens.shape[1])  # requests that have finished stand still behind theirs
        if slots <= size:
            return
        begin_run()
        state = self.p.state
        size = next_size(size, slots, state.texts.tokens.shape[1], prompt)
        self.keys = mark_dynamic(self.request.key_positions(size), 1)
        for name, model in zip(CACHES, models, strict=False):
            state = state._replace(**{name: model.grow(getattr(state, name), size)})
        self.p.state = state

    def release(self, finished: Tensor, models: Sequence[RuntimeModel], sizes: set[int]) -> None:
        """Keep the answers of the requests that have ``finished`` [B], and drop their rows from the batch.

        A batch shrinks to a size in ``sizes``, for which regions are compiled already. Some finished requests may stay
        in it to make up that size: compiling for another one would take longer than their rows do.
        """
        if not finished.any():
            return
        done = finished.nonzero()[:, 0].tolist()
        self.settle(done)
        live = len(finished) - len(done)
        size = min((s for s in sizes if live <= s), default=len(finished))
        if live and size < len(finished):
            self._take(sorted([b for b in range(len(finished)) if b not in done] + done[: size - live]), models)

    def settle(self, done: list[int]) -> None:
        """Keep the answers of these requests of the batch, but of those whose answers are kept already."""
        fresh = [b for b in done if self.request.number[b] not in self.gone]
        if not fresh:
            return
        self.outcomes.append(outcome(self.p, self.request, self.eos_ids, fresh, self.streams.select()))
        self.gone.update(self.outcomes[-1].number)
        if self.watcher is not None:
            self.watcher.finish(self.outcomes[-1])

    def _take(self, keep: list[int], models: Sequence[RuntimeModel]) -> None:
        begin_run()
        index = torch.tensor(keep, device=self.keys.device)
        rows = (index[:, None] * self.n + torch.arange(self.n, device=index.device)).flatten()
        self.request, self.streams = self.request.take(keep), self.streams.take(index)
        self.rejections = self.rejections and self.rejections.take(index)
        self.p = self.p.take(index, rows)
        self.keys = mark_dynamic(self.keys[index], 1)
        state = self.p.state
        for i, (name, model) in enumerate(zip(CACHES, models, strict=False)):
            self.contexts[i], caches = model.take(self.contexts[i], getattr(state, name), index, rows)
            state = state._replace(**{name: caches})
        self.p.state = state
        self.by_row()

    def result(self, whole: bool) -> Generation:
        """The result of all requests; of those that still go on, as they stand.

        Sequences have the most new tokens asked for if ``whole``, else no more than are generated.
        """
        on = [b for b, number in enumerate(self.request.number) if number not in self.gone]
        now = [outcome(self.p, self.request, self.eos_ids, on, self.streams.select())] if on else []
        width = int(self.asked.new_tokens.max())
        width = width if whole else min(width, self.p.generated)
        return assemble([*self.outcomes, *now], self.asked, width, self.clock.fill(self.stats))


Advance = Callable[[Run], Run]  # a cycle: the run that goes on, the same one or another in its place


@with_own_run
def cycles(run: Run, models: Sequence[RuntimeModel], sizes: set[int], advance: Advance) -> Iterator[Run]:
    """Advance cycle by cycle until every request has finished, and yield the run after each. Batch sizes that have run
    are added to ``sizes``."""
    begin_run()
    run.release(run.finished(), models, sizes)
    while len(run.gone) < run.asked.batch:
        run.reported = None
        run = advance(run)
        sizes.add(run.request.batch)
        if run.watcher is not None:
            run.watcher.cycle(run.p, run.request, run.eos_ids, run.gone)
        run.release(run.finished(), models, sizes)
        yield run


def drive(
    run: Run,
    models: Sequence[RuntimeModel],
    sizes: set[int],
    advance: Advance,
    result: Callable[[Run, bool], Generation],
) -> Generation:
    """Advance until every request has finished. Returns the result; ``sizes`` as for ``cycles``.

    Whatever is raised by a cycle, a model or the compiler has the result so far as ``error.partial``.
    """
    try:
        for run in cycles(run, models, sizes, advance):  # noqa: B007, B020, each cycle gives the run that goes on
            pass
    except Exception as error:
        error.partial = result(run, False)  # type: ignore[attr-defined]
        raise
    return result(run, True)


def result_of(run: Run, whole: bool) -> Generation:
    """As ``Run.result``, of a run with a draft: its statistics tell where the time went, and how much was accepted."""
    result = run.result(whole)
    clock, stats = run.clock, run.stats
    stats.draft_seconds = clock.spent("draft_head", "draft_step", "draft_choose")
    stats.score_seconds = clock.spent("score", "judge", "accept", "conclude")
    stats.resample_seconds = clock.spent("weigh") + clock.resample_seconds
    stats.rules_seconds += run.text_processors.seconds
    if run.rejections is not None:
        stats.accepted = run.rejections.accepted / max(run.rejections.live, 1)
    return result


def steering_of(request: Request, state: Tensor, left: Tensor) -> Steering | None:
    """As ``Run.steering``, for rows of a request each."""
    given = request.conditioning
    if given is None:
        return None
    left = left + given.slack
    weights = None if given.guide is None else given.guide.weights(state, left)
    power = None
    if given.power is not None:
        power = given.power.repeat_interleave(len(state) // request.batch)
        power = power if state.dim() == 1 else power[:, None].expand(state.shape)
    return Steering(given.automaton, state, left, weights, power)


def first_distribution(
    rows: Tensor, request: Request, distribution: NextTokenDistribution | Mixture, text_processors: RequestProcessors
) -> Tensor:
    """log-probabilities [B, V] of the first new token of each request. rows: [B, V], behind the prompts."""
    if text_processors:
        live = torch.ones(request.batch, 1, dtype=torch.bool, device=rows.device)
        rows = text_processors.apply(request.ids, distribution.scores(rows)[:, None], request.rows(1), live)[:, 0]
    return distribution.log_probs(rows, {name: value[:, None] for name, value in request.settings.items()})


def require_distribution(log_probs: Tensor, request: Request | None, who: str = "target") -> None:
    """Raises GenerationError when a row of ``log_probs`` [B, V] holds NaN; ``who`` names the model."""
    bad = broken(log_probs)
    if bad.any():
        raise not_finite(bad, request, 0, who)


def not_finite(bad: Tensor, request: Request | None, generated: int, who: str = "target") -> GenerationError:
    """The error of requests ``bad`` [B] bool behind so many tokens; without a request, rows are numbers."""
    rows = bad.nonzero()[:, 0].tolist()
    first = rows[0] if request is None else request.number[rows[0]]
    return GenerationError(
        f"the {who}'s logits are NaN or infinite",
        f"at generated token {generated}, request {first}" + (f" and {len(rows) - 1} more" if len(rows) > 1 else ""),
        "check the weights and the dtype (overflow in float16?), and that no logits processor removes every token; "
        "error.partial holds what was generated before",
    )
