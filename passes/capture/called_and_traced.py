"""A step and its trace on one text: what a call gives, and what the graph gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from smc_compile.passes.capture.untouched import untouched
from smc_compile.passes.closeness import allowed_error, coarsest_dtype, relative_error
from smc_compile.passes.ir import CausalLM


@dataclass(frozen=True)
class Both:
    """The results of a call and of the trace.

    Attributes:
        dtype: the coarsest that took part.
    """

    called: Tensor
    traced: Tensor
    dtype: torch.dtype

    @property
    def differ(self) -> bool:
        return relative_error(self.traced, self.called) > allowed_error(self.dtype)


def called_and_traced(
    step: nn.Module, lm: CausalLM, text: Tensor, weights: Sequence[Tensor], explicit: Sequence[Tensor], seed: int = 0
) -> Both | None:
    """What ``step`` and ``lm`` give for a text [B, S] with the same random numbers; None where ``step`` itself fails.

    Args:
        weights: those of ``lm``: the step's own and the explicit ones.
        explicit: those that ``step`` is called with.

    Raises:
        RuntimeError: the trace fails.
    """
    with torch.no_grad(), torch.random.fork_rng(), untouched(step):
        torch.manual_seed(seed)
        try:
            called = step.forward(text, *explicit)  # a call of a graph module would print what fails in it
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError):
            return None
        torch.manual_seed(seed)
        traced = fx.Interpreter(lm.graph_module).run(*lm.arguments(text, weights))[0]
    return Both(called, traced, coarsest_dtype([*weights, called]))
