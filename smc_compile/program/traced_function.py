"""A function that holds a decode loop, as Dynamo is shown it in one way, and the programs of its calls."""

from __future__ import annotations

import inspect
import logging
import types
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from smc_compile.errors import InputError, LoopError, SMCError
from smc_compile.options import Options
from smc_compile.passes.loop.needs_value import NeedsValue, UnlikeIterations
from smc_compile.passes.loop.recover import DecodeLoop
from smc_compile.program.all_iterations import PINNED, Traces, before_window, check_all_iterations
from smc_compile.program.capture import CapturedCall
from smc_compile.program.dynamo_refusals import FailedLoop, Untraceable, dynamo_errors, failed_loop
from smc_compile.program.even_loops import Doubt, find_doubt
from smc_compile.program.from_loop import LoopProgram, program_for
from smc_compile.program.iteration_count import PROBE, IterationCount, find_iteration_count
from smc_compile.program.loop_arguments import (
    mark_lengths,
    prompt_length,
    prompts,
    with_longer_prompts,
    with_prompts,
    with_value,
)
from smc_compile.program.loop_finder import LoopFinder, step_text
from smc_compile.program.reachable_models import reachable_models
from smc_compile.program.rehearsal import Rehearsal, Rehearsed
from smc_compile.program.written_code import Plain, Written, written_code

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ready:
    """A call whose program is compiled.

    Attributes:
        loop: that was found in few iterations.
        arguments: of its graph.
        iterations: that the call asks for.
        window: the most tokens that the model reads, if the text outgrows it.
        short: arguments with which Dynamo saw the loop.
        count: which of the arguments counts the iterations.
        parts: a program for each part of the loop, if its iterations are not all alike.
    """

    program: LoopProgram
    loop: DecodeLoop
    arguments: Sequence[Any]
    iterations: int
    window: int | None
    short: inspect.BoundArguments
    count: IterationCount
    parts: tuple[LoopProgram, ...] = ()


