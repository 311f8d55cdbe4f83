"""A decode loop with a cache in it: its first iteration, which reads the whole prompt, is the model without a cache.

    model(prompt) --> token 0     model(token 0, cache) --> token 1     model(token 1, cache) --> token 2 ...
    `------ iteration 0 ------´        `--------- iteration 1 ---------´          `--------- iteration 2 ---------´

Whatever the later iterations keep, and whatever it is kept in, the first iteration computes it from tokens alone. So the step is
the first iteration, with the prompt's length made symbolic (`_growth`) and without the buffers that it fills
(`cache_buffers`). The later iterations are not read as code at all: `CachedTrips.check` runs the loop as it was written, on
random tokens, and compares what every token is drawn from with the step on all tokens so far.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from smc_compile.errors import LoopError
from smc_compile.passes.loop.as_written import CachedIterations
from smc_compile.passes.loop.cache_buffers import Buffer, without_buffers
from smc_compile.passes.loop.concretise import Concrete, concretise
from smc_compile.passes.loop.iterations import Iterations, Leaves, describe, iteration_nodes
from smc_compile.passes.loop.leaves import flatten
from smc_compile.passes.loop.ones_masks import drop_ones_masks
from smc_compile.passes.loop.op_tables import (
    TOKEN_DTYPES,
    plain_tensor,
    tensor_info,
)
from smc_compile.passes.loop.padded_buffer import resolve_lengths
from smc_compile.passes.loop.step_graph import build_step
from smc_compile.passes.loop.token_labels import Layouts

log = logging.getLogger(__name__)


NO_END = "leave the end-of-sequence handling out of the loop and pass eos_token_id instead"


FROM_IDS = "make masks and positions inside of the function, torch.ones_like(ids) or torch.arange(ids.shape[1])"


MORE = 40  # tokens that a prompt is longer by in the second comparison: a cropped cache shows there


class ShortPrompt(LoopError):
    """The prompt has one token: the loop may be traced with a longer one."""


@dataclass(frozen=True)
class CachedStep:
    """The step of a loop with a cache.

    Attributes:
        step: ``forward(ids [B, S], *invariants) -> token``, for any S.
        invariants: the placeholders of the graph behind the other inputs.
        closure: the nodes of the first iteration.
        known: (placeholder, value) of integer inputs that the step holds as constants.
        check: compares the step with all iterations.
        report: what was found, for a person.
    """

    step: fx.GraphModule
    invariants: list[fx.Node]
    closure: list[fx.Node]
    known: tuple[tuple[fx.Node, int], ...]
    check: CachedIterations
    report: list[str]


def carries_cache(layouts: Layouts, tokens: Sequence[fx.Node]) -> bool:
    """Whether the first iteration reads the prompt as a whole, and the second the token before it alone."""
    iterations = Iterations(layouts, tokens, cached=True)
    try:
        first = iteration_nodes(iterations, 0)
    except LoopError:
        return False
    if all(iterations.read_length(node, source, 0) is None for node in first for source in node.all_input_nodes):
        return False
    newest = iterations.history[layouts.prompt_length : layouts.prompt_length + 1]
    alone = False
    for node in _iteration_closure(iterations, 1):
        for source in node.all_input_nodes:
            if iterations.read_length(node, source, 1) is not None:
                return False
            reading = layouts.readings.get((node, source))
            alone = alone or (reading is not None and reading.columns == newest)
    return alone


def recover_cached(
    gm: fx.GraphModule, example_inputs: Sequence[Any], concrete: Concrete, layouts: Layouts, tokens: Sequence[fx.Node]
) -> CachedStep:
    """The step of a loop whose later iterations read one token and a cache.

    Raises:
        LoopError: what the first iteration is for another length is not clear.
    """
    if concrete.unrolled:
        raise LoopError(
            "A torch.while_loop carries a cache.",
            "its iterations are traced as one graph, which never shows the model on a whole prompt",
            "write the loop with `for`, and compile it with @smc_compile.decode",
        )
    iterations = Iterations(layouts, tokens, cached=True)
    closure = iteration_nodes(iterations, 0)
    growing = _growth(gm, example_inputs, concrete, iterations, closure)
    written, invariants = build_step(gm, iterations, closure, growing)
    drop_ones_masks(written)
    _refuse_long_inputs(invariants, _symbol(layouts.prompt))
    values = [_known_integer(concrete, example_inputs, node) for node in invariants]
    free = without_buffers(written, layouts.batch, [tensor_info(node) for node in invariants], values)
    known = tuple((node, int(v)) for node, v in zip(invariants, values, strict=True) if v is not None)
    invariants = list(itertools.compress(invariants, free.kept))
    size = _symbol(layouts.prompt)
    end = longest_text(layouts.prompt)
    more = MORE if end is None else min(MORE, end - len(tokens) - layouts.prompt_length)
    longer = None
    if size is not None and more > 0:
        longer = concretise(gm, example_inputs, {size: layouts.prompt_length + more}).graph
    check = CachedIterations(
        gm, concrete.graph, longer, more, layouts.prompt, tuple(tokens), free.step, tuple(invariants)
    )
    return CachedStep(free.step, invariants, closure, known, check, _report(free.buffers, free.grown))


def _iteration_closure(iterations: Iterations, iteration: int) -> list[fx.Node]:
    """What an iteration's token depends on, back to the tokens before it and through the cache to earlier iterations."""
    order, earlier = iterations.layouts.order, set(iterations.tokens[:iteration])
    pending, found = [iterations.tokens[iteration]], {iterations.tokens[iteration]}
    while pending:
        for source in iterations.predecessors(pending.pop(), iteration):
            if source not in found and source not in earlier:
                found.add(source)
                pending.append(source)
    return sorted(found, key=order.__getitem__)


