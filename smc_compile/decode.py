"""``@smc_compile.decode``: compile a decode loop from three of its iterations: the cost does not grow with n."""

from __future__ import annotations

import functools
import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from smc_compile.backend import answer_loop, answer_parts
from smc_compile.errors import InputError, LoopError, OptionError, SMCError
from smc_compile.fingerprint import OwnMemory
from smc_compile.options import Options
from smc_compile.passes.loop.needs_value import NeedsValue, ShortPrompt, UnlikeIterations
from smc_compile.passes.loop.recover import DecodeLoop
from smc_compile.program.all_iterations import PINNED, Traces, before_window, check_all_iterations, with_window
from smc_compile.program.callables import bound_function
from smc_compile.program.caller_caches import names_a_cache, own_copy, refuse_returned_cache
from smc_compile.program.callers_generator import with_generator
from smc_compile.program.capture import CapturedCall
from smc_compile.program.dynamo_refusals import FailedLoop, Untraceable, dynamo_errors, failed_loop
from smc_compile.program.even_loops import Doubt, find_doubt
from smc_compile.program.from_loop import LoopProgram, program_for, prompt_of
from smc_compile.program.guards import model_state
from smc_compile.program.iteration_count import PROBE, IterationCount, find_iteration_count
from smc_compile.program.loop_finder import LoopFinder, step_text
from smc_compile.program.model_calls import traceable
from smc_compile.program.reachable_models import reachable_models
from smc_compile.program.rehearsal import Rehearsal, Rehearsed
from smc_compile.program.written_code import Answered, NumbersReturned, Plain, Written, written_code
from smc_compile.result import Generation

log = logging.getLogger(__name__)


def decode(function: Callable[..., Any] | None = None, *, trip_count: str | None = None, **options: Any) -> Any:
    """Compile a function that holds a decode loop.

        @smc_compile.decode(draft=draft, n_particles=8, lookahead=6, seed=0)
        def decode(model, ids, n): ...

    Args:
        trip_count: name of the integer argument that counts the iterations; found by tracing when not given.
        **options: see ``smc_compile.options.Options``.

    The result is called like the function. ``result.last`` is the ``Generation`` behind the latest call.

    Raises:
        OptionError: for an unknown or ill-typed option, at decoration.
        LoopError: at the first call, when the loop cannot be compiled, with the op and the user's line.
    """
    parsed = Options.parse(options)
    if function is None:
        return lambda f: CompiledLoop(f, parsed, trip_count)
    return CompiledLoop(function, parsed, trip_count)


_Way = tuple[Plain | Written, IterationCount | None, Rehearsal | None]  # how a function is traced


@dataclass(frozen=True)
class _Ready:
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


