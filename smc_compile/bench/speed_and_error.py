"""Speed against error: how fast each way to generate is, and how far its texts are from the target's law."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from smc_compile.bench.figures import Row
from smc_compile.bench.measure import Contestant, progress_bar
from smc_compile.bench.text_quality import batch_sizes, sequence_log_probs
from smc_compile.generate import generate
from smc_compile.result import Generation

SEEDS_APART = 1_000_000  # of texts whose error is measured, from those that are timed


@dataclass(frozen=True)
class Task:
    """What is generated: one prompt ids [1, P] for a pair."""

    target: nn.Module
    draft: nn.Module
    ids: Tensor
    max_new_tokens: int
    temperature: float

    def answer(self, requests: int, seed: int, **options: Any) -> Generation:
        """Independent texts of so many requests."""
        return generate(
            self.target,
            self.draft,
            self.ids.expand(requests, -1),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=seed,
            **options,
        )

    def answer_uncompiled(self, requests: int, seed: int, **options: Any) -> Generation:
        """The same by regions that run as they are."""
        with torch.compiler.set_stance("force_eager"):
            return self.answer(requests, seed, **options, compiler="eager", validate=False)


@dataclass(frozen=True)
class Error:
    """How far texts are from the target's law: means over independent ones, with their standard errors.

    Attributes:
        kl: nats a token, of ``kl_bound``; NaN where blocks were dropped.
        log_p: log-probability of a token under the target; true samples have the target's negative entropy.
        ess: effective particles at the end of a cycle; None for the exact methods.
        dropped: of these texts, how many lost a block whose particles would all have died.
    """

    kl: float
    kl_stderr: float
    log_p: float
    log_p_stderr: float
    ess: float | None
    dropped: int
    texts: int


def way(task: Task, options: dict[str, Any]) -> Contestant:
    """Generates with these options."""

    def run(seed: int) -> Generation:
        return task.answer(1, seed, **options)

    return Contestant(
        options["method"],
        run,
        task.max_new_tokens,
        options.get("n_particles"),
        options.get("lookahead"),
        max_divergence=options.get("max_divergence"),
    )


def errors(
    task: Task, contestants: Sequence[Contestant], settings: Sequence[dict[str, Any]], texts: int, console: Console
) -> dict[str, Error]:
    """The error of each, by name. Texts are drawn in large batches, uncompiled: a request draws what it would alone.

    ``"auto"`` decides for a batch as a whole, so its texts are drawn one by one.
    """
    found = {}
    with progress_bar(console) as progress:
        for contestant, options in zip(contestants, settings, strict=True):
            task_bar = progress.add_task(f"texts of {contestant.name}", total=texts)
            drawn: list[Generation] = []
            alone = contestant.method == "auto"
            draw = task.answer if alone else task.answer_uncompiled
            for size in [1] * texts if alone else batch_sizes(texts):
                drawn.append(draw(size, SEEDS_APART + sum(len(g.sequences) for g in drawn), **options))
                progress.advance(task_bar, size)
            found[contestant.name] = error_of(task, drawn)
            progress.remove_task(task_bar)
    return found


def error_of(task: Task, drawn: Sequence[Generation]) -> Error:
    """The error of independent texts."""
    kl = torch.cat([g.kl_bound_per_token for g in drawn])
    log_p = torch.cat(
        [sequence_log_probs(task.target, g.sequences, task.ids.shape[1], task.temperature) for g in drawn]
    ).double()
    weighted = [g.ess.nanmean() for g in drawn if g.stats.method in ("smc", "auto") and g.ess.numel()]
    return Error(
        kl=float(kl.mean()),
        kl_stderr=stderr(kl),
        log_p=float(log_p.mean()),
        log_p_stderr=stderr(log_p),
        ess=float(torch.stack(weighted).mean()) if weighted else None,
        dropped=sum(int((g.dropped > 0).sum()) for g in drawn),
        texts=len(kl),
    )


def stderr(values: Tensor) -> float:
    """Standard error of the mean."""
    return float(values.std() / len(values) ** 0.5)


def with_errors(rows: Sequence[Row], names: Sequence[str], found: dict[str, Error]) -> list[Row]:
    """Rows of speeds with the errors beside them, in the words of the JSON file."""
    return [
        {
            **row,
            "kl_per_token": found[name].kl,
            "kl_per_token_stderr": found[name].kl_stderr,
            "mean_log_prob": found[name].log_p,
            "mean_log_prob_stderr": found[name].log_p_stderr,
            "mean_ess": found[name].ess,
            "texts_with_dropped_blocks": found[name].dropped,
            "texts": found[name].texts,
        }
        for row, name in zip(rows, names, strict=True)
    ]


def best_within(rows: Sequence[Row], names: Sequence[str], floor: float) -> str:
    """The fastest whose error is at most ``floor`` nats a token."""
    told = zip(rows, names, strict=True)
    speeds = {name: row["tokens_per_second"] for row, name in told if row["kl_per_token"] <= floor}
    return max(speeds, key=lambda name: speeds[name], default="nothing")
