"""How good the text of SMC is: its mean log-probability under the target, beside true samples of the target."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from torch import Tensor

from smc_compile.bench.contestants import LogitsFunction
from smc_compile.bench.figures import Row
from smc_compile.bench.measure import progress_bar
from smc_compile.generate import generate
from smc_compile.result import Generation

SCORED = ("autoregressive", "smc")
SCORING_BATCH = 64  # requests drawn at once
TEXT_TITLES = {
    "eager": "plain loop, eager",
    "autoregressive": "compiled loop",
    "speculative": "exact speculation",
    "smc": "SMC",
}


@dataclass(frozen=True)
class Score:
    """Mean log-probability of a token under the target, over independent sequences; ``kl`` is that of
    ``kl_bound_per_token``, in nats."""

    mean: float
    stderr: float
    sequences: int
    kl: float = 0.0


Scores = dict[str, Score]


@torch.no_grad()
def sequence_log_probs(model: LogitsFunction, sequences: Tensor, prompt_length: int, temperature: float) -> Tensor:
    """Mean log-probability of the new tokens of each sequence [M, P+n] -> [M], under softmax(logits / temperature)."""
    means = []
    for ids in sequences.split(16):
        logits = model(ids[:, :-1])[:, prompt_length - 1 :].float()  # the last prompt token predicts the first new one
        log_p = (logits / temperature).log_softmax(-1)
        means.append(log_p.gather(-1, ids[:, prompt_length:, None])[..., 0].mean(-1))
    return torch.cat(means)


def score_methods(
    target: LogitsFunction, draft: LogitsFunction, ids: Tensor, options: argparse.Namespace, console: Console
) -> Scores:
    """Draw independent sequences with the one-token loop (true target samples) and with SMC, score both.

    Many requests go in one batch, uncompiled: request b draws what it would draw alone with seed + b. Every sequence
    has the full length: text after an end mark counts on both sides.
    """
    scores = {}
    with progress_bar(console) as progress, torch.compiler.set_stance("force_eager"):
        for index, method in enumerate(SCORED):
            task = progress.add_task(f"sampling {TEXT_TITLES[method]}", total=options.samples)
            values: list[Tensor] = []
            bounds: list[Tensor] = []
            for size in batch_sizes(options.samples):
                seed = options.seed + 1_000_000 * (index + 1) + sum(map(len, values))
                drawn = sample_batch(target, draft, ids.expand(size, -1), method, seed, options)
                values.append(sequence_log_probs(target, drawn.sequences, ids.shape[1], options.temperature))
                bounds.append(drawn.kl_bound_per_token)
                progress.advance(task, size)
            scores[method] = replace(summarise(torch.cat(values)), kl=float(torch.cat(bounds).mean()))
    return scores


def batch_sizes(samples: int) -> list[int]:
    """Full batches, and a last one that may be smaller."""
    full, rest = divmod(samples, SCORING_BATCH)
    return [SCORING_BATCH] * full + ([rest] if rest else [])


def sample_batch(
    target: LogitsFunction, draft: LogitsFunction, ids: Tensor, method: str, seed: int, options: argparse.Namespace
) -> Generation:
    """Independent sequences after the prompts ids [B, P]."""
    return generate(
        target,
        draft,
        ids,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        n_particles=options.n_particles,
        lookahead=options.lookahead,
        seed=seed,
        method=method,
        compiler="eager",
        validate=False,
    )


def summarise(values: Tensor) -> Score:
    """Mean and its standard error."""
    return Score(float(values.mean()), float(values.std() / values.numel() ** 0.5), values.numel())


def add_scores(rows: Sequence[Row], scores: Scores) -> list[Row]:
    """Rows with the mean log-probability and the bound filled in where they were measured; exact methods have none."""
    told = {
        method: {"mean_log_prob": score.mean, "mean_log_prob_stderr": score.stderr, "kl_per_token": score.kl}
        for method, score in scores.items()
    }
    exact = {"kl_per_token": 0.0}
    return [{**row, **told.get(row["method"], {} if row["method"] == "eager" else exact)} for row in rows]
