"""Lengths of the text at which the step may take another branch than the one that was traced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from smc_compile.errors import CacheError
from smc_compile.passes.capture.called_and_traced import called_and_traced
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
        try:
            both = called_and_traced(step, lm, ids[:, :length], weights, explicit)
        except RuntimeError as error:
            raise _branches(length, f"the traced branch fails: {str(error).splitlines()[0]}") from error
        if both is None and length > traced:
            return replace(lm, max_positions=length - 1)
        if both is not None and both.differ:
            raise _branches(length, "the traced branch computes something else")
    return lm


def _branches(length: int, why: str) -> CacheError:
    return CacheError(
        "the model takes another branch for some lengths of the text",
        f"at {length} positions {why}",
        "make the forward tensor code without a Python branch on ids.shape (masks and windows by comparing positions)",
    )
