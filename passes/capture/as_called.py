"""A step that does something else because it is traced: its trace is compared with calls of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smc_compile.errors import CacheError
from smc_compile.passes.capture.called_and_traced import called_and_traced
from smc_compile.passes.capture.sampler import OFF_IN_EVAL
from smc_compile.passes.closeness import NARROW
from smc_compile.passes.fx_tools import op_name
from smc_compile.passes.ir import CausalLM

LENGTH = 11  # of the texts: longer than the traced one
TEXTS = 5
ENOUGH = 3  # of them: if there is no difference in these, there is none
BY_ROUNDING = {False: 1, True: 2}  # tokens that may differ, in wide and in narrow dtypes


class TracedOtherwise(CacheError):
    """A step does something else because it is traced, in whatever way that is done."""


def check_as_called(step: nn.Module, lm: CausalLM, weights: Sequence[Tensor], explicit: Sequence[Tensor]) -> CausalLM:
    """``lm`` itself.

    Tokens that a step draws may differ by rounding, and may be the same by chance.

    Args:
        weights: those of ``lm``: the step's own and the explicit ones.
        explicit: those that ``step`` is called with.

    Raises:
        TracedOtherwise: a call gives another result than the trace.
    """
    if _noises(lm) > 1:  # traced, they may take their numbers in another order
        return lm
    length = min(LENGTH, lm.max_positions or LENGTH)
    device = next((weight.device for weight in weights), torch.device("cpu"))
    places = torch.arange(lm.batch * length, device=device).view(lm.batch, length)
    off: list[bool] = []
    while len(off) < (TEXTS if any(off) else ENOUGH):
        text = places // (len(off) + 1) % 2  # of tokens 0 and 1
        both = called_and_traced(step, lm, text, weights, explicit, seed=len(off))
        if both is None:
            return lm  # it says so itself when it is asked
        off.append(both.differ)
        if off.count(True) > (0 if both.called.is_floating_point() else BY_ROUNDING[both.dtype in NARROW]):
            raise TracedOtherwise(
                "the model computes something else while it is traced",
                f"of {length} tokens its trace gives another result than a call",
                "let the forward do the same, traced or not (torch.compiler.is_compiling, isinstance(length, int)), "
                "and with gradients or without (torch.is_grad_enabled)",
            )
    return lm


def _noises(lm: CausalLM) -> int:
    """How many ops are random. ``normal_functional`` counts twice: it has no tag that says so, and equal ones merge."""
    nodes = [node for node in lm.graph.nodes if op_name(node) not in OFF_IN_EVAL]
    tagged = [node for node in nodes if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())]
    return len(tagged) + 2 * sum(op_name(node) == "normal_functional" for node in nodes)
