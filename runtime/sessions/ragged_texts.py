"""Text processors and stopping criteria. The texts of a batch may differ in length: they are called for each length."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from smc_compile.errors import GenerationError
from smc_compile.runtime.algorithms.next_token import Mixture, NextTokenDistribution
from smc_compile.runtime.sessions.run import Run
from smc_compile.runtime.state.request import Request, Rows, Stop


def by_count(request: Request, tokens: Tensor, count: Tensor, extra: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each number L of generated tokens: which requests [B] have so many, and texts [R, P + L + E].

    Texts are prompts as they were given, generated tokens, and ``extra`` [R, E] behind them. Those of requests that do
    not have L tokens mean nothing.

    Args:
        tokens: [B, G] or [R, G], the generated ones of requests or rows.
        count: [B], how many of these there are.
    """
    per_request, per_text = len(tokens) // len(count), len(extra) // len(tokens)
    prompts = request.ids.repeat_interleave(per_request, 0)
    for generated in count.unique().tolist():
        front = torch.cat([prompts, tokens[:, :generated]], 1).repeat_interleave(per_text, 0)
        yield count == generated, torch.cat([front, extra], 1)


def after_processors(
    run: Run, distribution: NextTokenDistribution | Mixture, rows: Tensor, extra: Tensor, live: Tensor
) -> Tensor:
    """Scores [R, T, V] after the text processors, from a model's rows [R, T, V].

    Scores at t follow the text and the first t tokens of ``extra`` [R, T-1]. Where not ``live`` [R, T] they mean
    nothing.
    """
    scores = distribution.scores(rows)
    for group, text in by_count(run.request, run.p.tokens, run.p.state.generated, extra):
        asked = live & group.repeat_interleave(run.n)[:, None]
        if asked.any():
            scores = run.text_processors.apply(text, scores, run.rows, asked)
    return scores


def stops(run: Run, extra: Tensor, width: Tensor, only_last: bool = False) -> Tensor:
    """Whether each text, with ``extra`` tokens behind it, ends with each of the first ``width`` of them.

    Args:
        extra: [T, E] for the T texts of the run, one or N a request.
        width: [B], at most E.
        only_last: ask only for the last of these.

    Returns:
        [T, E] bool.

    Raises:
        GenerationError: without a partial result, when a stopping criterion raises or gives no answer for each row.
    """
    found = torch.zeros(extra.shape, dtype=torch.bool, device=extra.device)
    stop, count, generated = run.request.stop, extra.shape[1], run.p.state.generated
    if stop is None:
        return found
    start, per_request = time.perf_counter(), len(extra) // len(width)
    rows = run.request.rows(per_request)
    for group, text in by_count(run.request, run.p.tokens, generated, extra):
        for wide in width[group].unique().tolist():
            asked = (group & (width == wide)).repeat_interleave(per_request)
            for t in range(wide - 1 if only_last else 0, wide):
                shown = text[asked, : text.shape[1] - count + t + 1]
                found[asked, t] = ask(stop, shown, Rows(rows.request[asked], rows.padding[asked]))
    run.stats.rules_seconds += time.perf_counter() - start
    return found


def ask(stop: Stop, text: Tensor, rows: Rows) -> Tensor:
    """Whether each text [R, L] ends with its last token: [R]. Raises as ``stops``."""
    try:
        answer = torch.zeros(len(text), dtype=torch.bool, device=text.device)
        answer[:] = stop(text, rows)
    except Exception as error:
        raise GenerationError(
            "a stopping criterion broke off the generation",
            f"it raised {type(error).__name__}: {error}",
            "a criterion takes (input_ids [rows, length], scores=None) and returns a bool for each row; "
            "error.partial holds what was generated before",
        ) from error
    return answer
