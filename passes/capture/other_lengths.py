"""Lengths of the text at which the step may take another branch than the one that was traced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from smc_compile.errors import CacheError
from smc_compile.passes.capture.untouched import untouched
from smc_compile.passes.closeness import allowed_error, coarsest_dtype, relative_error
from smc_compile.passes.ir import CausalLM


def check_other_lengths(
    step: nn.Module, lm: CausalLM, lengths: Sequence[int], weights: Sequence[Tensor], explicit: Sequence[Tensor]
) -> CausalLM:
    """``lm``, compared with ``step`` on texts of these lengths.

    Lengths beyond the positions of ``lm`` are left out: nobody may ask for them. Where ``step`` itself fails on a text
    longer than the traced one, its positions end there.

    Args:
        weights: those of ``lm``: the step's own and the explicit ones.
        explicit: those that ``step`` is called with.

    Raises:
        CacheError: when the two differ, or the graph cannot compute it.
    """
    lengths = [length for length in lengths if lm.max_positions is None or length <= lm.max_positions]
    longest, traced = max(lengths, default=0), lm.ids.meta["val"].shape[1].node.hint
    ids = torch.arange(lm.batch * longest).view(lm.batch, longest) % 2
    ids = ids.to(next((w.device for w in weights), ids.device))
    for length in lengths:
        text = ids[:, :length]
        with torch.no_grad(), torch.random.fork_rng(), untouched(step):
            torch.manual_seed(0)
            try:
                expected = step.forward(text, *explicit)  # a call of a graph module would print what fails in it
            except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError):
                if length > traced:
                    return replace(lm, max_positions=length - 1)
                continue
            torch.manual_seed(0)
            try:
                actual = fx.Interpreter(lm.graph_module).run(*lm.arguments(text, weights))[0]
            except RuntimeError as error:
                raise _branches(length, f"the traced branch fails: {str(error).splitlines()[0]}") from error
        if relative_error(actual, expected) > allowed_error(coarsest_dtype([*weights, expected])):
            raise _branches(length, "the traced branch computes something else")
    return lm


def _branches(length: int, why: str) -> CacheError:
    return CacheError(
        "the model takes another branch for some lengths of the text",
        f"at {length} positions {why}",
        "make the forward tensor code without a Python branch on ids.shape (masks and windows by comparing positions)",
    )
