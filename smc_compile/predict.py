"""Predicted and measured costs of a pair side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smc_compile.cost_model import cycle_model
from smc_compile.generate import generate, program_for
from smc_compile.options import Options
from smc_compile.processors import sort_processors
from smc_compile.runtime.room import capacity_of


@dataclass(frozen=True)
class Row:
    """One N and K at P prompt and S suffix positions; milliseconds of a cycle."""

    n_particles: int
    lookahead: int
    prompt: int
    suffix: int
    predicted_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted_ms / self.measured_ms - 1


@dataclass(frozen=True)
class Validation:
    """A sweep, and for each N the K with the most tokens a second, as predicted and as measured."""

    rows: tuple[Row, ...]

    @property
    def picks(self) -> dict[int, tuple[int, int]]:
        """N -> (K predicted best, K measured best)."""

        def best(n: int, column: str) -> int:
            mine = [row for row in self.rows if row.n_particles == n]
            return max(mine, key=lambda row: (row.lookahead + 1) / getattr(row, column)).lookahead

        return {
            n: (best(n, "predicted_ms"), best(n, "measured_ms")) for n in sorted({row.n_particles for row in self.rows})
        }


def predict(
    target: nn.Module,
    draft: nn.Module,
    ids: Tensor,
    *,
    max_new_tokens: int,
    shapes: Sequence[tuple[int, int]],
    temperature: float = 1.0,
) -> list[float]:
    """Seconds of a cycle of ``smc_compile.generate`` for each (N, K) of ``shapes``, without running or compiling any.

    Args:
        ids: prompts [B, P]; only their shape counts.

    Raises:
        OptionError, CacheError: as ``smc_compile.cost_model.cycle_model``.
    """
    options = Options.parse({"draft": draft})
    processors = sort_processors((), ["temperature"], 0, device=ids.device)
    program = program_for(target, processors, temperature == 0, options, ids)
    costs = cycle_model(program.target, program.draft)
    batch, prompt = ids.shape
    return [costs.cycle_seconds(n, k, prompt, capacity_of(max_new_tokens, k + 1), batch) for n, k in shapes]


def validate(
    target: nn.Module,
    draft: nn.Module,
    ids: Tensor,
    *,
    max_new_tokens: int,
    shapes: Sequence[tuple[int, int]],
    temperature: float = 1.0,
    repeats: int = 3,
    compiler: str = "inductor",
) -> Validation:
    """Predict, then run each (N, K) of ``shapes`` once to compile and ``repeats`` times; the fastest run counts.

    Measured as ``smc-compile bench`` does: wall-clock of a generation without prefill and compilation, for each cycle.
    """
    predicted = predict(target, draft, ids, max_new_tokens=max_new_tokens, shapes=shapes, temperature=temperature)
    rows = []
    for (n, k), seconds in zip(shapes, predicted, strict=True):
        measured = math.inf
        for seed in range(repeats + 1):
            stats = generate(
                target,
                draft,
                ids,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                n_particles=n,
                lookahead=k,
                seed=seed,
                compiler=compiler,
            ).stats
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if seed:
                measured = min(measured, (stats.seconds - stats.prefill_seconds) / max(stats.cycles, 1))
        rows.append(Row(n, k, ids.shape[1], capacity_of(max_new_tokens, k + 1), 1e3 * seconds, 1e3 * measured))
    return Validation(tuple(rows))
