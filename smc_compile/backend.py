"""The torch.compile backend: ``torch.compile(decode, backend="smc", options={...})``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from smc_compile.errors import LoopError, OptionError, SMCError
from smc_compile.options import Options
from smc_compile.passes.loop.draws import is_draw
from smc_compile.passes.loop.recover import DecodeLoop
from smc_compile.passes.pipeline import recover_loop
from smc_compile.program.from_loop import program_for, step_text

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
    try:
        if mode is not None:
            raise OptionError(f"backend 'smc' has no mode {mode!r}", "modes belong to Inductor", "pass options={...}")
        parsed = Options.parse(options)
        finder = LoopFinder(gm, example_inputs)
    except SMCError as error:
        return _raiser(error)
    if finder.loop is None:
        log.warning(NO_LOOP, len(gm.graph.nodes))
        return torch._dynamo.lookup_backend("inductor")(gm, list(example_inputs))

    def run(*arguments: Any) -> Any:
        loop = finder.loop_for(arguments)
        _refuse_state(loop)
        outputs, _ = program_for(loop, arguments, parsed).run(loop, arguments, loop.iterations)
        return outputs

    return run


class LoopFinder:
    """The decode loop of one graph, for every prompt that the graph is called with.

    A recovered loop holds for one batch, one prompt length and one value of each other symbolic integer. The graph of
    another length is recovered again; once two lengths gave the same step and outputs, the length does not matter.

    Attributes:
        loop: the loop of the inputs that the graph was compiled with, or None.
        recoveries: how many times the graph was searched.
    """

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self._gm = gm
        self._found: dict[tuple[Any, ...], dict[int, DecodeLoop]] = {}
        self.recoveries = 0
        self.loop = self._recover(example_inputs)
        if self.loop is not None and not any(isinstance(v, torch.SymInt) for v in example_inputs):
            self._found[self._key(example_inputs)] = {self.loop.prompt_length: self.loop}

    def loop_for(self, arguments: Sequence[Any]) -> DecodeLoop:
        """The loop that the graph is for these arguments.

        Raises:
            LoopError: with these sizes there is no loop that can be compiled.
        """
        assert self.loop is not None
        length = arguments[self.loop.prompt_index].shape[-1]
        found = self._found.setdefault(self._key(arguments), {})
        if length in found:
            return found[length]
        first, *others = [*found.values()] or [None]
        if first is not None and any(_alike(first, other) for other in others):
            return first
        loop = self._recover(arguments)
        if loop is None:
            raise LoopError(
                "with this prompt the function holds no decode loop", f"prompt length {length}", "ask for two tokens"
            )
        found[length] = loop
        return loop

    def _recover(self, inputs: Sequence[Any]) -> DecodeLoop | None:
        self.recoveries += 1
        return find_loop(self._gm, inputs)

    def _key(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """The batch, and the integers that are not the prompt's length."""
        assert self.loop is not None
        placeholders = [node for node in self._gm.graph.nodes if node.op == "placeholder"]
        values = [node.meta.get("example_value") for node in placeholders]
        prompt = values[self.loop.prompt_index]
        length = _expression(prompt.shape[-1]) if isinstance(prompt, torch.Tensor) else None
        pairs = zip(values, arguments, strict=False)
        others = [v for known, v in pairs if isinstance(v, int) and (length is None or _expression(known) != length)]
        return (*arguments[self.loop.prompt_index].shape[:-1], *others)


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else None


def _alike(loop: DecodeLoop, other: DecodeLoop) -> bool:
    same = (
        loop.outputs == other.outputs
        and loop.iterations == other.iterations
        and loop.fixed_floats == other.fixed_floats
    )
    return same and step_text(loop.step.graph) == step_text(other.step.graph)


def find_loop(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> DecodeLoop | None:
    """Recover the loop; a draw in a graph that Dynamo had to break is an error, not a graph without a loop."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    loop = recover_loop(gm, example_inputs)
    if loop is None and getattr(reason, "graph_break", False) and any(is_draw(node) for node in gm.graph.nodes):
        raise LoopError(
            "the decode loop has Python control flow that depends on data, or code that Dynamo cannot trace",
            str(reason.reason).strip().splitlines()[0] if reason else "",
            "remove the branch: pass eos_token_id instead of `if token == eos: break`; keep prints and .item() outside",
        )
    return loop


def _refuse_state(loop: DecodeLoop) -> None:
    """A cache that is made outside of the function would be left without the keys that the loop puts into it."""
    if None in loop.outputs:
        raise LoopError(
            "Only tokens can be returned from a decode loop.",
            f"{loop.outputs.count(None)} other tensors are returned, or kept in a cache made outside of the function",
            "make the cache inside of the function, or use @smc_compile.decode, which leaves caches as they are",
        )


def _raiser(error: SMCError) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail
