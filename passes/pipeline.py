"""All passes in their order, each with one input and one output type.

    step -> ExportedProgram -> CausalLM -> (CausalLM, Sampler) -> CachedLM

A value is verified after each pass that makes or changes it, where it can be (``CausalLM.verify``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from smc_compile.errors import SMCError
from smc_compile.passes.axes.infer import type_axes
from smc_compile.passes.cache.synthesize import synthesize_cache
from smc_compile.passes.capture import shape_only  # noqa: F401  (registers rewrites)
from smc_compile.passes.capture.decompositions import decompose
from smc_compile.passes.capture.export_lm import (
    OwnedWeights,
    causal_lm,
    export_step,
    fewest_positions,
    require_any_length,
    share_subexpressions,
    untraceable,
)
from smc_compile.passes.capture.length_bound import bound_length
from smc_compile.passes.capture.picked_rows import handle_all_rows
from smc_compile.passes.capture.sampler import Sampler, match_sampler
from smc_compile.passes.capture.short_texts import check_short_texts
from smc_compile.passes.ir import CachedLM, CausalLM
from smc_compile.passes.lower import skinny_products  # noqa: F401  (registers a rewrite)
from smc_compile.passes.lower.early_head import early_head
from smc_compile.passes.lower.outline_layers import outline_layers
from smc_compile.passes.rewrites import rewrite_cached, rewrite_captured
from smc_compile.passes.validate import validate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Traced:
    """A step after all passes.

    Attributes:
        sampler: what the step samples from; None when the step returns logits.
        owned: the weights that the step owns itself; they precede the explicit ones in ``lm.weights``.
        error: largest relative difference between cached and original rows, None when not validated.
        seconds: time of each pass.
    """

    lm: CausalLM
    sampler: Sampler | None
    cached: CachedLM
    owned: OwnedWeights
    error: float | None
    seconds: dict[str, float] = field(default_factory=dict)


class Passes:
    """Runs passes one after the other, and keeps the time of each by its name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        start = time.perf_counter()
        result = function(*inputs)
        if isinstance(result, CausalLM):
            result.verify()
        self.seconds[function.__name__] = time.perf_counter() - start
        return result


def trace_model(step: nn.Module, ids: Tensor, weights: Sequence[Tensor], check: bool, sampled: bool = True) -> Traced:
    """Run every pass on ``step(ids [B, S], *weights)``, which returns a draw, or logits [B, V] if not ``sampled``.

    Raises:
        CacheError, LoopError, ValidationError: from the pass that refuses.
    """
    passes = Passes()
    lm, owned = capture(step, ids, weights, passes)
    sampler = None
    if sampled:
        lm, sampler = passes.run(match_sampler, lm)
    cached = passes.run(synthesize_cache, lm)
    cached = passes.run(early_head, cached)
    cached = passes.run(rewrite_cached, cached)
    error = passes.run(validate, lm, cached, [*owned(), *weights]) if check else None
    cached = passes.run(outline_layers, cached)
    return Traced(lm, sampler, cached, owned, error, passes.seconds)


def capture(
    step: nn.Module, ids: Tensor, weights: Sequence[Tensor] = (), passes: Passes | None = None
) -> tuple[CausalLM, OwnedWeights]:
    """``step(ids [B, S], *weights) -> [B, ...]`` as a causal model, and the weights that the step owns itself.

    Raises:
        CacheError: when the step cannot be traced for a symbolic length, with the tracer's reason.
    """
    passes = passes or Passes()
    program = _exported(step, ids, weights, passes)
    owned = OwnedWeights(step, program)
    lm = require_any_length(passes.run(causal_lm, program))
    lm = passes.run(rewrite_captured, lm)
    lm = passes.run(share_subexpressions, lm)
    lm = passes.run(bound_length, lm)
    lm = passes.run(handle_all_rows, lm)
    passes.run(check_short_texts, step, lm, fewest_positions(program), [*owned(), *weights], weights)
    log.debug("captured step\n%s", lm.graph_module.print_readable(print_output=False))
    return lm, owned


def _exported(step: nn.Module, ids: Tensor, weights: Sequence[Tensor], passes: Passes) -> ExportedProgram:
    """The step as a functional program with a symbolic length."""
    try:
        return passes.run(decompose, passes.run(export_step, step, ids, weights))
    except SMCError:  # the step itself refused
        raise
    except Exception as error:  # the tracer raises many types; all mean the same to the user
        _refuse_what_pins_the_length(step, ids, weights)
        raise untraceable(error) from error


def _refuse_what_pins_the_length(step: nn.Module, ids: Tensor, weights: Sequence[Tensor]) -> None:
    """A recurrent op pins the length: trace for that one length and let the axis analysis name the op.

    Raises:
        CacheError: naming the op, if there is one, or why the step cannot be traced for one length either.
    """
    try:
        program = decompose(export_step(step, ids, weights, symbolic=False))
    except SMCError:
        raise
    except Exception as error:
        raise untraceable(error) from error
    type_axes(causal_lm(program))
