"""A decode loop with a cache in it: its first iteration, which reads the whole prompt, is the model without a cache.

    model(prompt) --> token 0     model(token 0, cache) --> token 1     model(token 1, cache) --> token 2 ...
    `---- iteration 0 ----'       `------ iteration 1 -------'          `------ iteration 2 -------'

Whatever later iterations keep, and whatever they keep it in, the first iteration computes it from tokens alone. So the
step is the first iteration for a prompt of any length (`lengths_in_prompt`), without the buffers that it fills
(`cache_buffers`). The later iterations are not read as code: `as_written.CachedIterations` runs the loop as it was
written, on random tokens, and compares what every token is drawn from with the step on all tokens so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from smc_compile.errors import LoopError
from smc_compile.passes.fx_tools import describe, reachable
from smc_compile.passes.loop.cache_buffers import BufferFree
from smc_compile.passes.loop.concretise import Concrete
from smc_compile.passes.loop.iterations import Iterations, iteration_nodes
from smc_compile.passes.loop.leaves import Leaf, flatten
from smc_compile.passes.loop.lengths import (
    Lengths,
    Sample,
    TracedCalls,
    UnclearLengths,
    Uneven,
    fit_all,
    is_integer,
    solve_lengths,
    symbolic_length,
)
from smc_compile.passes.loop.needs_value import ShortPrompt
from smc_compile.passes.loop.padded_buffer import unclear_in_words
from smc_compile.passes.loop.tensor_info import TOKEN_DTYPES, plain_tensor, tensor_info
from smc_compile.passes.loop.token_labels import Layouts


def carries_cache(layouts: Layouts, tokens: Sequence[fx.Node]) -> bool:
    """Whether iteration 0 reads the whole prompt, and iteration 1 of all tokens only token 0."""
    iterations = Iterations(layouts, tokens, cached=True)
    try:
        first = iteration_nodes(iterations, 0)
    except LoopError:
        return False
    if all(iterations.read_length(node, source, 0) is None for node in first for source in node.all_input_nodes):
        return False
    newest = iterations.history[layouts.prompt_length : layouts.prompt_length + 1]
    second = _needed_by_second(iterations)
    pairs = [(node, source) for node in second for source in node.all_input_nodes]
    if any(iterations.reads_history(node, source, 1) for node, source in pairs):
        return False
    return any(pair in layouts.readings and layouts.readings[pair].columns == newest for pair in pairs)


def _needed_by_second(iterations: Iterations) -> set[fx.Node]:
    """What token 1 depends on, back to token 0 and through the cache to iteration 0."""
    first, second, *_ = iterations.tokens
    return reachable([second], lambda node: [s for s in iterations.predecessors(node, 1) if s is not first])


def lengths_in_prompt(
    graph_at: Callable[[dict[Any, int]], fx.Graph], iterations: Iterations, closure: Sequence[fx.Node]
) -> Lengths:
    """The integers of the first iteration that grow with the prompt.

    If Dynamo traced the prompt with a symbolic length, they are read off the graphs of two longer prompts, which
    ``graph_at`` gives; if not, they are derived from shapes.

    Raises:
        ShortPrompt: the graph holds for prompts of one token only.
        LoopError: an integer does not grow evenly, or the graph does not tell which of its integers grow.
    """
    length = iterations.layouts.prompt_length
    size = symbolic_length(iterations.layouts.prompt)
    if size is None:
        return _lengths_by_shapes(iterations, closure, length)
    longer = [list(graph_at({size: length + more}).nodes) for more in (1, 2)]
    order = iterations.layouts.order
    samples: dict[Leaf, list[Sample]] = {}
    for node in closure:
        leaves = [flatten(n) for n in (node, longer[0][order[node]], longer[1][order[node]])]
        for at, values in enumerate(zip(*leaves, strict=True)):
            if is_integer(values[0]):
                samples[node, at] = [(length + more, value) for more, value in enumerate(values)]
    try:
        return fit_all(samples)
    except Uneven as error:
        v0, v1, v2 = (value for _, value in error.samples)
        raise LoopError(
            "An integer of the decode loop does not grow evenly with the prompt.",
            f"{describe(error.leaf[0])} uses {v0}, {v1} and {v2} for prompts of {length} to {length + 2} tokens",
            "compute shapes and positions from ids.shape[1] by sums and constant multiples only",
        ) from None


def _lengths_by_shapes(iterations: Iterations, closure: Sequence[fx.Node], length: int) -> Lengths:
    if length == 1:
        raise ShortPrompt(
            "A loop with a cache in it cannot be traced with a prompt of one token.",
            "then the first call looks like all others, and does not show the model on a text",
            "give a prompt of two tokens or more, or use @smc_compile.decode",
        )
    calls = TracedCalls(closure, iterations.tokens[0], length, iterations.texts_read(closure), {})
    try:
        return solve_lengths(calls)
    except UnclearLengths as error:
        raise LoopError(
            "The loop has a cache in it and was traced for one prompt length only.",
            f"which of its numbers are the prompt's length is not clear: {unclear_in_words(error, length)}",
            "use @smc_compile.decode, or torch.compile(..., dynamic=True) with a prompt of two tokens or more",
        ) from None


def known_integers(
    concrete: Concrete, example_inputs: Sequence[Any], inputs: Sequence[fx.Node]
) -> list[torch.Tensor | None]:
    """For each input its value if it is a single integer (a cache counts its tokens in one), else None."""
    given = dict(zip(concrete.graph.find_nodes(op="placeholder"), example_inputs, strict=False))
    values = [plain_tensor(given[node]) if _is_single_integer(node) else None for node in inputs]
    return [None if value is None else value.detach().cpu() for value in values]


def _is_single_integer(node: fx.Node) -> bool:
    info = tensor_info(node)
    return info is not None and info.dtype in TOKEN_DTYPES and info.numel == 1


def cache_in_words(free: BufferFree) -> str:
    """What kind of cache was found, for the report."""
    if free.buffers:
        lengths = " and ".join(str(n) for n in sorted({buffer.length for buffer in free.buffers}))
        kind = f"{len(free.buffers)} preallocated tensors of {lengths} positions"
    elif free.grown:
        kind = f"{free.grown} tensors that grow by concatenation"
    else:
        kind = "tensors handed from iteration to iteration"
    return f"cache in the loop: {kind}, replaced by the compiler's own"
