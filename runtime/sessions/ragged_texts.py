"""Text processors and stopping criteria where the texts of a batch differ in length: called once for each length."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from smc_compile.runtime.algorithms.next_token import Mixture, NextTokenDistribution
from smc_compile.runtime.sessions.run import Run, ask
from smc_compile.runtime.state.request import Request, Rows


def by_count(request: Request, tokens: Tensor, count: Tensor, extra: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each number L of generated tokens: which requests [B] have so many, and texts [R, P + L + E].

    Texts are prompts as they were given, generated tokens [B, G], and ``extra`` [R, E] behind them. Those of requests
    that do not have L tokens mean nothing.
    """
    n = len(extra) // len(count)
    for generated in count.unique().tolist():
        front = torch.cat([request.ids, tokens[:, :generated]], 1).repeat_interleave(n, 0)
        yield count == generated, torch.cat([front, extra], 1)


def texts_after_processors(
    run: Run,
    count: Tensor,
    distribution: NextTokenDistribution | Mixture,
    rows: Tensor,
    extra: Tensor,
    live: Tensor,
) -> Tensor:
    """Scores [R, T, V] after the text processors, from a model's rows [R, T, V].

    They are those of the last T prefixes of the texts of ``count`` [B] generated tokens with ``extra`` [R, T-1] behind
    them; what is not ``live`` [R, T] counts for nothing.
    """
    scores = distribution.scores(rows)
    for group, text in by_count(run.request, run.p.tokens, count, extra):
        asked = live & group.repeat_interleave(run.n)[:, None]
        if asked.any():
            scores = run.text_processors.apply(text, scores, run.rows, asked)
    return scores


def ends_by_text(run: Run, count: Tensor, new: Tensor, width: Tensor) -> Tensor:
    """Whether the text of each request ends with each of the first ``width`` [B] of its new tokens [B, T]: [B, T].

    Raises:
        GenerationError: without a partial result, when a stopping criterion raises or gives no answer for each row.
    """
    found = torch.zeros(new.shape, dtype=torch.bool, device=new.device)
    stop, rows = run.request.stop, run.request.rows(1)
    if stop is None:
        return found
    start = time.perf_counter()
    for group, text in by_count(run.request, run.p.tokens, count, new):
        group = group & (width > 0)
        if group.any():
            widest = int(width[group].max())
            text = text[group, : text.shape[1] - new.shape[1] + widest]
            found[group, :widest] = ask(stop, text, Rows(rows.request[group], rows.padding[group]), widest)
    run.stats.rules_seconds += time.perf_counter() - start
    return found & (torch.arange(new.shape[1], device=new.device) < width[:, None])
