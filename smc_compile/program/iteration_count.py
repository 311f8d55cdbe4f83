"""Which argument of a decode loop counts its iterations, found from traces with different values of the arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from smc_compile.errors import InputError, LoopError, SMCError
from smc_compile.passes.loop.recover import DecodeLoop, OutputLayout
from smc_compile.program.loop_finder import step_text

PROBE = 3  # iterations that are traced: two would do for an affine fit, the third checks it
CHECK = 2  # iterations of the second trace, which must show the same step

# (name of an argument, value) -> the loop that a trace with this value shows, why it fails, or None without a loop
Look = Callable[[str, int], DecodeLoop | SMCError | None]


@dataclass(frozen=True)
class IterationCount:
    """How the iterations of a loop follow from one of its arguments.

    Attributes:
        name: of the argument.
        is_total: whether it is a total length, which counts the prompt too.
        extra: tokens that the loop draws besides: 1 if one is drawn before the loop.
        fillers: for each output of the loop, the token that fills it up where its length is always the same; None where
            it grows with the iterations.
    """

    name: str
    is_total: bool = False
    extra: int = 0
    fillers: tuple[int | None, ...] = ()

    def value(self, iterations: int, prompt_length: int) -> int:
        """The argument with which the loop is traced for so many iterations, those of ``extra`` apart."""
        return iterations + (prompt_length if self.is_total else 0)

    def iterations(self, asked: Any, prompt_length: int) -> int:
        """How many tokens a call draws whose argument is ``asked``.

        Raises:
            InputError: it is no integer, or leaves no token to draw.
        """
        integer = isinstance(asked, int) and not isinstance(asked, bool)
        iterations = asked - self.value(0, prompt_length) + self.extra if integer else 0
        if iterations < 1:
            raise InputError(
                f"{self.name} asks for no tokens", f"{self.name}={asked!r}", "ask for at least one new token"
            )
        return iterations

    def stretched(self, loop: DecodeLoop, iterations: int) -> DecodeLoop:
        """The traced loop with the outputs that it has after ``iterations`` iterations.

        Raises:
            InputError: the tokens do not fit an output whose length is always the same.
        """
        more = iterations - loop.iterations
        outputs = [_stretched(*pair, more, loop) for pair in zip(loop.outputs, self.fillers, strict=True)]
        return replace(loop, outputs=tuple(outputs))


def find_iteration_count(names: Sequence[str], prompt_length: int, look: Look, alike: bool = True) -> IterationCount:
    """Which of the integer arguments ``names`` counts the iterations, which must be ``alike`` for any number of them.

    An argument counts them if the traced loop has as many iterations as the argument says. First each is taken as a
    number of new tokens, then as a total length, and then as a number to which a token before the loop is added.

    Raises:
        LoopError: none counts them, or the one that does also takes part in what an iteration computes.
        SMCError: no trace shows a loop; the first reason is given.
    """
    looks = []
    for count in [IterationCount(name, is_total) for is_total in (False, True) for name in names]:
        found = look(count.name, count.value(PROBE, prompt_length))
        if isinstance(found, DecodeLoop) and found.iterations == PROBE:
            return confirmed(count, found, look(count.name, count.value(CHECK, prompt_length)), alike)
        looks.append((count, found))
    for count, found in looks:
        if isinstance(found, DecodeLoop) and found.iterations == PROBE + 1:
            other = look(count.name, count.value(CHECK, prompt_length))
            if isinstance(other, DecodeLoop) and other.iterations == CHECK + 1:
                return confirmed(replace(count, extra=1), found, other, alike)
    for _, found in looks:
        if isinstance(found, SMCError):
            raise found
    raise LoopError(
        "no argument counts the iterations of the loop",
        f"integer arguments: {', '.join(names) or 'none'}",
        "take the number of new tokens as an integer argument, or name it: decode(trip_count='n')",
    )


def confirmed(
    count: IterationCount, found: DecodeLoop, other: DecodeLoop | SMCError | None, alike: bool = True
) -> IterationCount:
    """The count with its fillers, if ``found`` after PROBE and ``other`` after CHECK iterations have the same step.

    Without ``alike`` the steps may differ.

    Raises:
        LoopError: what an iteration computes depends on the number of iterations.
        SMCError: ``other``, if it is one.
    """
    if isinstance(other, SMCError):
        raise other
    iterations = other.iterations if other is not None else 0
    counted = iterations == CHECK + count.extra
    same = other is not None and (not alike or step_text(other.step.graph) == step_text(found.step.graph))
    if other is None or not counted or not same:
        differs = ", and what an iteration computes differs" if counted else ""
        raise LoopError(
            f"argument {count.name!r} does not only count iterations",
            f"with {count.name}={PROBE} the loop has {found.iterations} iterations, with {CHECK} {iterations}{differs}",
            "keep the number of new tokens out of the sampling, or name the right argument: decode(trip_count='n')",
        )
    return replace(count, fillers=tuple(_filler(*pair) for pair in zip(found.outputs, other.outputs, strict=True)))


def _filler(layout: OutputLayout | None, shorter: OutputLayout | None) -> int | None:
    """What fills up an output that has ``layout`` after PROBE iterations and ``shorter`` after CHECK; None if it grows.

    Raises:
        LoopError: it changes in another way.
    """
    if layout == shorter or layout is None or shorter is None:
        return None
    if layout != replace(shorter, padding=shorter.padding[PROBE - CHECK :]):
        raise LoopError(
            "an output of the loop changes with the number of iterations in other ways than by its tokens",
            f"after {PROBE} iterations it is {layout}, after {CHECK} {shorter}",
            "return prompt + tokens, or all tokens",
        )
    return shorter.padding[0]


def _stretched(layout: OutputLayout | None, filler: int | None, more: int, loop: DecodeLoop) -> OutputLayout | None:
    """An output after ``more`` iterations than were traced: tokens take the place of what fills it up."""
    if layout is None or filler is None:
        return layout
    if more > len(layout.padding):
        raise InputError(
            "the tokens do not fit the buffer of the loop",
            f"{loop.iterations + more} new tokens were asked for, and there is room for "
            f"{loop.iterations + len(layout.padding)}",
            "make the buffer longer, or ask for fewer tokens",
        )
    return replace(layout, padding=layout.padding[more:] if more > 0 else (filler,) * -more + layout.padding)
