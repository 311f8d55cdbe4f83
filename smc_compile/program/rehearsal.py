"""A decode loop traced whole: where three iterations need not stand for all others.

`even_loops.find_doubt` reads a loop's source, and Dynamo's guards say up to which length of the text its trace holds.
Where these leave a doubt, all iterations of the call at hand are traced and compared with the three, the models in them
as one node each. That costs some 20 ms an iteration, once for a number of iterations and a length of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from smc_compile.errors import LoopError, SMCError
from smc_compile.passes.fx_tools import user_line
from smc_compile.passes.loop.needs_value import UnlikeIterations
from smc_compile.passes.loop.recover import DecodeLoop
from smc_compile.program.capture import CapturedCall
from smc_compile.program.even_loops import Doubt
from smc_compile.program.loop_finder import LoopFinder, step_text
from smc_compile.program.opaque_models import learning
from smc_compile.program.written_code import Plain, Written

KEPT = 64  # traces, after which all are forgotten
ALIKE = (
    "let every iteration do the same, or split the run: one call for each of its parts. A window may be written as "
    "model(ids[:, -W:])"
)
NO_LOOP = "with all its iterations the function holds no loop"
Trace = Callable[[Plain | Written], CapturedCall | None]  # captures the loop with some arguments


@dataclass(frozen=True)
class Rehearsed:
    """A loop that was traced, and the finder that holds its graph."""

    loop: DecodeLoop
    finder: LoopFinder

    def step(self) -> tuple[str, ...]:
        """One iteration in lines, each input by its name."""
        lines = step_text(self.loop.step.graph).splitlines()
        return (*self.finder.input_names(self.loop), *lines, str(self.loop.fixed_floats))

    def line_of(self, at: int) -> str:
        """The user's line behind a line of ``step``, in words."""
        nodes = list(self.loop.step.graph.nodes)
        number = at - len(self.finder.input_names(self.loop))
        line = user_line(nodes[number]) if self.loop.window is None and 0 <= number < len(nodes) else ""
        return f", at {line}" if line else ""


class Rehearsal:
    """Traces of one function's code, and which of them were found to agree."""

    def __init__(self, code: Plain | Written) -> None:
        self._code = code
        self._forget()

    def _forget(self) -> None:
        self._own, self._loops = self._code.anew(), WeakSet[DecodeLoop]()
        self._agreed: WeakKeyDictionary[DecodeLoop, WeakSet[DecodeLoop]] = WeakKeyDictionary()

    def loop(self, trace: Trace, models: Sequence[nn.Module] | None, doubt: Doubt, alone: bool = False) -> Rehearsed:
        """The loop that a trace shows; the first failure of its iterations to be alike is an error.

        Args:
            models: those that become one node each; None traces them too.
            alone: whether it has one iteration.

        Raises:
            LoopError: the iterations differ.
        """
        if len(self._loops) > KEPT:
            self._forget()
        call = learning(models or (), lambda: trace(self._own))
        try:
            if call is None:
                raise LoopError(NO_LOOP)
            find = call.finder.loop_in_parts if alone else call.finder.loop_for
            found = find(call.arguments)
            if found is None:
                raise LoopError(NO_LOOP)
        except SMCError as error:
            raise unlike(doubt, error.why or error.what) from error
        if found.cached is not None:
            found.check(call.arguments)
        self._loops.add(found)
        return Rehearsed(found, call.finder)

    def agree(self, short: Rehearsed, long: Rehearsed, doubt: Doubt) -> None:
        """Require that two loops have one step, or one iteration where their window is full.

        Raises:
            LoopError: they differ.
        """
        if short.loop in self._agreed.setdefault(long.loop, WeakSet()):
            return
        if short.loop.cached is not None and long.loop.iterations == 1:  # one iteration shows no cache
            first = long.loop.prompt_length
            pair = short.loop.lines_at(first), long.loop.lines_at(first)
        elif long.loop.window is None:
            pair = short.step(), long.step()
        else:
            pair = short.loop.lines_at(long.loop.window), long.loop.lines_at(long.loop.window)
        if pair[0] != pair[1] or not pair[0]:
            raise unlike(doubt, _difference(*pair) + long.line_of(_first_off(*pair)))
        self._agreed[long.loop].add(short.loop)


def _first_off(short: Sequence[str], long: Sequence[str]) -> int:
    pairs = enumerate(zip(short, long, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(short), len(long)))


def _difference(short: Sequence[str], long: Sequence[str]) -> str:
    at = _first_off(short, long)
    ends = [lines[at] if at < len(lines) else "nothing" for lines in (short, long)]
    return f"in the first iterations one computes `{ends[0]}`, in later ones `{ends[1]}`"


def unlike(doubt: Doubt, why: str, fix: str = "") -> UnlikeIterations:
    """The error for iterations that differ: where that was to be feared, and how it shows."""
    return UnlikeIterations(
        "The iterations of the decode loop are not alike, so it cannot be compiled as one step.",
        f"{doubt}: {why}",
        fix or ALIKE,
    )