class TracedFunction:
    """A function that is traced in one way: its models are one node each, or traced with it.

    Attributes:
        code: the function, or its twin where Python in it needs the value of a token.
    """

    def __init__(self, function: types.FunctionType, options: Options, trip_count: str | None, nodes: bool) -> None:
        """
        Args:
            trip_count: the argument that counts the iterations; found by tracing when not given.
            nodes: whether models are nodes.
        """
        self._function, self._options, self._trip_count = function, options, trip_count
        self._nodes = nodes
        self.code: Plain | Written = Plain(function, nodes)
        self._count: IterationCount | None = None  # found at the first call
        self._in_parts = False  # whether the iterations were found to differ
        self._count_of_parts: IterationCount | None = None
        self._rehearsal = Rehearsal(self.code)
        self._doubts: WeakKeyDictionary[LoopFinder, Doubt | None] = WeakKeyDictionary()

    def ready(self, bound: inspect.BoundArguments, traced: inspect.BoundArguments) -> Ready:
        """The program of a call with the arguments ``bound``; ``traced`` are those that Dynamo sees.

        Raises:
            ShortPrompt: it should see longer prompts.
            SMCError: the loop cannot be compiled in this way.
        """
        if self._in_parts:
            return self._ready_in_parts(bound)
        try:
            return self._ready_by_either(bound, traced)
        except UnlikeIterations as error:
            if not self._nodes:  # all iterations, and the model in each
                raise
            log.info("the loop is compiled in parts: %s", error)
        ready = self._ready_in_parts(bound)
        self._in_parts = True
        return ready

    def _ready_by_either(self, bound: inspect.BoundArguments, traced: inspect.BoundArguments) -> Ready:
        """The program of a call, from the function or from its twin."""
        try:
            return self._ready_by_code(bound, traced)
        except (Untraceable, FailedLoop, NeedsValue) as error:
            self.take_twin(traced, error)
        return self._ready_by_code(bound, traced)

    def take_twin(self, traced: inspect.BoundArguments, error: SMCError, parts: bool = False) -> None:
        """Go on with the function's twin, whose iterations may differ if it is taken in ``parts``.

        Raises:
            SMCError: that cannot be compiled either. Where the function itself fails, that is its ``error``.
        """
        if isinstance(self.code, Written):
            raise error
        try:
            found = written_code(self._function, lambda code: self._find_count(code, traced, parts), self._nodes)
        except LoopError as other:
            raise (error if isinstance(error, FailedLoop) else other) from other
        if found is None:
            raise (error if isinstance(error, FailedLoop) else without_source(error)) from error
        self.code, count = found
        self._count, self._count_of_parts = (None, count) if parts else (count, None)
        self._rehearsal = Rehearsal(self.code)

    def _ready_by_code(self, bound: inspect.BoundArguments, traced: inspect.BoundArguments) -> Ready:
        if self._count is None:
            self._count = self._find_count(self.code, traced)
        call, found = self._captured(traced)
        if found.iterations != PROBE + self._count.extra:  # other arguments have a say in it too
            self._count = self._find_count(self.code, traced)
            call, found = self._captured(traced)
        iterations = self._count.iterations(bound.arguments[self._count.name], prompt_length(bound))
        if traced is not bound and found.cached is None:
            self._refuse_lengths_of_prompts(traced, found)
        check_longest(found, prompt_length(bound), iterations)
        self._count.stretched(found, iterations)  # refuses tokens that do not fit
        window = self._window(bound, traced, call, found, iterations)
        if window is not None and prompt_length(traced) > before_window(window, found.iterations):
            traced = with_prompts(bound, before_window(window, found.iterations))
            mark_lengths(traced)
            call, found = self._captured(traced)
        if window is not None and prompt_length(bound) + iterations - 1 <= window:
            window = None  # the text does not outgrow it
        program = program_for(found, call.arguments, self._options, window, call.states)
        arguments = call.arguments if traced is bound else with_prompt(call, found, bound)
        return Ready(program, found, arguments, iterations, window, self._counting(traced, PROBE), self._count)

    def _ready_in_parts(self, bound: inspect.BoundArguments) -> Ready:
        """The programs of a call whose iterations are not all alike: all of them are traced.

        Raises:
            SMCError: the parts cannot be compiled.
        """
        exact = with_prompts(bound, prompt_length(bound))
        try:
            return self._ready_in_parts_of_code(bound, exact)
        except (Untraceable, FailedLoop, NeedsValue) as error:
            self.take_twin(exact, error, parts=True)
        return self._ready_in_parts_of_code(bound, exact)

    def _ready_in_parts_of_code(self, bound: inspect.BoundArguments, exact: inspect.BoundArguments) -> Ready:
        if self._count_of_parts is None:
            self._count_of_parts = self._find_count(self.code, exact, parts=True)
        count = self._count_of_parts
        iterations = count.iterations(bound.arguments[count.name], prompt_length(bound))
        value = count.value(iterations - count.extra, prompt_length(bound))
        asked = with_value(exact, count.name, value)
        with dynamo_errors():
            call = self.code.captured(asked)
        loop = call.finder.loop_in_parts(call.arguments) if call is not None else None
        if call is None or loop is None or loop.iterations != iterations:
            raise LoopError("with all its iterations the function holds no loop")
        if loop.window is not None:
            raise LoopError(
                "A loop whose model reads the end of its text cannot be taken in parts.",
                f"the model reads the last {loop.window} tokens",
                "let every iteration do the same",
            )
        parts = loop.parts or (loop,)
        programs = tuple(program_for(part, call.arguments, self._options, None, call.states) for part in parts)
        loop = replace(loop, parts=parts)
        return Ready(programs[0], loop, call.arguments, iterations, None, asked, count, programs)

    def _captured(self, traced: inspect.BoundArguments, exact: bool = False) -> tuple[CapturedCall, DecodeLoop]:
        """The loop that Dynamo sees in a few iterations, ``exact``ly those of this prompt length or any."""
        with dynamo_errors():
            call = self.code.captured(self._counting(traced, PROBE))
        found = call.finder.loop_for(call.arguments, exact) if call is not None else None
        if call is None or found is None:
            raise LoopError("the function holds no decode loop", "no token is drawn and fed back")
        return call, found

    def _refuse_lengths_of_prompts(self, traced: inspect.BoundArguments, found: DecodeLoop) -> None:
        """A step that holds the length of the prompt it was ``traced`` with stands for no shorter one.

        Raises:
            LoopError: with a prompt of one token more the step is another; or there are other integers that might have
                been made longer.
        """
        _, longer = self._captured(with_longer_prompts(traced), exact=True)
        if len(prompts(traced)) > 1 or step_text(longer.step.graph) != step_text(found.step.graph):
            raise LoopError(
                "The prompt is too short to be told from the part of the text that the sampler reads.",
                "the loop was traced with a longer prompt, and what it computes may depend on the prompt's length",
                f"give a prompt of {found.prompt_length} tokens or more",
            )

    def _counting(self, arguments: inspect.BoundArguments, iterations: int) -> inspect.BoundArguments:
        """The arguments of a call that asks for so many iterations."""
        assert self._count is not None
        return with_value(arguments, self._count.name, self._count.value(iterations, prompt_length(arguments)))

    def _window(
        self,
        bound: inspect.BoundArguments,
        traced: inspect.BoundArguments,
        call: CapturedCall,
        found: DecodeLoop,
        iterations: int,
    ) -> int | None:
        """How many tokens the model reads at most, if the text of a call becomes longer than that.

        Raises:
            LoopError: not all iterations of the call are like the three that were traced.
        """
        assert self._count is not None
        count, rehearsal, doubt = self._count, self._rehearsal, self._doubt(traced, call, found)
        cached = found.cached is not None
        inlined = cached or call.writes or self._nodes  # or the code has its models as nodes anyway
        models = None if inlined else reachable_models(self._function, bound.arguments.values())

        def few(length: int) -> Rehearsed:
            longer, loop = self._captured(with_prompts(bound, length, marked=True), exact=True)
            return Rehearsed(loop, longer.finder)

        def everything(length: int, n: int, opaque: list[nn.Module] | None = models) -> Rehearsed:
            asked = traced if cached else with_prompts(bound, length)
            asked = self._counting(asked, n - count.extra)
            log.info("%d iterations are traced: %s", n, doubt)
            with dynamo_errors():
                return rehearsal.loop(lambda code: code.captured(asked), opaque, doubt or PINNED, n == 1)

        traces = Traces(
            few,
            everything,
            lambda length, n: everything(length, n, None),
            lambda loop: count.stretched(loop, iterations).outputs,
            self._nodes,
        )
        start = Rehearsed(found, call.finder)
        return check_all_iterations(rehearsal, traces, start, doubt, iterations, prompt_length(bound))

    def _doubt(self, traced: inspect.BoundArguments, call: CapturedCall, found: DecodeLoop) -> Doubt | None:
        """Why three iterations need not stand for all; it holds while Dynamo's guards hold."""
        if call.finder not in self._doubts:
            caches = [f"L['{name}']" for name, value in traced.arguments.items() if hasattr(value, "get_seq_length")]
            writes = [name for name in call.writes if not name.startswith(tuple(caches))]
            assert self._count is not None
            text, counter = next(iter(prompts(traced)), None), self._count.name
            read = find_doubt(self._function, traced.arguments, text, counter, isinstance(self.code, Written))
            written = Doubt(f"{writes[0]} is changed by the loop, which may read it") if writes else None
            self._doubts[call.finder] = written or read
        return self._doubts[call.finder]

    def _find_count(self, code: Plain | Written, bound: inspect.BoundArguments, parts: bool = False) -> IterationCount:
        """Trace the function with other values of its integer arguments; with ``parts``, iterations may differ."""
        integers = [name for name, value in bound.arguments.items() if type(value) is int]
        names = [self._trip_count] if self._trip_count is not None else integers

        def look(name: str, value: int) -> DecodeLoop | SMCError | None:
            changed = with_value(bound, name, value)
            try:
                with dynamo_errors():
                    call = code.captured(changed)
                if call is None:
                    return None
                finder, arguments = call.finder, call.arguments
                return finder.loop_in_parts(arguments) if parts else finder.loop_for(arguments)
            except Untraceable:  # so it is for other values
                raise
            except SMCError as error:
                return error
            except Exception as error:  # the user's own code, perhaps since the argument does not count iterations
                failed = failed_loop(error)
                failed.__cause__ = error
                return failed

        try:
            return find_iteration_count(names, prompt_length(bound), look, alike=not parts)
        except LoopError as error:
            other = without_prompt(bound) if type(error) is LoopError else None
            if other is None:
                raise
            raise other from error


