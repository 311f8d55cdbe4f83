"""The order of the passes, in one place: step -> CausalLM -> sampler -> CachedLM -> validated."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from smc_compile.passes.cache.synthesize import synthesize_cache
from smc_compile.passes.capture.export_lm import OwnedWeights, export_lm
from smc_compile.passes.capture.sampler import Sampler, match_sampler
from smc_compile.passes.ir import CachedLM, CausalLM
from smc_compile.passes.lower.early_head import early_choice
from smc_compile.passes.lower.outline_layers import outline_layers
from smc_compile.passes.lower.skinny_products import skinny_linear
from smc_compile.passes.validate import validate


@dataclass(frozen=True)
class Traced:
    """A step after all passes.

    Attributes:
        sampler: what the step samples from; None when the step returns logits.
        error: largest relative difference between cached and original rows, None when not validated.
        seconds: time of each pass.
    """

    lm: CausalLM
    sampler: Sampler | None
    cached: CachedLM
    owned: OwnedWeights
    error: float | None
    seconds: dict[str, float] = field(default_factory=dict)


def trace_model(step: nn.Module, ids: Tensor, weights: Sequence[Tensor], check: bool, sampled: bool = True) -> Traced:
    """Run every pass on ``step(ids [B, S], *weights)``, which returns a draw, or logits [B, V] if not ``sampled``.

    Raises:
        CacheError, LoopError, ValidationError: from the pass that refuses.
    """
    seconds: dict[str, float] = {}
    start = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal start
        seconds[name], start = time.perf_counter() - start, time.perf_counter()

    lm, owned = export_lm(step, ids, weights)
    lap("export")
    sampler = None
    if sampled:
        lm, sampler = match_sampler(lm)
        lap("match_sampler")
    cached = skinny_linear(early_choice(synthesize_cache(lm)))
    lap("synthesize_cache")
    error = None
    if check:
        error = validate(lm, cached, [*owned(), *weights])
        lap("validate")
    cached = outline_layers(cached)
    lap("outline_layers")
    return Traced(lm, sampler, cached, owned, error, seconds)
