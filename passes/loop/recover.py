"""Recovers the decode loop from the unrolled graph that Dynamo hands to a backend.

    prompt --> [iteration 0] --> token 0 --> [iteration 1] --> token 1 --> ...        becomes        step(ids) -> token

1. `concretise`: sizes become numbers, so one static path remains.
2. `token_labels.interpret`: which token stands in which cell of every integer value.
3. The tokens are the columns that some node reads behind the prompt; `iterations` proves that iteration t is a function of
   the prompt and tokens 0..t-1 alone, and the same function for every t.
4. Outputs are described by how they are put together from prompt and tokens.

A model may read the tokens in a padded buffer (`padded_buffer`); the loop may be a `torch.while_loop` (`unroll_while`).
The result holds for one batch size and one prompt length (those of `example_inputs`); `step` itself takes any length.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from smc_compile.passes.loop.alike import compare_iterations
from smc_compile.passes.loop.as_written import CachedIterations, PaddedIteration
from smc_compile.passes.loop.concretise import Concrete, concretise
from smc_compile.passes.loop.iterations import Iterations, Leaves, describe, iteration_nodes
from smc_compile.passes.loop.kv_loop import carries_cache, longest_text, recover_cached
from smc_compile.passes.loop.lookups import simplify_lookups
from smc_compile.passes.loop.ones_masks import drop_ones_masks
from smc_compile.passes.loop.op_tables import TOKEN_DTYPES, is_draw, tensor_info
from smc_compile.passes.loop.outputs import OutputLayout, _output_layout, _output_nodes
from smc_compile.passes.loop.padded_buffer import (
    draw_inputs,
    last_positions,
    padded_length,
    padding_of,
    resolve_lengths,
)
from smc_compile.passes.loop.refusals import (
    _check_randomness,
    _refuse_hidden_state,
    _refuse_uncounted_tokens,
    _refuse_unrecognised_feedback,
)
from smc_compile.passes.loop.step_graph import build_step
from smc_compile.passes.loop.token_labels import Layouts, interpret

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class DecodeLoop:
    """A decode loop as data.

    Attributes:
        step: ``forward(ids [B, S], *invariants) -> token`` of one iteration, for any S.
        prompt_index: which placeholder of the original graph is the prompt.
        invariant_indices: which placeholders feed the other inputs of `step`.
        iterations: how many tokens the loop draws.
        outputs: how each output of the graph is put together; None for a cache that was made outside and is put back.
        report: what was found, in lines for a person.
        fixed_floats: (placeholder, value) of Python floats that Dynamo lifted to inputs and that `step` holds as
            constants: the result is wrong for other values. Temperatures and the like stay inputs.
        padded: the iteration as it was written, if it reads a padded buffer.
        cached: the iterations as they were written, if they hand on a cache.
        longest: the longest text that `step` holds for, if the loop takes another path for longer ones.
    """

    step: fx.GraphModule
    prompt_index: int
    invariant_indices: tuple[int, ...]
    iterations: int
    prompt_length: int
    batch: int
    outputs: tuple[OutputLayout | None, ...]
    report: list[str] = field(default_factory=list)
    fixed_floats: tuple[tuple[int, float], ...] = ()
    padded: PaddedIteration | None = None
    cached: CachedIterations | None = None
    longest: int | None = None

    def check(self, arguments: Sequence[Any]) -> None:
        """Compare `step` with the iterations as they were written, if these read padded buffers or caches.

        Args:
            arguments: those of the graph.

        Raises:
            LoopError: the two differ: the model reads the padding, or the loop does not keep its cache.
        """
        if self.cached is not None:
            self.cached.check(arguments)
        if self.padded is not None:
            self.padded.check(arguments[self.prompt_index], [arguments[i] for i in self.invariant_indices])


def recover_loop(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> DecodeLoop | None:
    """The decode loop in `gm`, or None if it holds no token that is drawn and fed back (then it is not ours).

    Raises:
        LoopError: there is a loop, but not one that can be compiled.
    """
    concrete = concretise(gm, example_inputs)
    nodes = list(concrete.graph.nodes)
    if not any(is_draw(node) for node in nodes):
        log.info("no sampling and no argmax in the graph: left as it is")
        return None
    found = _find_tokens(nodes)
    if found is None:
        _refuse_unrecognised_feedback(nodes)
        log.info("no token is drawn from a sequence and fed back (a loop of one trip counts as none): left as it is")
        return None
    layouts, tokens = found
    _refuse_hidden_state(nodes)
    _refuse_uncounted_tokens(concrete, tokens)
    if carries_cache(layouts, tokens):
        return _cached_loop(gm, example_inputs, concrete, layouts, tokens)
    simplify_lookups(layouts)
    iterations = Iterations(layouts, tokens)
    closures = [iteration_nodes(iterations, iteration) for iteration in range(len(tokens))]
    _check_randomness(closures[0], tokens[0])
    growing = compare_iterations(iterations)
    step, invariants, padded = _step(gm, iterations, closures[0], growing)
    drawn = len(tokens) + concrete.remaining
    outputs = tuple(_output_layout(iterations, output, concrete.remaining) for output in _output_nodes(nodes))
    placeholders = [node for node in nodes if node.op == "placeholder"]
    return DecodeLoop(
        step=step,
        prompt_index=placeholders.index(layouts.prompt),
        invariant_indices=tuple(placeholders.index(node) for node in invariants),
        iterations=drawn,
        prompt_length=layouts.prompt_length,
        batch=layouts.batch,
        outputs=outputs,
        report=_report(iterations, drawn, closures[0], growing, outputs, padded),
        fixed_floats=concrete.fixed_floats,
        padded=padded,
    )


def _cached_loop(
    gm: fx.GraphModule, example_inputs: Sequence[Any], concrete: Concrete, layouts: Layouts, tokens: list[fx.Node]
) -> DecodeLoop:
    """A loop that hands a cache from iteration to iteration."""
    found = recover_cached(gm, example_inputs, concrete, layouts, tokens)
    _check_randomness(found.closure, tokens[0])
    iterations = Iterations(layouts, tokens, cached=True)
    returned = _output_nodes(layouts.nodes)
    outputs = tuple(None if _is_state(iterations, node) else _output_layout(iterations, node) for node in returned)
    placeholders = [node for node in layouts.nodes if node.op == "placeholder"]
    known = tuple((placeholders.index(node), float(value)) for node, value in found.known)
    return DecodeLoop(
        step=found.step,
        prompt_index=placeholders.index(layouts.prompt),
        invariant_indices=tuple(placeholders.index(node) for node in found.invariants),
        iterations=len(tokens),
        prompt_length=layouts.prompt_length,
        batch=layouts.batch,
        outputs=outputs,
        report=_report(iterations, len(tokens), found.closure, {}, outputs, None, found.report),
        fixed_floats=concrete.fixed_floats + known,
        cached=found.check,
        longest=longest_text(layouts.prompt),
    )


def _is_state(iterations: Iterations, output: Any) -> bool:
    """An output without a token in it: Dynamo returns what a cache made outside of the function is left with."""
    labels = iterations.layouts.outputs.get(output) if isinstance(output, fx.Node) else None
    sources = set() if labels is None else {iterations.layouts.source(label) for label in labels.flatten().tolist()}
    return not sources & iterations.carriers


def _step(
    gm: fx.GraphModule, iterations: Iterations, closure: Sequence[fx.Node], growing: Leaves
) -> tuple[fx.GraphModule, list[fx.Node], PaddedIteration | None]:
    """One iteration that reads the history alone, also when the loop reads it in a padded buffer."""
    length = padded_length(iterations, closure)
    if length is None:
        step, invariants = build_step(gm, iterations, closure, growing)
        drop_ones_masks(step)
        return step, invariants, None
    sizes = {**growing, **resolve_lengths(iterations, closure, growing, length)}
    fixed = last_positions(closure, growing)
    sizes = {leaf: pair for leaf, pair in sizes.items() if leaf not in fixed}
    step, invariants = build_step(gm, iterations, closure, sizes, fixed)
    seen = draw_inputs(iterations.tokens[0], closure, [node for node in closure if is_draw(node)])
    written, _ = build_step(gm, iterations, closure, growing, seen=seen, padded=True)
    rewritten, _ = build_step(gm, iterations, closure, sizes, fixed, seen=seen)
    padding = padding_of(iterations, closure)
    return step, invariants, PaddedIteration(written, rewritten, padding, length, bool(seen))


def _find_tokens(nodes: Sequence[fx.Node]) -> tuple[Layouts, list[fx.Node]] | None:
    """The prompt and the nodes whose results follow it in what the model reads or the function returns."""
    for prompt in filter(_may_be_prompt, nodes):
        layouts = interpret(nodes, prompt)
        tokens = _tokens_behind(layouts)
        late = _tokens_returned(layouts, tokens)
        if len(tokens + late) >= 2 and (tokens or carries_cache(layouts, late)):
            return layouts, tokens + late
    return None


def _may_be_prompt(node: fx.Node) -> bool:
    info = tensor_info(node)
    if node.op != "placeholder" or info is None or info.dtype not in TOKEN_DTYPES:
        return False
    return len(info.shape) in (1, 2) and info.numel > 0 and bool(node.users)


def _tokens_behind(layouts: Layouts) -> list[fx.Node]:
    """The tokens of the longest history that is read."""
    history = layouts.history(())
    longest: tuple[int, ...] = ()
    for reading in layouts.readings.values():
        columns = reading.columns or ()
        if columns[: len(history)] != history:
            continue
        tail = tuple(itertools.takewhile(layouts.is_token, columns[len(history) :]))
        longest = max(longest, tail, key=len)
    return [source for column in longest if (source := layouts.source(column)) is not None]


def _tokens_returned(layouts: Layouts, tokens: Sequence[fx.Node]) -> list[fx.Node]:
    """The tokens among the outputs that are drawn after those that are read in a history."""
    last = layouts.order[tokens[-1]] if tokens else -1
    fresh = {
        layouts.source(column)
        for labels in layouts.outputs.values()
        for column in labels.unique().tolist()
        if layouts.is_token(column)
    }
    late = [source for source in fresh if source is not None and layouts.order[source] > last]
    return sorted(late, key=layouts.order.__getitem__)


def _report(
    iterations: Iterations,
    drawn: int,
    nodes: Sequence[fx.Node],
    growing: Leaves,
    outputs: Sequence[OutputLayout | None],
    padded: PaddedIteration | None,
    cache: Sequence[str] = (),
) -> list[str]:
    layouts = iterations.layouts
    draws = [node for node in nodes if is_draw(node)]
    tokens = [layout for layout in outputs if layout is not None]
    pads = [f" + {len(layout.padding)} constants" if layout.padding else "" for layout in tokens]
    returned = [" + ".join(layout.segments) + pad for layout, pad in zip(tokens, pads, strict=True)]
    return [
        f"decode loop of {drawn} iterations",
        f"prompt `{layouts.prompt.name}` [{layouts.batch}, {layouts.prompt_length}]",
        f"token drawn by {describe(draws[-1])}",
        *(cache or [f"one iteration has {len(nodes)} nodes; {len(growing)} integers grow with the sequence length"]),
        *([f"read in a padded buffer of {padded.length} columns"] if padded is not None else []),
        *(f"returns {text}" for text in returned),
    ]
