"""``@smc_compile.decode``: compile a decode loop from three of its iterations: the cost does not grow with n."""

from __future__ import annotations

import functools
import inspect
import types
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from smc_compile.backend import LoopFinder
from smc_compile.errors import InputError, LoopError, OptionError, SMCError
from smc_compile.options import Options
from smc_compile.passes.loop.kv_loop import ShortPrompt
from smc_compile.passes.loop.outputs import OutputLayout
from smc_compile.passes.loop.recover import DecodeLoop
from smc_compile.program.caller_caches import names_a_cache, own_copy, refuse_returned_cache
from smc_compile.program.from_loop import LoopProgram, program_for, step_text
from smc_compile.program.model_calls import traceable
from smc_compile.result import Generation

PROBE = 3  # iterations that are traced: two would do for an affine fit, the third checks it
CHECK = 2


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


@dataclass
class _Call:
    """What the backend of one traced function is asked for, and what it answers."""

    iterations: int | None = None  # None: only look at the loop
    prompt: Tensor | None = None  # what to answer, if a longer prompt is traced
    loop: DecodeLoop | None = None
    program: LoopProgram | None = None
    generation: Generation | None = None


class _Looked(Exception):
    """Leaves a traced function after the loop was found, before anything runs."""


class CompiledLoop:
    """A decode loop compiled by ``decode``."""

    def __init__(self, function: Callable[..., Any], options: Options, trip_count: str | None) -> None:
        self._function, self._options = function, options
        self._signature = inspect.signature(function)
        if trip_count is not None and trip_count not in self._signature.parameters:
            raise OptionError(
                f"trip_count={trip_count!r} is not an argument of {function.__name__}",
                f"its arguments are {', '.join(self._signature.parameters)}",
            )
        self._trip_count = trip_count
        self._offset = 0  # 1: a total length, which counts the prompt too
        self._extra = 0  # iterations = argument - prompt + extra: a token may be drawn before the loop
        self._fixed_lengths: list[int | None] = []  # what fills up an output whose length is always the same
        self._call = _Call()
        self._traced = _trace(function, self._backend)
        self.last: Generation | None = None
        functools.update_wrapper(self, function)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """As a method: bind like a function."""
        return self if instance is None else functools.partial(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        caches = names_a_cache(self._function)
        with ExitStack() as stack:
            for model in _models(self._function, bound):
                stack.enter_context(traceable(model, caches))
            try:
                return self._answer(bound)
            except ShortPrompt:
                return self._answer(bound, longer=True)

    def _answer(self, bound: inspect.BoundArguments, longer: bool = False) -> Any:
        """The result of a call; ``longer`` traces with prompts of one token made two."""
        given = [name for name, value in bound.arguments.items() if _may_be_prompt(value)]
        traced = inspect.BoundArguments(self._signature, bound.arguments.copy())
        for name in given if longer else ():
            traced.arguments[name] = torch.cat([bound.arguments[name]] * 2, -1)
        for name in given:
            if traced.arguments[name].shape[-1] > 1:
                torch._dynamo.maybe_mark_dynamic(traced.arguments[name], traced.arguments[name].dim() - 1)
        if self._trip_count is None or self._call.program is None:
            self._find_trip_count(traced)
        assert self._trip_count is not None
        iterations = self._iterations(bound)
        call = _Call(iterations, bound.arguments[given[0]] if longer else None)
        result = self._run(traced, call)
        if call.loop is not None and call.loop.cached is not None:
            refuse_returned_cache(result)
        self.last = call.generation
        return result

    def _iterations(self, bound: inspect.BoundArguments) -> int:
        """How many tokens a call asks for.

        Raises:
            InputError: none.
        """
        assert self._trip_count is not None
        asked = bound.arguments[self._trip_count]
        integer = isinstance(asked, int) and not isinstance(asked, bool)
        iterations = asked - self._prompt_offset(bound) + self._extra if integer else 0
        if iterations < 1:
            raise InputError(
                f"{self._trip_count} asks for no tokens",
                f"{self._trip_count}={asked!r}",
                "ask for at least one new token",
            )
        return iterations

    @property
    def program(self) -> LoopProgram | None:
        """What the latest call ran."""
        return self._call.program

    @property
    def loop(self) -> DecodeLoop | None:
        """The loop behind the latest call."""
        return self._call.loop

    def _prompt_offset(self, bound: inspect.BoundArguments) -> int:
        if not self._offset:
            return 0
        return next((v.shape[-1] for v in bound.arguments.values() if _may_be_prompt(v)), 0)

    def _run(self, bound: inspect.BoundArguments, call: _Call, iterations: int = PROBE, name: str | None = None) -> Any:
        """Call the traced function with a short trip count; its backend answers with as many tokens as were asked."""
        name = name or self._trip_count
        assert name is not None
        own = {key: own_copy(value) for key, value in bound.arguments.items()}
        shifted = inspect.BoundArguments(self._signature, OrderedDict(own))
        shifted.arguments[name] = iterations + self._prompt_offset(bound)
        self._call = call
        try:
            return self._traced(*shifted.args, **shifted.kwargs)
        except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError) as error:
            if "bind arguments" in str(error):
                raise _failed(error, context=True) from error
            raise LoopError(
                "the decode loop has Python control flow that depends on data, or code that Dynamo cannot trace",
                _first_lines(error),
                "remove the branch: pass eos_token_id instead of `if token == eos: break`; keep .item() outside",
            ) from error
        except torch._dynamo.exc.TorchRuntimeError as error:
            raise _failed(error) from error

    def _find_trip_count(self, bound: inspect.BoundArguments) -> None:
        """Which integer argument counts the iterations, and whether it counts the prompt too: change it and count draws."""
        names = [self._trip_count] if self._trip_count else [n for n, v in bound.arguments.items() if type(v) is int]
        refusals = []
        others = []
        for self._offset in (0, 1):
            for name in names:
                found = self._look(bound, PROBE, name)
                if isinstance(found, SMCError):
                    refusals.append(found)
                elif found is not None and found.iterations == PROBE:
                    self._confirm(bound, name, found)
                    return
                elif found is not None and found.iterations == PROBE + 1:
                    others.append((self._offset, name, found))
        for self._offset, name, found in others:  # a token is drawn before the loop
            other = self._look(bound, CHECK, name)
            if isinstance(other, DecodeLoop) and other.iterations == CHECK + 1:
                self._confirm(bound, name, found, extra=1)
                return
        if refusals:
            raise refusals[0]
        raise LoopError(
            "no argument counts the iterations of the loop",
            f"integer arguments: {', '.join(map(str, names)) or 'none'}",
            "take the number of new tokens as an integer argument, or name it: decode(trip_count='n')",
        )

    def _confirm(self, bound: inspect.BoundArguments, name: str, found: DecodeLoop, extra: int = 0) -> None:
        """The same step must come out for another number of iterations, or the number takes part in the distribution."""
        other = self._look(bound, CHECK, name)
        if isinstance(other, SMCError):
            raise other
        same = other is not None and step_text(other.step.graph) == step_text(found.step.graph)
        if other is None or other.iterations != CHECK + extra or not same:
            raise LoopError(
                f"argument {name!r} does not only count iterations",
                f"with {name}={PROBE} the loop has {found.iterations} iterations, with {CHECK} {other.iterations if other else 0}"
                + (
                    ""
                    if other is None or other.iterations != CHECK + extra
                    else ", and what an iteration computes differs"
                ),
                "keep the number of new tokens out of the sampling, or name the right argument: decode(trip_count='n')",
            )
        self._trip_count, self._extra = name, extra
        self._fixed_lengths = [_fixed_length(*pair) for pair in zip(found.outputs, other.outputs, strict=True)]

    def _for_iterations(self, loop: DecodeLoop, iterations: int) -> DecodeLoop:
        """The loop with the padding that its outputs have after this many iterations."""
        outputs: list[OutputLayout | None] = []
        for layout, pad in zip(loop.outputs, self._fixed_lengths, strict=True):
            if layout is None:
                outputs.append(None)
                continue
            padding = layout.padding
            if pad is not None and iterations - loop.iterations > len(padding):
                raise InputError(
                    "the tokens do not fit the buffer of the loop",
                    f"{iterations} new tokens were asked for, and there is room for {loop.iterations + len(padding)}",
                    "make the buffer longer, or ask for fewer tokens",
                )
            if pad is not None:
                more = iterations - loop.iterations
                padding = padding[more:] if more > 0 else (pad,) * -more + padding
            outputs.append(replace(layout, padding=padding))
        return replace(loop, outputs=tuple(outputs))

    def _look(self, bound: inspect.BoundArguments, iterations: int, name: str) -> DecodeLoop | SMCError | None:
        """The loop that a trace with this many iterations shows, without running it."""
        call = _Call()
        try:
            self._run(bound, call, iterations, name)
        except _Looked:
            return call.loop
        except SMCError as error:
            return error
        except Exception as error:  # the user's own code, perhaps since the argument does not count iterations
            failed = _failed(error)
            failed.__cause__ = error
            return failed
        return None

    def _backend(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        """Recovers the loop when Dynamo traces, and answers the current call when Dynamo runs."""
        finder: LoopFinder | SMCError
        try:
            finder = LoopFinder(gm, example_inputs)
        except SMCError as error:
            finder = error

        def run(*arguments: Any) -> Any:
            call = self._call
            if isinstance(finder, SMCError):
                raise finder
            found = call.loop = finder.loop_for(arguments) if finder.loop is not None else None
            if call.iterations is None:
                raise _Looked
            if found is None:
                raise LoopError("the function holds no decode loop", "no token is drawn and fed back")
            call.program = program_for(found, arguments, self._options)
            shown = self._for_iterations(found, call.iterations)
            if call.prompt is not None:
                at = found.prompt_index
                arguments = (*arguments[:at], call.prompt, *arguments[at + 1 :])
            _check_longest(found, arguments[found.prompt_index].shape[-1], call.iterations)
            outputs, call.generation = call.program.run(shown, arguments, call.iterations)
            return outputs

        return run


def _check_longest(loop: DecodeLoop, prompt: int, iterations: int) -> None:
    """Three iterations show only one path of a loop that takes another for long texts."""
    if loop.longest is not None and prompt + iterations - 1 > loop.longest:
        raise InputError(
            "the text becomes longer than what the loop was traced for",
            f"the model reads up to {prompt} + {iterations} - 1 tokens; beyond {loop.longest} the loop takes another path: "
            "its cache is full or cropped, or a window of the model begins",
            "make the cache longer, ask for fewer tokens, or write the loop without a cache, model(ids)[:, -1]",
        )


def _models(function: Callable[..., Any], bound: inspect.BoundArguments) -> list[nn.Module]:
    """The modules that a function can reach: its arguments, its free variables and the globals that it names."""
    assert isinstance(function, types.FunctionType)
    filled = [cell for cell in function.__closure__ or () if cell != types.CellType()]  # an empty one raises when read
    cells = [cell.cell_contents for cell in filled]
    named = [function.__globals__.get(name) for name in function.__code__.co_names]
    return [value for value in (*bound.arguments.values(), *cells, *named) if isinstance(value, nn.Module)]


def _may_be_prompt(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() in (1, 2) and value.dtype == torch.int64


def _fixed_length(layout: OutputLayout | None, shorter: OutputLayout | None) -> int | None:
    """The padding of an output whose length does not depend on the number of iterations; None if it grows with them."""
    if layout == shorter or layout is None or shorter is None:
        return None
    rest = shorter.padding[PROBE - CHECK :]
    if layout != replace(shorter, padding=rest):
        raise LoopError(
            "an output of the loop changes with the number of iterations in other ways than by its tokens",
            f"after {PROBE} iterations it is {layout}, after {CHECK} {shorter}",
            "return prompt + tokens, or all tokens",
        )
    return shorter.padding[0]


def _trace(function: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under Dynamo, as a copy: the user's own function and its cache are left alone."""
    if not isinstance(function, types.FunctionType):
        raise OptionError("decode compiles a plain Python function", f"got {type(function).__name__}")
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(copy, backend=backend, fullgraph=True, dynamic=False)


def _failed(error: Exception, context: bool = False) -> LoopError:
    lines = [line.strip() for line in str(error).splitlines() if "context:" in line] if context else []
    return LoopError(
        "the loop fails with these arguments",
        "\n".join(line.removeprefix("Developer debug context: ")[:300] for line in lines) or _first_lines(error),
        "run the plain loop to see the error, or name the number of iterations: decode(trip_count='n')",
    )


def _first_lines(error: Exception, count: int = 3) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())[: 120 * count]
