"""``@smc_compile.decode``: compile a decode loop from three of its iterations: the cost does not grow with n."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from smc_compile.backend import answer_loop, answer_parts
from smc_compile.errors import LoopError, OptionError
from smc_compile.fingerprint import OwnMemory
from smc_compile.options import Options
from smc_compile.passes.capture.as_called import TracedOtherwise
from smc_compile.passes.loop.needs_value import ShortPrompt
from smc_compile.passes.loop.recover import DecodeLoop
from smc_compile.program.all_iterations import with_window
from smc_compile.program.callables import bound_function, innermost
from smc_compile.program.caller_caches import names_a_cache, refuse_returned_cache
from smc_compile.program.callers_generator import with_generator
from smc_compile.program.from_loop import prompt_of
from smc_compile.program.guards import model_state, one_look
from smc_compile.program.loop_arguments import mark_lengths, prompt_length, with_longer_prompts
from smc_compile.program.model_calls import traceable
from smc_compile.program.reachable_models import reachable_models
from smc_compile.program.traced_function import Ready, TracedFunction
from smc_compile.program.turns import in_turn
from smc_compile.program.written_code import Answered, NumbersReturned
from smc_compile.result import Generation

log = logging.getLogger(__name__)
# Names in a loop that may look into a model, or switch what a model may ask for: it is traced with the loop then.
LOOKS_INSIDE = frozenset(
    ["signature", "getfullargspec", "__code__", "__dict__", "__self__", "vars", "enable_grad", "set_grad_enabled",
     "inference_mode", "set_default_dtype", "set_default_device"]
)  # fmt: skip


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
        names = inspect.signature(self._function).parameters
        if trip_count is not None and trip_count not in names:
            raise OptionError(
                f"trip_count={trip_count!r} is not an argument of {self._function.__name__}",
                f"its arguments are {', '.join(names)}",
            )
        ways = (TracedFunction(self._function, options, trip_count, nodes) for nodes in (True, False))
        self._with_nodes, self._with_models = ways
        looks = set(innermost(self._function).__code__.co_names) & LOOKS_INSIDE
        self._way = self._with_models if looks else self._with_nodes
        self.last: Generation | None = None
        self.loop: DecodeLoop | None = None
        functools.update_wrapper(self, self._function)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """As a method: bind like a function."""
        return self if instance is None else functools.partial(self, instance)

    @in_turn
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._called.bind(args, kwargs)
        caches = names_a_cache(self._function)
        with ExitStack() as stack:
            for model in reachable_models(self._function, bound.arguments.values()):
                stack.enter_context(traceable(model, caches))
            try:
                return self._answer(bound, bound)
            except ShortPrompt:
                return self._answer(bound, with_longer_prompts(bound))

    def _answer(self, bound: inspect.BoundArguments, traced: inspect.BoundArguments) -> Any:
        """The result of a call with the arguments ``bound``; ``traced`` are those that Dynamo sees."""
        mark_lengths(traced)
        try:
            return self._run(bound, self._ready(bound, traced))
        except NumbersReturned as error:
            self._way.take_twin(traced, error)
        return self._run(bound, self._ready(bound, traced))

    def _ready(self, bound: inspect.BoundArguments, traced: inspect.BoundArguments) -> Ready:
        """The program of a call. Models are one node each while the loop is traced; where that fails, they are traced.

        Raises:
            SMCError: the loop cannot be compiled.
        """
        if self._way is self._with_models:
            return self._way.ready(bound, traced)
        models = reachable_models(self._function, bound.arguments.values())
        with one_look():
            states = [model_state(model) for model in models]
            try:
                ready = self._way.ready(bound, traced)
                why: object = hidden_by_nodes(ready, prompt_length(bound) + ready.iterations - 1)
                if why is None:
                    return ready
            except (ShortPrompt, TracedOtherwise):
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
        ready = self._with_models.ready(bound, traced)
        self._way = self._with_models
        return ready

    def _run(self, bound: inspect.BoundArguments, ready: Ready) -> Any:
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
        result = self._way.code.result(answered)
        if found.cached is not None:
            refuse_returned_cache(result)
        self.last, self.loop = generation, with_window(found, ready.window)
        return result


def hidden_by_nodes(ready: Ready, reach: int) -> str | None:
    """What cannot be seen where models are one node each, if a call needs it; ``reach`` tokens are read at most."""
    if ready.loop.cached is not None or ready.loop.padded is not None:
        return "it keeps a cache or a buffer"
    known = [program.program.target.max_positions for program in ready.parts or (ready.program,)]
    longest = min((most for most in known if most is not None), default=reach)
    if longest < reach and ready.window is None:
        return f"the model is known for {longest} tokens only"
    return None
