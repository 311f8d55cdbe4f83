"""The decode loop that a graph of Dynamo holds, for every prompt that the graph is called with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from smc_compile.errors import LoopError
from smc_compile.passes.loop.draws import is_draw
from smc_compile.passes.loop.recover import DecodeLoop
from smc_compile.passes.pipeline import recover_loop


class LoopFinder:
    """The decode loop of one graph. Nothing is searched before it is asked for.

    A recovered loop holds for one batch, one prompt length and one value of each other symbolic integer. The graph of
    another length is recovered again; once two lengths gave the same step and outputs, the length does not matter.

    Attributes:
        recoveries: how many times the graph was searched.
    """

    def __init__(self, gm: fx.GraphModule, tokens_only: bool = False) -> None:
        """With ``tokens_only`` the function itself runs on the tokens: see ``recover_loop``."""
        self._gm, self._tokens_only = gm, tokens_only
        self._found: dict[tuple[Any, ...], dict[int, DecodeLoop]] = {}  # by sizes, and by the prompt's length
        self._in_parts: dict[tuple[Any, ...], DecodeLoop | None] = {}  # by sizes
        self._prompt_index: int | None = None
        self.recoveries = 0

    def loop_for(self, arguments: Sequence[Any], exact: bool = False) -> DecodeLoop | None:
        """The loop that the graph is for these arguments of its own; None if it never was one.

        Args:
            exact: whether its iterations must be those of this very prompt length.

        Raises:
            LoopError: there is a loop that cannot be compiled, or there is none with these sizes alone.
        """
        known = self._known(arguments)
        if known is not None and not (exact and known.prompt_length != arguments[known.prompt_index].shape[-1]):
            return known
        self.recoveries += 1
        loop = find_loop(self._gm, arguments, self._tokens_only)
        if loop is None:
            if self._prompt_index is None:
                return None
            length = arguments[self._prompt_index].shape[-1]
            raise LoopError(
                "with this prompt the function holds no decode loop", f"prompt length {length}", "ask for two tokens"
            )
        self._prompt_index = loop.prompt_index
        if not any(isinstance(value, torch.SymInt) for value in arguments):
            self._found.setdefault(self._sizes(arguments), {})[loop.prompt_length] = loop
        return loop

    def loop_in_parts(self, arguments: Sequence[Any]) -> DecodeLoop | None:
        """The loop where iterations need not be alike (see `DecodeLoop.parts`), or where there is one alone.

        It holds for this very prompt length.
        """
        sizes = tuple(size for v in arguments for size in (v.shape if isinstance(v, torch.Tensor) else (v,)))
        if sizes and any(isinstance(size, torch.SymInt) for size in sizes):  # of the trace itself
            return recover_loop(self._gm, arguments, self._tokens_only, parts=True)
        if sizes not in self._in_parts:
            self.recoveries += 1
            self._in_parts[sizes] = recover_loop(self._gm, arguments, self._tokens_only, parts=True)
        return self._in_parts[sizes]

    def input_names(self, loop: DecodeLoop) -> list[str]:
        """The names by which Dynamo knows the prompt and the other inputs of a loop's step."""
        placeholders = self._gm.graph.find_nodes(op="placeholder")
        return [placeholders[index].name for index in (loop.prompt_index, *loop.invariant_indices)]

    def _known(self, arguments: Sequence[Any]) -> DecodeLoop | None:
        if self._prompt_index is None:
            return None
        found = self._found.get(self._sizes(arguments), {})
        length = arguments[self._prompt_index].shape[-1]
        if length in found or not found or not self._is_affine():
            return found.get(length)
        first, *others = found.values()
        return first if any(_alike(first, other) for other in others) else None

    def _is_affine(self) -> bool:
        """Whether all integers of the graph are sums and multiples of sizes, so that two lengths show all."""
        values = (node.meta.get("example_value") for node in self._gm.graph.nodes)
        sizes = [value.node.expr for value in values if isinstance(value, torch.SymInt)]
        return all(not size.free_symbols or _is_linear(size) for size in sizes)

    def _sizes(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """The batch, and the integers that are not the prompt's length."""
        assert self._prompt_index is not None
        placeholders = [node for node in self._gm.graph.nodes if node.op == "placeholder"]
        values = [node.meta.get("example_value") for node in placeholders]
        prompt = values[self._prompt_index]
        length = _expression(prompt.shape[-1]) if isinstance(prompt, torch.Tensor) else None
        pairs = zip(values, arguments, strict=False)
        others = [v for known, v in pairs if isinstance(v, int) and (length is None or _expression(known) != length)]
        return (*arguments[self._prompt_index].shape[:-1], *others)


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else None


def _is_linear(size: sympy.Expr) -> bool:
    symbols = sorted(size.free_symbols, key=str)
    return bool(size.is_polynomial(*symbols)) and sympy.Poly(size, *symbols).total_degree() <= 1


def _alike(loop: DecodeLoop, other: DecodeLoop) -> bool:
    same = (
        loop.outputs == other.outputs
        and loop.iterations == other.iterations
        and loop.fixed_floats == other.fixed_floats
    )
    return same and step_text(loop.step.graph) == step_text(other.step.graph)


def step_text(graph: fx.Graph) -> str:
    """A graph as text in which names do not count: equal for traces that differ in node names alone."""
    number = {node: i for i, node in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: f"%{number[n]}")
        target = "" if node.op in ("placeholder", "output") else torch.typename(node.target) + str(node.target)
        lines.append(f"{node.op} {target} {args} {kwargs}")
    return "\n".join(lines)


def find_loop(gm: fx.GraphModule, arguments: Sequence[Any], tokens_only: bool = False) -> DecodeLoop | None:
    """The loop in ``gm``, or None. A draw in a graph that Dynamo had to break is an error, not a graph without a loop.

    Raises:
        LoopError: there is a loop that cannot be compiled.
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    loop = recover_loop(gm, arguments, tokens_only)
    if loop is None and getattr(reason, "graph_break", False) and any(is_draw(node) for node in gm.graph.nodes):
        raise LoopError(
            "the decode loop has Python control flow that depends on data, or code that Dynamo cannot trace",
            str(reason.reason).strip().splitlines()[0] if reason else "",
            "use @smc_compile.decode, which runs the loop's own code beside its tokens; or pass eos_token_id and leave "
            "the branch out",
        )
    return loop