def _refuse_long_inputs(invariants: Sequence[fx.Node], size: sympy.Expr | None) -> None:
    """An input as long as the prompt has no value for the tokens behind it."""
    for node in invariants:
        example = node.meta.get("example_value")
        shape = example.shape if isinstance(example, torch.Tensor) else ()
        if any(isinstance(s, torch.SymInt) and size in s.node.expr.free_symbols for s in shape):
            raise LoopError(
                "An input of a loop with a cache is as long as the prompt.",
                f"`{node.name}` {tuple(shape)}: what it holds for the tokens behind the prompt is not known",
                FROM_IDS,
            )


def _known_integer(concrete: Concrete, example_inputs: Sequence[Any], node: fx.Node) -> torch.Tensor | None:
    """The value of a single integer among the inputs: a cache counts its tokens in one."""
    info = tensor_info(node)
    if info is None or info.dtype not in TOKEN_DTYPES or info.numel != 1:
        return None
    placeholders = [n for n in concrete.graph.nodes if n.op == "placeholder"]
    value = plain_tensor(example_inputs[placeholders.index(node)])
    return None if value is None else value.detach().cpu()


def _growth(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    concrete: Concrete,
    iterations: Iterations,
    closure: Sequence[fx.Node],
) -> Leaves:
    """(a, b) of the integers of the first iteration that are a*S + b: read off the graph of two longer prompts.

    Raises:
        LoopError: an integer does not grow evenly, or the graph holds for this one prompt length and does not tell.
    """
    length = iterations.layouts.prompt_length
    size = _symbol(iterations.layouts.prompt)
    if size is None:
        return _growth_of_constants(iterations, closure, length)
    longer = [list(concretise(gm, example_inputs, {size: length + k}).graph.nodes) for k in (1, 2)]
    order = iterations.layouts.order
    growing: Leaves = {}
    for node in closure:
        leaves = [flatten(n) for n in (node, longer[0][order[node]], longer[1][order[node]])]
        for at, (v0, v1, v2) in enumerate(zip(*leaves, strict=True)):
            if isinstance(v0, int) and not isinstance(v0, bool) and v0 != v1:
                if v2 - v1 != v1 - v0:
                    raise LoopError(
                        "An integer of the decode loop does not grow evenly with the prompt.",
                        f"{describe(node)} uses {v0}, {v1} and {v2} for prompts of {length} to {length + 2} tokens",
                        "compute shapes and positions from ids.shape[1] by sums and constant multiples only",
                    )
                growing[node, at] = (v1 - v0, v0 - (v1 - v0) * length)
    return growing


def _symbol(prompt: fx.Node) -> sympy.Expr | None:
    """The prompt's length as Dynamo knows it; None if it is a number there."""
    example = prompt.meta.get("example_value")
    size = example.shape[-1] if isinstance(example, torch.Tensor) else None
    return size.node.expr if isinstance(size, torch.SymInt) else None


def longest_text(prompt: fx.Node) -> int | None:
    """The longest text for which the code of the first iteration is the one that was traced; None if there is no end.

    A branch on a length leaves a guard: the model's window begins, a cache is full, the loop crops its cache.
    """
    symbol = _symbol(prompt)
    if not isinstance(symbol, sympy.Symbol):
        return None
    ends = [_end(guard.expr, symbol) for guard in prompt.meta["example_value"].shape[-1].node.shape_env.guards]
    return min((end for end in ends if end is not None), default=None)


def _end(guard: sympy.Basic, symbol: sympy.Symbol) -> int | None:
    """The last value up to which a guard holds, if it fails for large ones."""

    def holds(value: int) -> bool:
        return guard.xreplace({symbol: sympy.Integer(value)}) != sympy.false

    low, high = 2, 2**20 + 7
    if symbol not in guard.free_symbols or holds(high):
        return None
    while low < high and not holds(low):  # a guard that begins somewhere
        low += 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _growth_of_constants(iterations: Iterations, closure: Sequence[fx.Node], length: int) -> Leaves:
    """For a graph of one prompt length: which of its numbers are that length, by shapes."""
    if length == 1:
        raise ShortPrompt(
            "A loop with a cache in it cannot be traced with a prompt of one token.",
            "then the first call looks like all others, and does not show the model on a text",
            "give a prompt of two tokens or more, or use @smc_compile.decode",
        )
    try:
        return resolve_lengths(iterations, closure, {}, length)
    except LoopError as error:
        raise LoopError(
            "The loop has a cache in it and was traced for one prompt length only.",
            f"which of its numbers are the prompt's length is not clear: {error.why}",
            "use @smc_compile.decode, or torch.compile(..., dynamic=True) with a prompt of two tokens or more",
        ) from error


def _report(buffers: Sequence[Buffer], grown: int) -> list[str]:
    if buffers:
        lengths = " and ".join(str(n) for n in sorted({buffer.length for buffer in buffers}))
        kind = f"{len(buffers)} preallocated tensors of {lengths} positions"
    else:
        kind = f"{grown} tensors that grow by concatenation" if grown else "tensors handed from iteration to iteration"
    return [f"cache in the loop: {kind}, replaced by the compiler's own"]
