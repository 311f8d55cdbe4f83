"""A decode loop traced whole: where three iterations need not stand for all others.

`even_loops.find_doubt` reads a loop's source, and Dynamo's guards say up to which length of the text its trace holds.
Where these leave a doubt, all iterations of the call at hand are traced and compared with the three, the models in them
as one node each. That costs some 20 ms an iteration, once for a number of iterations and a length of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from smc_compile.errors import LoopError, SMCError
from smc_compile.passes.loop.recover import DecodeLoop
from smc_compile.program.capture import Capture, CapturedCall
from smc_compile.program.even_loops import Doubt
from smc_compile.program.loop_finder import LoopFinder, step_text
from smc_compile.program.opaque_models import Opaque, opaque

KEPT = 64  # traces, after which all are forgotten
FIX = "make every iteration do the same, or split the run: one call for each of its parts"
NO_LOOP = "with all its iterations the function holds no loop"
Trace = Callable[[Capture], CapturedCall | None]  # captures the loop with some arguments


class Rehearsal:
    """The traces of one function with all its iterations, and which of them were found to agree with three."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._forget()

    def _forget(self) -> None:
        self._capture, self._traces = Capture(self._function), 0
        self._agreed: WeakKeyDictionary[LoopFinder, dict[tuple[Any, ...], DecodeLoop]] = WeakKeyDictionary()

    def check(self, short: Trace, whole: Trace, models: Sequence[nn.Module] | None, doubt: Doubt) -> DecodeLoop:
        """Compare all iterations of a call with those of a short one; the loop that all of them are.

        Args:
            short, whole: trace the loop with three iterations, and with as many as are asked for.
            models: those that become one node each; None traces them too.

        Raises:
            LoopError: an iteration does something else than the first three.
        """
        while True:
            learned = Opaque.structures
            try:
                with opaque(models or ()), more_traces():
                    first, all_of_it = short(self._capture), whole(self._capture)
                break
            except Exception:
                if Opaque.structures == learned:
                    raise
        if first is None or all_of_it is None:
            raise _differs(doubt, NO_LOOP)
        loop = self._compare(first, all_of_it, doubt)
        if all_of_it.finder.recoveries == 1:
            self._traces += 1
        if self._traces > KEPT:
            self._forget()
        return loop

    def _compare(self, first: CapturedCall, whole: CapturedCall, doubt: Doubt) -> DecodeLoop:
        agreed = self._agreed.setdefault(whole.finder, {})
        sizes = (id(first.finder), *(tuple(v.shape) if isinstance(v, torch.Tensor) else v for v in whole.arguments))
        if sizes in agreed:
            return agreed[sizes]
        try:
            loops = [call.finder.loop_for(call.arguments) for call in (first, whole)]
        except SMCError as error:
            raise _differs(doubt, error.why or error.what, error) from error
        short, long = loops
        if short is None or long is None:
            raise _differs(doubt, NO_LOOP)
        if long.cached is not None:
            long.check(whole.arguments)
        difference = _difference(step_and_inputs(short, first.finder), step_and_inputs(long, whole.finder))
        if difference:
            raise _differs(doubt, difference)
        agreed[sizes] = long
        return long


def more_traces() -> Any:
    """Inside, Dynamo traces one function as often as it is asked to."""
    return torch._dynamo.config.patch(recompile_limit=10 * KEPT, accumulated_recompile_limit=100 * KEPT)


def step_and_inputs(loop: DecodeLoop, finder: LoopFinder) -> list[str]:
    """One iteration in lines, each of its inputs by name."""
    return [*finder.input_names(loop), *step_text(loop.step.graph).splitlines(), str(loop.fixed_floats)]


def _difference(short: Sequence[str], long: Sequence[str]) -> str:
    pairs = zip(short, long, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(short), len(long)))
    if list(short) == list(long):
        return ""
    ends = [lines[at] if at < len(lines) else "nothing" for lines in (short, long)]
    return f"with three iterations one of them computes `{ends[0]}`, with all of them `{ends[1]}`"


def _differs(doubt: Doubt, why: str, error: SMCError | None = None) -> LoopError:
    return LoopError(
        "The iterations of the decode loop are not alike, so it cannot be compiled as one step.",
        f"{doubt}: {why}",
        (error.fix if error is not None else "") or FIX,
    )
