"""The torch.compile backend: ``torch.compile(decode, backend="smc", options={...})``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from smc_compile.auto.choice import settled
from smc_compile.errors import LoopError, OptionError, SMCError
from smc_compile.options import Options
from smc_compile.passes.loop.needs_value import UnlikeIterations
from smc_compile.passes.loop.recover import DecodeLoop
from smc_compile.program.dynamo_limits import allow_another_variant, guard_hooks
from smc_compile.program.from_loop import LoopProgram, loop_outputs, program_for
from smc_compile.program.loop_finder import LoopFinder
from smc_compile.program.parts import answer_in_parts
from smc_compile.program.program import Program
from smc_compile.program.turns import in_turn
from smc_compile.result import Generation
from smc_compile.runtime.state.request import Request

log = logging.getLogger(__name__)
NO_LOOP = (
    "no decode loop in this graph (%d nodes): compiled by Inductor unchanged. If you wrote one, Dynamo could not trace "
    "it whole (a branch on a token?): compile with fullgraph=True or @smc_compile.decode to see why"
)


def smc(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Any = None, mode: str | None = None
) -> Callable[..., Any]:
    """Compile the decode loop in ``gm``; a graph without sampling goes to Inductor unchanged, with one logged line.

    Errors are raised when the compiled function is called, as themselves: Dynamo would wrap what a backend raises.
    """
    allow_another_variant()
    guard_hooks()
    finder = LoopFinder(gm)
    try:
        if mode is not None:
            raise OptionError(f"backend 'smc' has no mode {mode!r}", "modes belong to Inductor", "pass options={...}")
        parsed = Options.parse(options)
        loop = _loop_of(finder, example_inputs)
    except SMCError as error:
        return _raiser(error)
    if loop is None:
        log.warning(NO_LOOP, len(gm.graph.nodes))
        return torch._dynamo.lookup_backend("inductor")(gm, list(example_inputs))

    @in_turn
    def run(*arguments: Any) -> Any:
        loop = _loop_of(finder, arguments)
        assert loop is not None
        _refuse_state(loop)
        _refuse_full_window(loop)
        if loop.parts:
            programs = [program_for(part, arguments, parsed) for part in loop.parts]
            return answer_parts(programs, loop, arguments, parsed)[0]
        program = program_for(loop, arguments, parsed, loop.window)
        outputs, _ = answer_loop(program, loop, arguments, loop.iterations, parsed)
        return outputs

    return run


def _loop_of(finder: LoopFinder, arguments: Sequence[Any]) -> DecodeLoop | None:
    """The loop that a graph holds, in parts if its iterations are not all alike."""
    try:
        return finder.loop_for(arguments)
    except UnlikeIterations:
        return finder.loop_in_parts(arguments)


def answer_loop(
    program: LoopProgram, loop: DecodeLoop, arguments: Sequence[Any], iterations: int, options: Options
) -> tuple[tuple[Tensor | None, ...], Generation]:
    """What the graph of a loop returns after so many iterations, and the generation behind it.

    None stands for a cache that was made outside of the loop.

    Raises:
        OptionError, InputError, GenerationError: as ``smc_compile.generate``.
    """
    request = program.request(loop, arguments, iterations, options)
    result = settled(program.program, request).answer(request)
    return loop_outputs(loop, arguments, result.sequences), result


def answer_parts(
    programs: Sequence[LoopProgram], loop: DecodeLoop, arguments: Sequence[Any], options: Options
) -> tuple[tuple[Tensor | None, ...], Generation]:
    """The same for a loop in parts, with a program for each."""
    outputs, whole = answer_in_parts(programs, loop, arguments, options, _drawn)
    return outputs, programs[0].program.warned(whole)


def _drawn(program: Program, request: Request) -> Generation:
    return settled(program, request).drawn(request)


def _refuse_state(loop: DecodeLoop) -> None:
    """A cache that is made outside of the function would be left without the keys that the loop puts into it."""
    if None in loop.outputs:
        raise LoopError(
            "Only tokens can be returned from a decode loop.",
            f"{loop.outputs.count(None)} other tensors are returned, or kept in a cache made outside of the function",
            "make the cache inside of the function, or use @smc_compile.decode, which leaves caches as they are",
        )


def _refuse_full_window(loop: DecodeLoop) -> None:
    """A window that is full from the beginning shows the step for one length only."""
    if loop.window is not None and loop.prompt_length > loop.window - 2:
        raise LoopError(
            "The loop crops its text, and the trace shows no shorter one.",
            f"the prompt has {loop.prompt_length} tokens, the model reads the last {loop.window}",
            "use @smc_compile.decode, which traces a shorter prompt too",
        )


def _raiser(error: SMCError) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail
