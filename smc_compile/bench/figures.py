"""The figures of a measurement: one row per contestant, in the words of the JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from smc_compile.bench.ceilings import Ceilings, arithmetic_share, bandwidth_share, least_seconds
from smc_compile.bench.measure import Result, TimedCall
from smc_compile.result import Generation

Row = dict[str, Any]
PARTS = ("prefill", "draft", "score", "resample", "host")
PARTS_OF = {  # the parts that a method spends time on
    "autoregressive": ("prefill", "score", "host"),
    "speculative": ("prefill", "draft", "score", "host"),
    "smc": PARTS,
    "auto": PARTS,
}


def make_rows(results: Sequence[Result], ceilings: Ceilings | None = None) -> list[Row]:
    """One row per contestant; None where a column does not apply."""
    return [make_row(result, results, ceilings) for result in results]


def make_row(result: Result, results: Sequence[Result], ceilings: Ceilings | None) -> Row:
    """The figures of one contestant. A step (``cycle``) is a cycle of SMC or speculation, else a token."""
    contestant, runs = result.contestant, result.runs
    speeds = [speed(result, round_) for round_ in range(len(runs))]
    generations = [run.generation for run in runs if run.generation is not None]
    return {
        "method": contestant.method,
        "n_particles": contestant.n_particles,
        "lookahead": contestant.lookahead,
        "max_divergence": contestant.max_divergence,
        "tokens": contestant.new_tokens,
        "repeats": len(runs),
        "tokens_per_second": median(speeds),
        "tokens_per_second_min": min(speeds),
        "tokens_per_second_max": max(speeds),
        "speedup_over_eager": speedup(result, results, "eager"),
        "speedup_over_autoregressive": speedup(result, results, "autoregressive"),
        **step_figures(result, ceilings),
        **{f"{part}_share": median_share(generations, part, contestant.method) for part in PARTS},
        "mean_accepted": mean_accepted(result),
        "mean_ess": mean_ess(generations) if contestant.method == "smc" else None,
        "peak_bytes": max((run.peak_bytes for run in runs if run.peak_bytes is not None), default=None),
        "kl_per_token": mean_kl(generations),
        "mean_log_prob": None,
        "mean_log_prob_stderr": None,
        "compile_seconds": result.first.compile_seconds if result.first.generation else None,
        "first_call_seconds": result.first.seconds + result.first.compile_seconds,
        "note": contestant.note,
    }


def step_figures(result: Result, ceilings: Ceilings | None) -> Row:
    """Milliseconds of a step, and how near it is to what the device allows."""
    seconds = median(step_seconds(run) for run in result.runs)
    figures: Row = {
        "ms_per_cycle": 1e3 * seconds,
        "bound_ms_per_cycle": None,
        "share_of_bound": None,
        "share_of_bandwidth": None,
        "share_of_arithmetic": None,
    }
    passes = result.contestant.passes
    if passes and ceilings:
        bound = least_seconds(ceilings, passes)
        figures |= {
            "bound_ms_per_cycle": 1e3 * bound,
            "share_of_bound": bound / seconds,
            "share_of_bandwidth": bandwidth_share(ceilings, passes, seconds),
            "share_of_arithmetic": arithmetic_share(ceilings, passes, seconds),
        }
    return figures


def speed(result: Result, round_: int) -> float:
    """Tokens a second in one round."""
    return result.contestant.batch * result.contestant.new_tokens / result.runs[round_].seconds


def speedup(result: Result, results: Sequence[Result], over: str) -> float | None:
    """Median over rounds of the ratio to method ``over`` in the same round; None if it did not run."""
    base = next((other for other in results if other.contestant.method == over), None)
    if base is None:
        return None
    return median(speed(result, round_) / speed(base, round_) for round_ in range(len(result.runs)))


def step_seconds(run: TimedCall) -> float:
    """Seconds of one step, without prefill where that is timed apart."""
    prefill = run.generation.stats.prefill_seconds if run.generation else 0.0
    return (run.seconds - prefill) / run.steps


def median_share(generations: Sequence[Generation], part: str, method: str) -> float | None:
    """Share of ``part`` in the time of a generation; None where a method has no such part or does not time it, and
    where cycles were replayed."""
    if not generations or part not in PARTS_OF[method] or any(g.stats.replayed for g in generations):
        return None
    return median(getattr(g.stats, f"{part}_seconds") / max(g.stats.seconds, 1e-12) for g in generations)


def mean_accepted(result: Result) -> float | None:
    """Median over rounds of drafted tokens that became text, a cycle; None where nothing is rejected."""
    if result.contestant.method == "speculative":
        return median(run.generation.stats.accepted for run in result.runs if run.generation)
    if result.contestant.method == "assisted":  # a step gives one token more than it accepts
        return median(result.contestant.new_tokens / run.steps - 1 for run in result.runs)
    return None


def mean_kl(generations: Sequence[Generation]) -> float | None:
    """Nats a token by which the law of the timed texts may be off: the mean of ``kl_bound_per_token``."""
    if not generations:
        return None
    return float(torch.cat([g.kl_bound_per_token for g in generations]).double().mean()) + 0.0  # no -0.0


def mean_ess(generations: Sequence[Generation]) -> float | None:
    """Median over rounds of the mean over cycles; None if no cycle was needed."""
    means = [float(g.ess.double().mean()) for g in generations if g.ess.numel()]
    return median(means) if means else None