def with_prompt(call: CapturedCall, loop: DecodeLoop, bound: inspect.BoundArguments) -> list[Any]:
    """The arguments of a call's graph with the first prompt of ``bound`` in the place of the one that was traced."""
    arguments = list(call.arguments)
    arguments[loop.prompt_index] = bound.arguments[prompts(bound)[0]]
    return arguments


# ---- refusals -------------------------------------------------------------------------------------------------------


def check_longest(loop: DecodeLoop, prompt: int, iterations: int) -> None:
    """Three iterations show only one path of a loop that takes another for long texts.

    Raises:
        InputError: the text becomes longer than what the path that was traced is for.
    """
    if loop.cached is not None and loop.longest is not None and prompt + iterations - 1 > loop.longest:
        raise InputError(
            "the text becomes longer than what the loop was traced for",
            f"the model reads up to {prompt} + {iterations} - 1 tokens; beyond {loop.longest} the loop takes another "
            "path: its cache is full or cropped, or a window of the model begins",
            "make the cache longer, ask for fewer tokens, or write the loop without a cache, model(ids)[:, -1]",
        )


def without_prompt(bound: inspect.BoundArguments) -> LoopError | None:
    """The refusal of a call without token ids among its arguments; None where there are some, or no tensors."""
    tensors = [f"{name}: {v.dtype} {list(v.shape)}" for name, v in bound.arguments.items() if isinstance(v, Tensor)]
    if prompts(bound) or not tensors:
        return None
    return LoopError("no argument holds token ids", ", ".join(tensors), "pass the prompt as torch.int64, [B, P] or [P]")


def without_source(error: SMCError) -> LoopError:
    """The refusal of Python code that would be traced if its source were known."""
    return LoopError(
        "The decode loop holds Python that needs the value of a token, and its source is not known.",
        error.why or error.what,
        "define the function in a file; or leave the branch out and pass eos_token_id",
    )
