"""One call while it runs: what the sessions share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smc_compile.errors import GenerationError
from smc_compile.result import Generation, Stats
from smc_compile.runtime.algorithms.next_token import Mixture, NextTokenDistribution, broken
from smc_compile.runtime.algorithms.tensors import mark_dynamic
from smc_compile.runtime.algorithms.uniforms import Streams
from smc_compile.runtime.execution.incremental import RuntimeModel
from smc_compile.runtime.execution.region import begin_run, with_own_run
from smc_compile.runtime.execution.text_processors import TextProcessors
from smc_compile.runtime.sessions.clock import Clock
from smc_compile.runtime.state.population import Outcome, Population, assemble, outcome
from smc_compile.runtime.state.region_types import EosIds, Places, Settings
from smc_compile.runtime.state.request import Request, Rows, Stop
from smc_compile.runtime.state.settling import Watcher
from smc_compile.runtime.state.suffix_sizes import next_size


@dataclass
class Run:
    """One call while it runs: the requests that go on, and what became of those that have finished."""

    asked: Request
    request: Request
    p: Population
    streams: Streams
    contexts: list[Any]  # of the target and the draft
    keys: Tensor  # [B, P+S]
    clock: Clock
    stats: Stats
    outcomes: list[Outcome]
    watcher: Watcher | None = None
    told: Tensor | None = None  # which requests have finished, where a cycle said so itself: [B]

    def __post_init__(self) -> None:
        self.gone: set[int] = set()
        self.by_row()

    @property
    def n(self) -> int:
        """Rows of a request."""
        return self.p.n

    def by_row(self) -> None:
        """What the regions read of each row."""
        r, n = self.request, self.n
        self.eos_ids = EosIds(r.eos_ids.repeat_interleave(n, 0), r.pad.repeat_interleave(n))
        self.settings: Settings = {name: value.repeat_interleave(n) for name, value in r.settings.items()}
        self.rows = r.rows(n)
        self.nothing = self.request.ids[:, :0].repeat_interleave(n, 0)  # no tokens [R, 0]

    def remaining(self, generated: int | Tensor) -> Tensor:
        """[R], tokens still wanted after the pending one, number ``made``."""
        return (self.request.new_tokens - generated).repeat_interleave(self.p.n)

    def places(self, first: int | Tensor, count: int) -> Places:
        """``count`` slots from ``first``."""
        slots = first + torch.arange(count, device=self.keys.device)
        return Places(self.request.positions(slots), slots, self.keys)

    def finished(self) -> Tensor:
        """[B] bool"""
        return self.p.finished(self.request, self.eos_ids) if self.told is None else self.told

    def reserve(self, slots: int, models: Sequence[RuntimeModel]) -> None:
        """Let the suffixes of these models grow until they have ``slots`` slots."""
        prompt = self.request.ids.shape[1]
        size = self.keys.shape[1] - prompt
        if slots <= size:
            return
        begin_run()
        size = next_size(size, slots, self.p.tokens.shape[1], prompt)
        self.keys = mark_dynamic(self.request.key_positions(size), 1)
        for name, model in zip(("target", "draft"), models, strict=False):
            setattr(self.p, name, model.grow(getattr(self.p, name), size))

    def release(self, finished: Tensor, models: Sequence[RuntimeModel], sizes: set[int]) -> None:
        """Give the answers of requests that have finished, and let their rows go, so that the others do not carry them.

        A batch shrinks to a size in ``sizes``, for which regions are compiled already: to compile for another one would
        hold up those that go on for longer than the rows that are left over.
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
        """Keep the answers of these rows' requests; one that stayed behind for company has given its own."""
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
        self.p = self.p.take(index, rows)
        self.keys = mark_dynamic(self.keys[index], 1)
        for i, model in enumerate(models):
            name = ("target", "draft")[i]
            self.contexts[i], state = model.take(self.contexts[i], getattr(self.p, name), index, rows)
            setattr(self.p, name, state)
        self.by_row()

    def result(self, whole: bool) -> Generation:
        """All requests; those that still go on as they stand, and no wider than that unless ``whole``."""
        on = [b for b, number in enumerate(self.request.number) if number not in self.gone]
        now = [outcome(self.p, self.request, self.eos_ids, on, self.streams.select())] if on else []
        width = int(self.asked.new_tokens.max())
        width = width if whole else min(width, self.p.generated)
        return assemble([*self.outcomes, *now], self.asked, width, self.clock.fill(self.stats))


