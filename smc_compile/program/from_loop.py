"""From a recovered decode loop to a program, and from a program's tokens back to what the loop returns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, fx

from smc_compile.errors import LoopError
from smc_compile.inputs.requests import check_prompt
from smc_compile.options import Options
from smc_compile.passes.loop.recover import DecodeLoop
from smc_compile.passes.pipeline import Traced, trace_model
from smc_compile.program.build import build_program
from smc_compile.program.draft_calls import compile_called, needs_more
from smc_compile.program.model import cached
from smc_compile.program.program import Program
from smc_compile.result import Generation
from smc_compile.runtime.algorithms.next_token import NextTokenDistribution

KEPT = 16  # programs kept for loops that are compiled again (another n, another prompt length)
_programs: OrderedDict[Any, LoopProgram] = OrderedDict()
_checked: WeakSet[DecodeLoop] = WeakSet()


@dataclass
class LoopProgram:
    """A program whose weights are the arguments of the current call."""

    program: Program
    traced: Traced
    weights: list[Tensor]

    def run(
        self, loop: DecodeLoop, arguments: Sequence[Any], iterations: int
    ) -> tuple[tuple[Tensor | None, ...], Generation]:
        """What the loop returns for ``iterations`` iterations, and the generation behind it; None for the loop's own cache."""
        self.weights[:] = _weights(loop, arguments)
        prompt = _prompt(loop, arguments)
        result = self.program.run(prompt, iterations)
        tokens = result.sequences[:, prompt.shape[1] :]
        return tuple(layout and layout.build(prompt, tokens) for layout in loop.outputs), result


def program_for(loop: DecodeLoop, arguments: Sequence[Any], options: Options) -> LoopProgram:
    """The program of a loop: compiled once for loops whose steps, inputs and options agree."""
    for index, value in loop.fixed_floats:
        if float(arguments[index]) != value:
            raise LoopError(
                "a number that the loop was compiled with has changed",
                f"it was {value}, it is {float(arguments[index])}",
                "pass it as a tensor, or call torch._dynamo.reset() before changing it",
            )
    check_prompt(_prompt(loop, arguments))
    if loop not in _checked:  # another loop with the same step may treat its padding or its cache in another way
        loop.check(arguments)
        _checked.add(loop)
    weights = _weights(loop, arguments)
    signature = (
        step_text(loop.step.graph),
        loop.batch,
        tuple((tuple(w.shape), w.dtype, w.device) for w in weights),
        id(options.draft),
        tuple(value for name, value in vars(options).items() if name != "draft"),
    )
    if signature not in _programs:
        _programs[signature] = _compile(loop, arguments, weights, options)
    _programs.move_to_end(signature)
    while len(_programs) > KEPT:
        _programs.popitem(last=False)
    return _programs[signature]


def step_text(graph: fx.Graph) -> str:
    """A graph as text in which names do not count: equal for traces that differ in node names alone."""
    number = {node: i for i, node in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: f"%{number[n]}")
        target = "" if node.op in ("placeholder", "output") else torch.typename(node.target) + str(node.target)
        lines.append(f"{node.op} {target} {args} {kwargs}")
    return "\n".join(lines)


def _prompt(loop: DecodeLoop, arguments: Sequence[Any]) -> Tensor:
    """The prompt as [B, P]; a loop may take one prompt [P]."""
    prompt: Tensor = arguments[loop.prompt_index]
    return prompt[None] if prompt.dim() == 1 else prompt


def _weights(loop: DecodeLoop, arguments: Sequence[Any]) -> list[Tensor]:
    found = [arguments[i] for i in loop.invariant_indices]
    return [value if isinstance(value, Tensor) else torch.tensor(value) for value in found]


def _compile(loop: DecodeLoop, arguments: Sequence[Any], weights: list[Tensor], options: Options) -> LoopProgram:
    ids = _prompt(loop, arguments)
    traced = trace_model(loop.step, ids.new_zeros(loop.batch, 2), weights, options.validate)
    assert traced.sampler is not None
    current = list(weights)
    distribution = NextTokenDistribution(traced.sampler.kind)
    target = cached(traced, lambda: [*traced.owned(), *current], options, "target", distribution)
    kind = "greedy" if traced.sampler.kind == "greedy" else "logits"
    draft_distribution = NextTokenDistribution(kind, options.draft_temperature or traced.sampler.temperature)
    draft_model = compile_called if needs_more(options.draft) else None  # a draft with another calling convention
    return LoopProgram(build_program(target, options, draft_distribution, ids, draft_model), traced, current)
