"""Results of a measurement with made-up seconds."""

from __future__ import annotations

import io

import torch
from helpers.generations import generation
from rich.console import Console

from smc_compile.bench import measure
from smc_compile.result import Generation, Stats

COLUMNS = {
    "method", "n_particles", "lookahead", "tokens", "repeats", "tokens_per_second", "tokens_per_second_min",
    "tokens_per_second_max", "speedup_over_eager", "speedup_over_autoregressive", "ms_per_cycle",
    "bound_ms_per_cycle", "share_of_bound", "share_of_bandwidth", "share_of_arithmetic", "mean_accepted", "peak_bytes",
    "prefill_share", "draft_share", "score_share", "resample_share",
    "host_share", "mean_ess", "mean_log_prob", "mean_log_prob_stderr", "compile_seconds", "first_call_seconds",
    "note", "kl_per_token", "max_divergence",
}  # fmt: skip


def fake_results(seconds: dict[str, list[float]]) -> list[measure.Result]:
    """Results of methods with the given seconds a round."""
    results = []
    for method, times in seconds.items():
        n, k = {"smc": (4, 3), "speculative": (1, 3)}.get(method, (None, None))
        contestant = measure.Contestant(method, lambda seed: torch.zeros(1, 1), 12, n, k)
        text, steps = torch.zeros(1, 14, dtype=torch.int64), 3 if method in ("smc", "speculative") else 12
        runs = [measure.TimedCall(t, 0.0, text, fake_generation(method, t), steps, 10**9) for t in times]
        results.append(measure.Result(contestant, runs[0], runs))
    return results


def fake_generation(method: str, seconds: float) -> Generation | None:
    if method not in ("autoregressive", "speculative", "smc"):
        return None
    stats = Stats(
        method, 12, cycles=3, seconds=seconds, prefill_seconds=seconds / 4, draft_seconds=seconds / 2, accepted=2.5
    )
    shape = torch.zeros(1, 4, 14, dtype=torch.int64)
    ess = torch.tensor([[1.0, 2.0, 3.0]])
    return generation(
        sequences=shape[:, 0],
        particles=shape,
        log_weights=torch.zeros(1, 4),
        log_evidence=torch.zeros(1),
        ess=ess,
        ancestors=shape[:, :3, :4],
        stats=stats,
    )


def rendered(renderable: object, width: int = 100) -> str:
    """What a terminal shows."""
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]
