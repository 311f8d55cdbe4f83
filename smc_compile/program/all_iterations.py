"""Whether three iterations of a loop stand for all that a call asks for, and what is traced to find out.

Two things may change with the iteration: what the function does, and, with the length of the text, what its models do.

- The function: `even_loops` reads it. Where that leaves a doubt, all iterations are traced, the models in them opaque.
- The models: Dynamo's guards say up to which length a trace of three iterations holds. Beyond it, three iterations of a
  longer text are traced. They must show the same step, or a window: the same step on the last tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from smc_compile.errors import LoopError
from smc_compile.passes.loop.recover import DecodeLoop
from smc_compile.passes.loop.windows import SHORTEST
from smc_compile.program.even_loops import Doubt
from smc_compile.program.rehearsal import Rehearsal, Rehearsed, unlike

MOST_BRANCHES = 8  # on the length of the text, after each of which a longer text is traced
PINNED = Doubt("Dynamo traced the loop for one length of the prompt only")
COUNTED = "draw as many tokens as the argument says that counts them"
RETURN = "return prompt + tokens, or all tokens"


@dataclass(frozen=True)
class Traces:
    """How a loop is traced for one call.

    Attributes:
        few: a few iterations with a prompt of so many tokens, whose length is a symbol to Dynamo.
        all: (tokens of the prompt, iterations) -> all iterations; models are one node each where that can be.
        inlined: the same with the models traced.
        outputs: what a loop of three iterations returns after as many as are asked for.
        nodes: whether models are one node each in all traces. They are looked at by themselves then.
    """

    few: Callable[[int], Rehearsed]
    all: Callable[[int, int], Rehearsed]
    inlined: Callable[[int, int], Rehearsed]
    outputs: Callable[[DecodeLoop], object]
    nodes: bool


def check_all_iterations(
    rehearsal: Rehearsal, traces: Traces, found: Rehearsed, doubt: Doubt | None, iterations: int, length: int
) -> int | None:
    """Make sure that three iterations stand for all.

    Args:
        found: three iterations of this call.
        doubt: why the function may do something else in another iteration.
        length: of the prompt.

    Returns:
        How many tokens the models read at most, if texts become longer than that; None if they read all.

    Raises:
        LoopError: an iteration does something else than the first three.
    """
    loop, reach = found.loop, length + iterations - 1  # the longest text that is read
    if loop.cached is not None:  # how it goes on with other lengths is checked by its guards
        if doubt or not loop.any_length:
            _compare_all(rehearsal, traces, found, doubt or PINNED, iterations, length, traces.inlined)
        return None
    window, seen = loop.window, found
    if window is None and not loop.any_length and length == 1:  # one token is a case of its own to Dynamo
        seen = traces.few(loop.iterations + 1)
        window = seen.loop.window
        if window is None:
            rehearsal.agree(found, seen, PINNED)
    if window is None and not seen.loop.any_length:  # lengths are numbers that leave no guards
        doubt = doubt or PINNED
    if doubt and iterations != loop.iterations:
        whole = _compare_all(rehearsal, traces, found, doubt, iterations, length, traces.all)
        window = whole.loop.window if window is None else window
    if window is None:
        window = _window_of_longer(rehearsal, traces, seen, iterations, length)
    if window is not None:
        _check_window(rehearsal, traces, window, reach, loop.iterations)
    return window


def before_window(window: int, iterations: int) -> int:
    """The longest prompt with which so many iterations read less than the window.

    Raises:
        LoopError: the window is too short.
    """
    if window < max(SHORTEST, iterations):
        raise LoopError(
            "A window of the text is too short.",
            f"the model reads the last {window} tokens; {iterations} iterations are traced, which must fit in",
            f"let the model read {iterations} tokens or more",
        )
    return max(1, window - iterations)


def _compare_all(
    rehearsal: Rehearsal,
    traces: Traces,
    found: Rehearsed,
    doubt: Doubt,
    iterations: int,
    length: int,
    trace: Callable[[int, int], Rehearsed],
) -> Rehearsed:
    """All iterations, which are like three of them."""
    alone = iterations == 1 and doubt is not PINNED and found.loop.window is None
    whole = trace(length, 1 if alone else max(iterations, 2))
    if (iterations > 1 or alone) and whole.loop.iterations != iterations:
        raise unlike(doubt, f"it draws {whole.loop.iterations} tokens, and {iterations} were counted", COUNTED)
    if (iterations > 1 or alone) and whole.loop.outputs != traces.outputs(found.loop):
        raise unlike(doubt, f"after {iterations} iterations the result is {whole.loop.outputs}", RETURN)
    window = whole.loop.window
    if window is None:
        rehearsal.agree(trace(length, found.loop.iterations), whole, doubt)
    else:
        filling = before_window(window, found.loop.iterations) + 1  # the last iteration fills the window
        rehearsal.agree(trace(filling, found.loop.iterations), whole, doubt)
    return whole


def _window_of_longer(
    rehearsal: Rehearsal, traces: Traces, seen: Rehearsed, iterations: int, length: int
) -> int | None:
    """The window that begins behind a branch on the length, if one does before the end; None if nothing changes."""
    few, reach = seen.loop.iterations, length + iterations - 1
    for _ in range(MOST_BRANCHES):
        if not seen.loop.any_length:
            return _window_of_last(rehearsal, traces, seen, iterations, length)
        if seen.loop.longest is None or reach < seen.loop.longest + few:
            return None
        doubt = Doubt(f"the loop goes another way where the text is longer than {seen.loop.longest + few - 1} tokens")
        try:
            later = traces.few(seen.loop.longest + few)
        except LoopError as error:
            raise unlike(doubt, error.why or error.what) from error
        if later.loop.window is not None:
            return later.loop.window
        rehearsal.agree(seen, later, doubt)
        seen = later
    raise unlike(doubt, f"and so {MOST_BRANCHES} times")


def _window_of_last(rehearsal: Rehearsal, traces: Traces, seen: Rehearsed, iterations: int, length: int) -> int | None:
    """The window in the last iterations. Without one they must be like those that were seen.

    Dynamo knows the lengths as numbers here: which branches a model has on them is not known.
    """
    if not traces.nodes:
        return _compare_all(rehearsal, traces, seen, PINNED, iterations, length, traces.inlined).loop.window
    last = traces.few(max(length + iterations - seen.loop.iterations, 1))
    if last.loop.window is not None:
        return last.loop.window
    try:
        rehearsal.agree(seen, last, PINNED)
    except LoopError:  # an integer may stand otherwise to a longer prompt
        _compare_all(rehearsal, traces, seen, PINNED, iterations, length, traces.inlined)
    return None


def _check_window(rehearsal: Rehearsal, traces: Traces, window: int, reach: int, few: int) -> None:
    """Make sure that all texts longer than the window are read alike, and as a text that fills it."""
    doubt = Doubt(f"the model reads the last {window} tokens only")
    shorter = before_window(window, few)
    base, full, longer = (traces.few(length) for length in (shorter, shorter + 1, window + 1))
    if longer.loop.window != window or base.loop.window is not None or full.loop.window is not None:
        raise unlike(doubt, f"of {window + 1} tokens it reads {longer.loop.window or 'all'}")
    ends = longer.loop.longest is not None and reach >= longer.loop.longest + few
    if ends:
        raise unlike(doubt, f"the loop goes another way beyond {longer.loop.longest}")
    if not longer.loop.any_length:  # lengths are numbers that leave no guards
        rehearsal.agree(longer, traces.few(max(window + 1, reach + 1 - few)), doubt)
    rehearsal.agree(base, full, doubt)
    rehearsal.agree(full, longer, doubt)


def with_window(loop: DecodeLoop, window: int | None) -> DecodeLoop:
    """The loop as it was in a call whose texts outgrew its window."""
    if window is None:
        return loop
    return replace(loop, window=window, report=[*loop.report, f"reads the last {window} tokens of longer texts"])