@with_own_run
def cycles(run: Run, models: Sequence[RuntimeModel], sizes: set[int], advance: Callable[[Run], None]) -> Iterator[None]:
    """Advance cycle by cycle until every request has finished; ``sizes`` learns the batch sizes that have run."""
    begin_run()
    run.release(run.finished(), models, sizes)
    while len(run.gone) < run.asked.batch:
        run.told = None
        advance(run)
        sizes.add(run.request.batch)
        if run.watcher is not None:
            run.watcher.cycle(run.p, run.request, run.eos_ids, run.gone)
        run.release(run.finished(), models, sizes)
        yield


def drive(
    run: Run,
    models: Sequence[RuntimeModel],
    sizes: set[int],
    advance: Callable[[Run], None],
    result: Callable[[Run, bool], Generation],
) -> Generation:
    """Advance until every request has finished, and give all answers; ``sizes`` as for ``cycles``.

    Whatever is raised on the way, by us, a model or the compiler, carries the result so far as ``error.partial``.
    """
    try:
        for _ in cycles(run, models, sizes, advance):
            pass
    except Exception as error:
        error.partial = result(run, False)  # type: ignore[attr-defined]
        raise
    return result(run, True)


def first_distribution(
    rows: Tensor, request: Request, distribution: NextTokenDistribution | Mixture, text_processors: TextProcessors
) -> Tensor:
    """log-probabilities [B, V] of the first new token of each request."""
    if text_processors:
        live = torch.ones(request.batch, 1, dtype=torch.bool, device=rows.device)
        rows = text_processors.apply(request.ids, distribution.scores(rows)[:, None], request.rows(1), live)[:, 0]
    return distribution.log_probs(rows, {name: value[:, None] for name, value in request.settings.items()})


def after_processors(
    run: Run,
    text_processors: TextProcessors,
    distribution: NextTokenDistribution | Mixture,
    rows: Tensor,
    extra: Tensor,
    live: Tensor,
) -> Tensor:
    """Rows [R, T, V] of the last T prefixes of the text with ``extra`` [R, T-1] behind it, after the rules."""
    return text_processors.apply(run.p.text(run.request, extra), distribution.scores(rows), run.rows, live)


def stops(run: Run, extra: Tensor, count: int) -> Tensor:
    """Whether each text, with ``extra`` [R, E] behind it, ends with each of its last ``count`` tokens: [R, count].

    Raises:
        GenerationError: without a partial result, when a stopping criterion raises or gives no answer for each row.
    """
    p, stop = run.p, run.request.stop
    if stop is None:
        return torch.zeros(p.tokens.shape[0], count, dtype=torch.bool, device=p.tokens.device)
    start = time.perf_counter()
    found = ask(stop, p.text(run.request, extra), run.rows, count)
    run.stats.rules_seconds += time.perf_counter() - start
    return found


def ask(stop: Stop, text: Tensor, rows: Rows, count: int) -> Tensor:
    """Whether each text [R, L] ends with each of its last ``count`` tokens: [R, count]. Raises as ``stops``."""
    found = torch.zeros(text.shape[0], count, dtype=torch.bool, device=text.device)
    for t in range(count):
        try:
            found[:, t] = stop(text[:, : text.shape[1] - count + 1 + t], rows)
        except Exception as error:
            raise GenerationError(
                "a stopping criterion broke off the generation",
                f"it raised {type(error).__name__}: {error}",
                "a criterion takes (input_ids [rows, length], scores=None) and returns a bool for each row; "
                "error.partial holds what was generated before",
            ) from error
    return found


def require_distribution(log_probs: Tensor, request: Request | None, who: str = "target") -> None:
    bad = broken(log_probs)
    if bad.any():
        raise not_finite(bad, request, 0, who)


def not_finite(bad: Tensor, request: Request | None, generated: int, who: str = "target") -> GenerationError:
    rows = bad.nonzero()[:, 0].tolist()
    first = rows[0] if request is None else request.number[rows[0]]
    return GenerationError(
        f"the {who}'s logits are NaN or infinite",
        f"at generated token {generated}, request {first}" + (f" and {len(rows) - 1} more" if len(rows) > 1 else ""),
        "check the weights and the dtype (overflow in float16?), and that no logits processor removes every token; "
        "error.partial holds what was generated before",
    )