class CompiledLoop(OwnMemory):
    """A decode loop compiled by ``decode``.

    Dynamo traces three iterations, and a program draws as many tokens as are asked for.

    Attributes:
        last: the generation behind the latest call that returned.
        loop: the loop behind it.
    """

    def __init__(self, function: Callable[..., Any], options: Options, trip_count: str | None) -> None:
        self._called = bound_function(function)
        self._function, self._options = self._called.function, options
        self._signature = inspect.signature(self._function)
        if trip_count is not None and trip_count not in self._signature.parameters:
            raise OptionError(
                f"trip_count={trip_count!r} is not an argument of {self._function.__name__}",
                f"its arguments are {', '.join(self._signature.parameters)}",
            )
        self._trip_count = trip_count
        self._count: IterationCount | None = None  # found at the first call
        self._code: Plain | Written = Plain(self._function, nodes=True)
        self._in_parts = False  # whether the iterations were found to differ
        self._count_of_parts: IterationCount | None = None
        self._rehearsal = Rehearsal(self._code)
        self._inlined: _Way = (Plain(self._function), None, None)
        self._doubts: WeakKeyDictionary[LoopFinder, Doubt | None] = WeakKeyDictionary()
        self.last: Generation | None = None
        self.loop: DecodeLoop | None = None
        functools.update_wrapper(self, self._function)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """As a method: bind like a function."""
        return self if instance is None else functools.partial(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._called.bind(args, kwargs)
        caches = names_a_cache(self._function)
        with ExitStack() as stack:
            for model in reachable_models(self._function, bound.arguments.values()):
                stack.enter_context(traceable(model, caches))
            try:
                return self._answer(bound, bound)
            except ShortPrompt:
                return self._answer(bound, self._with_longer_prompts(bound))

    def _answer(self, bound: inspect.BoundArguments, traced: inspect.BoundArguments) -> Any:
        """The result of a call with the arguments ``bound``; ``traced`` are those that Dynamo sees."""
        mark_lengths(traced)
        try:
            return self._run(bound, self._ready(bound, traced))
        except NumbersReturned as error:
            self._take_twin(traced, error)
        return self._run(bound, self._ready(bound, traced))

    def _ready(self, bound: inspect.BoundArguments, traced: inspect.BoundArguments) -> _Ready:
        """The program of a call. Models are one node each while the loop is traced; where that fails, they are traced.

        Raises:
            SMCError: the loop cannot be compiled.
        """
        if not self._code.nodes:
            return self._ready_by_either(bound, traced)
        models = reachable_models(self._function, bound.arguments.values())
        states = [model_state(model) for model in models]
        try:
            ready = self._ready_with_nodes(bound, traced)
            why: object = _what_nodes_hide(ready, prompt_length(bound) + ready.iterations - 1)
            if why is None:
                return ready
        except ShortPrompt:
            raise
        except Exception as error:  # of any kind: what follows is the way that takes all that can be compiled
            why = error
        if states != [model_state(model) for model in models]:
            raise LoopError(
                "A model changes itself when it is called.",
                f"tracing it has changed it, and it could not be put back: {why}",
                "keep what a forward counts or stores outside of the model",
            )
        log.info("the loop is traced with its models: %s", why)
        before = self._code, self._count, self._rehearsal
        self._code, self._count, rehearsal = self._inlined
        self._rehearsal = rehearsal or Rehearsal(self._code)
        try:
            return self._ready_by_either(bound, traced)
        except Exception:
            self._inlined = self._code, self._count, self._rehearsal
            self._code, self._count, self._rehearsal = before
            raise

    def _ready_with_nodes(self, bound: inspect.BoundArguments, traced: inspect.BoundArguments) -> _Ready:
        """The program of a call whose models are nodes; programs, if its iterations are not all alike."""
        if self._in_parts:
            return self._ready_in_parts(bound)
        try:
            return self._ready_by_either(bound, traced)
        except UnlikeIterations as error:
            log.info("the loop is compiled in parts: %s", error)
        ready = self._ready_in_parts(bound)
        self._in_parts = True
        return ready

    def _ready_by_either(self, bound: inspect.BoundArguments, traced: inspect.BoundArguments) -> _Ready:
        """The program of a call, from the function or from its twin."""
        try:
            return self._ready_by_code(bound, traced)
        except (Untraceable, FailedLoop, NeedsValue) as error:
            self._take_twin(traced, error)
        return self._ready_by_code(bound, traced)

    def _take_twin(self, traced: inspect.BoundArguments, error: SMCError, parts: bool = False) -> None:
        """Go on with the function's twin, whose iterations may differ if it is taken in ``parts``.

        Raises:
            SMCError: that cannot be compiled either. Where the function itself fails, that is its ``error``.
        """
        if isinstance(self._code, Written):
            raise error
        try:
            found = written_code(self._function, lambda code: self._find_count(code, traced, parts), self._code.nodes)
        except LoopError as other:
            raise (error if isinstance(error, FailedLoop) else other) from other
        if found is None:
            raise (error if isinstance(error, FailedLoop) else without_source(error)) from error
        self._code, count = found
        self._count, self._count_of_parts = (None, count) if parts else (count, None)
        self._rehearsal = Rehearsal(self._code)

    def _ready_by_code(self, bound: inspect.BoundArguments, traced: inspect.BoundArguments) -> _Ready:
        if self._count is None:
            self._count = self._find_count(self._code, traced)
        iterations = self._count.iterations(bound.arguments[self._count.name], prompt_length(bound))
        call, found = self._captured(traced)
        if traced is not bound and found.cached is None:
            self._refuse_lengths_of_prompts(traced, found)
        check_longest(found, prompt_length(bound), iterations)
        self._count.stretched(found, iterations)  # refuses tokens that do not fit
        window = self._window(bound, traced, call, found, iterations)
        if window is not None and prompt_length(traced) > before_window(window, found.iterations):
            traced = self._with_prompts(bound, before_window(window, found.iterations))
            mark_lengths(traced)
            call, found = self._captured(traced)
        if window is not None and prompt_length(bound) + iterations - 1 <= window:
            window = None  # the text does not outgrow it
        program = program_for(found, call.arguments, self._options, window, call.states)
        arguments = call.arguments if traced is bound else with_prompt(call, found, bound)
        return _Ready(program, found, arguments, iterations, window, self._counting(traced, PROBE), self._count)

    def _ready_in_parts(self, bound: inspect.BoundArguments) -> _Ready:
        """The programs of a call whose iterations are not all alike: all of them are traced.

        Raises:
            SMCError: the parts cannot be compiled.
        """
        exact = self._with_prompts(bound, prompt_length(bound))
        try:
            return self._ready_in_parts_of_code(bound, exact)
        except (Untraceable, FailedLoop, NeedsValue) as error:
            self._take_twin(exact, error, parts=True)
        return self._ready_in_parts_of_code(bound, exact)

    def _ready_in_parts_of_code(self, bound: inspect.BoundArguments, exact: inspect.BoundArguments) -> _Ready:
        if self._count_of_parts is None:
            self._count_of_parts = self._find_count(self._code, exact, parts=True)
        count = self._count_of_parts
        iterations = count.iterations(bound.arguments[count.name], prompt_length(bound))
        value = count.value(iterations - count.extra, prompt_length(bound))
        asked = self._with_value(exact, count.name, value)
        with dynamo_errors():
            call = self._code.captured(asked)
        loop = call.finder.loop_in_parts(call.arguments) if call is not None else None
        if call is None or loop is None or loop.iterations != iterations:
            raise LoopError("with all its iterations the function holds no loop")
        parts = loop.parts or (loop,)
        programs = tuple(program_for(part, call.arguments, self._options, None, call.states) for part in parts)
        loop = replace(loop, parts=parts)
        return _Ready(programs[0], loop, call.arguments, iterations, None, asked, count, programs)

    def _run(self, bound: inspect.BoundArguments, ready: _Ready) -> Any:
        """What the function returns, for tokens that its program draws."""
        program, found, arguments = ready.program, ready.loop, ready.arguments
        options = with_generator(self._options, self._function, bound)
        if ready.parts:
            outputs, generation = answer_parts(ready.parts, found, arguments, options)
        else:
            loop = ready.count.stretched(found, ready.iterations)
            outputs, generation = answer_loop(program, loop, arguments, ready.iterations, options)
        ends, prompt = program.end_tokens(found, arguments), prompt_of(found, arguments)
        models = reachable_models(self._function, bound.arguments.values())
        answered = Answered(outputs, generation, ends, program.vocabulary, found, prompt, bound, ready.short, models)
        result = self._code.result(answered)
        if found.cached is not None:
            refuse_returned_cache(result)
        self.last, self.loop = generation, with_window(found, ready.window)
        return result

    def _captured(self, traced: inspect.BoundArguments, exact: bool = False) -> tuple[CapturedCall, DecodeLoop]:
        """The loop that Dynamo sees in a few iterations, ``exact``ly those of this prompt length or any."""
        with dynamo_errors():
            call = self._code.captured(self._counting(traced, PROBE))
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
        _, longer = self._captured(self._with_longer_prompts(traced), exact=True)
        if len(prompts(traced)) > 1 or step_text(longer.step.graph) != step_text(found.step.graph):
            raise LoopError(
                "The prompt is too short to be told from the part of the text that the sampler reads.",
                "the loop was traced with a longer prompt, and what it computes may depend on the prompt's length",
                f"give a prompt of {found.prompt_length} tokens or more",
            )

    def _counting(self, arguments: inspect.BoundArguments, iterations: int) -> inspect.BoundArguments:
        """The arguments of a call that asks for so many iterations."""
        assert self._count is not None
        return self._with_value(arguments, self._count.name, self._count.value(iterations, prompt_length(arguments)))

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
        inlined = cached or call.writes or self._code.nodes  # or the code has its models as nodes anyway
        models = None if inlined else reachable_models(self._function, bound.arguments.values())

        def few(length: int) -> Rehearsed:
            longer, loop = self._captured(self._with_prompts(bound, length, marked=True), exact=True)
            return Rehearsed(loop, longer.finder)

        def everything(length: int, n: int, opaque: list[nn.Module] | None = models) -> Rehearsed:
            asked = traced if cached else self._with_prompts(bound, length)
            asked = self._counting(asked, n - count.extra)
            log.info("%d iterations are traced: %s", n, doubt)
            with dynamo_errors():
                return rehearsal.loop(lambda code: code.captured(asked), opaque, doubt or PINNED, n == 1)

        traces = Traces(
            few,
            everything,
            lambda length, n: everything(length, n, None),
            lambda loop: count.stretched(loop, iterations).outputs,
        )
        start = Rehearsed(found, call.finder)
        return check_all_iterations(rehearsal, traces, start, doubt, iterations, prompt_length(bound))

    def _with_prompts(self, bound: inspect.BoundArguments, length: int, marked: bool = False) -> inspect.BoundArguments:
        """The arguments with prompts of another length; to Dynamo it is a number, unless ``marked``."""
        given = {name: bound.arguments[name] for name in prompts(bound)}
        other = {n: torch.cat([p] * -(-length // p.shape[-1]), -1)[..., :length].clone() for n, p in given.items()}
        arguments = inspect.BoundArguments(self._signature, OrderedDict({**bound.arguments, **other}))
        if marked:
            mark_lengths(arguments)
        return arguments

    def _doubt(self, traced: inspect.BoundArguments, call: CapturedCall, found: DecodeLoop) -> Doubt | None:
        """Why three iterations need not stand for all; it holds while Dynamo's guards hold."""
        if call.finder not in self._doubts:
            caches = [f"L['{name}']" for name, value in traced.arguments.items() if hasattr(value, "get_seq_length")]
            writes = [name for name in call.writes if not name.startswith(tuple(caches))]
            assert self._count is not None
            text, counter = next(iter(prompts(traced)), None), self._count.name
            read = find_doubt(self._function, traced.arguments, text, counter, isinstance(self._code, Written))
            written = Doubt(f"{writes[0]} is changed by the loop, which may read it") if writes else None
            self._doubts[call.finder] = written or read
        return self._doubts[call.finder]

    def _find_count(self, code: Plain | Written, bound: inspect.BoundArguments, parts: bool = False) -> IterationCount:
        """Trace the function with other values of its integer arguments; with ``parts``, iterations may differ."""
        integers = [name for name, value in bound.arguments.items() if type(value) is int]
        names = [self._trip_count] if self._trip_count is not None else integers

        def look(name: str, value: int) -> DecodeLoop | SMCError | None:
            changed = self._with_value(bound, name, value)
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

    def _with_value(self, bound: inspect.BoundArguments, name: str, value: int) -> inspect.BoundArguments:
        """The arguments with another value of one, and with copies of the caches among them."""
        own = {key: own_copy(argument) for key, argument in bound.arguments.items()}
        return inspect.BoundArguments(self._signature, OrderedDict({**own, name: value}))

    def _with_longer_prompts(self, bound: inspect.BoundArguments) -> inspect.BoundArguments:
        """The arguments with prompts of one token more: those given are too short to show what longer ones do."""
        longer = {n: torch.cat([p, p[..., :1]], -1) for n in prompts(bound) for p in [bound.arguments[n]]}
        return inspect.BoundArguments(self._signature, OrderedDict({**bound.arguments, **longer}))


# ---- arguments -------------------------------------------------------------------------------------------------------


def prompts(bound: inspect.BoundArguments) -> list[str]:
    """The names of arguments that may be prompts: token ids [B, P] or [P]."""
    return [
        name
        for name, value in bound.arguments.items()
        if isinstance(value, Tensor) and value.dim() in (1, 2) and value.dtype == torch.int64
    ]


def prompt_length(bound: inspect.BoundArguments) -> int:
    """Tokens of the first prompt, 0 without one."""
    return next((bound.arguments[name].shape[-1] for name in prompts(bound)), 0)


def mark_lengths(bound: inspect.BoundArguments) -> None:
    """Tell Dynamo that prompts of other lengths will come. One token is a case of its own to Dynamo."""
    for name in prompts(bound):
        prompt = bound.arguments[name]
        if prompt.shape[-1] > 1:
            torch._dynamo.maybe_mark_dynamic(prompt, prompt.dim() - 1)


def with_prompt(call: CapturedCall, loop: DecodeLoop, bound: inspect.BoundArguments) -> list[Any]:
    """The arguments of a call's graph with the first prompt of ``bound`` in the place of the one that was traced."""
    arguments = list(call.arguments)
    arguments[loop.prompt_index] = bound.arguments[prompts(bound)[0]]
    return arguments


def _what_nodes_hide(ready: _Ready, reach: int) -> str | None:
    """What cannot be seen where models are one node each, if a call needs it; ``reach`` tokens are read at most."""
    if ready.loop.cached is not None or ready.loop.padded is not None:
        return "it keeps a cache or a buffer"
    known = [program.program.target.max_positions for program in ready.parts or (ready.program,)]
    longest = min((most for most in known if most is not None), default=reach)
    if longest < reach and ready.window is None:
        return f"the model is known for {longest} tokens only"
    return None


# ---- refusals --------------------------------------------------------------------------------------------------------


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
