"""The decode loop as data: its tokens, and the loop that is put together from what the passes found.

The passes run in `smc_compile.passes.pipeline.recover_loop`. A recovered loop holds for one batch size and one prompt
length; its `step` takes a text of any length.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import fx

from smc_compile.passes.fx_tools import describe
from smc_compile.passes.loop.as_written import CachedIterations, PaddedIteration
from smc_compile.passes.loop.branches import Ends
from smc_compile.passes.loop.concretise import Concrete
from smc_compile.passes.loop.draws import is_draw
from smc_compile.passes.loop.iterations import Iterations
from smc_compile.passes.loop.kv_loop import carries_cache
from smc_compile.passes.loop.lengths import longest_text, symbolic_length
from smc_compile.passes.loop.outputs import OutputLayout, output_layout, output_nodes
from smc_compile.passes.loop.refusals import hidden_tokens
from smc_compile.passes.loop.token_labels import Layouts, interpret, may_be_prompt
from smc_compile.passes.loop.windows import iteration_in_lines, window_of


@dataclass(frozen=True, eq=False)
class DecodeLoop:
    """A decode loop as data.

    Attributes:
        step: ``forward(ids [B, S], *invariants) -> token`` of one iteration, for any S.
        prompt_index: which placeholder of the original graph is the prompt.
        invariant_indices: which placeholders feed the other inputs of `step`.
        iterations: how many tokens the loop draws.
        outputs: how each output of the graph is put together; None for a cache that the caller made and gets back.
        report: what was found, in lines for a person.
        fixed_floats: (placeholder, value) of Python floats that Dynamo lifted to inputs and that `step` holds as
            constants: for other values the step is wrong. Temperatures and the like stay inputs.
        padded: the iteration as it was written, if it reads a padded buffer.
        cached: the loop as it was written, if its iterations hand on a cache.
        longest: the longest prompt for which Dynamo's trace holds; None if none is too long.
        window: the most tokens that an iteration reads: the last ones; None if each reads all.
        lines_at: the iteration that reads so many tokens, in lines (see `windows`).
        any_length: whether Dynamo traced the prompt's length as a symbol: branches on lengths have left guards.
        ends: how the loop ends its texts, if it does so before it has drawn all of them.
        ones: placeholders of masks that `step` takes for ones.
        parts: where the iterations are not alike, those that are, one after the other; the prompt of each is the text
            before it. `step` is that of the first.
        shortest: of texts that are long enough for all that `step` reads: parts of the text may be shorter or empty in
            shorter ones. 0 where it reads all of it.
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
    any_length: bool = False
    window: int | None = None
    lines_at: Callable[[int], tuple[str, ...]] = field(default=lambda length: (), compare=False)
    ends: Ends | None = None
    ones: tuple[int, ...] = ()
    shortest: int = 0
    parts: tuple[DecodeLoop, ...] = ()

    def check_ones(self, arguments: Sequence[Any]) -> None:
        """Refuse a mask that hides something, if `step` was made for masks of ones.

        Raises:
            LoopError: one does.
        """
        for index in self.ones:
            if not bool((arguments[index] == 1).all()):
                raise hidden_tokens(f"argument {index} of the graph")

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


@dataclass(frozen=True)
class RecoveredStep:
    """One iteration as a graph of its own.

    Attributes:
        step: ``forward(ids [B, S], *invariants) -> token``, for any S.
        invariants: the placeholders of the loop's graph behind the other inputs.
        closure: the nodes of iteration 0 in the loop's graph.
        report: what was found, for a person.
        known: (placeholder, value) of integer inputs that the step holds as constants.
        padded: what to compare the step with, if the iteration reads a padded buffer.
        cached: what to compare the step with, if the iterations hand on a cache.
        shortest: as of a `DecodeLoop`.
    """

    step: fx.GraphModule
    invariants: Sequence[fx.Node]
    closure: Sequence[fx.Node]
    report: Sequence[str]
    known: Sequence[tuple[fx.Node, int]] = ()
    padded: PaddedIteration | None = None
    cached: CachedIterations | None = None
    shortest: int = 0


# ---- tokens --------------------------------------------------------------------------------------------------------


def find_tokens(nodes: Sequence[fx.Node], fewest: int = 2) -> tuple[Layouts, list[fx.Node]] | None:
    """The labels of all cells, and the nodes whose results are the tokens; None if there are fewer than ``fewest``.

    A token follows the prompt in what the model reads, or in what the function returns.
    """
    found = [(layouts, _tokens_behind(layouts)) for layouts in (interpret(nodes, p) for p in nodes if may_be_prompt(p))]
    for layouts, tokens in sorted(found, key=lambda pair: not pair[1]):  # a text that is read first; masks grow as well
        late = _tokens_returned(layouts, tokens)
        if len(tokens + late) < fewest:
            continue
        if tokens or len(late) == 1 or window_of(layouts, late) or carries_cache(layouts, late):
            return layouts, tokens + late
    return None


def _tokens_behind(layouts: Layouts) -> list[fx.Node]:
    """The tokens that follow the prompt in the longest text that some node reads."""
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
    """The tokens among the outputs that come after those that some node reads: nothing reads the last token."""
    last = layouts.order[tokens[-1]] if tokens else -1
    fresh = {
        layouts.source(column)
        for labels in layouts.outputs.values()
        for column in labels.unique().tolist()
        if layouts.is_token(column)
    }
    late = [source for source in fresh if source is not None and layouts.order[source] > last]
    return sorted(late, key=layouts.order.__getitem__)


# ---- the loop ------------------------------------------------------------------------------------------------------


def decode_loop(
    concrete: Concrete,
    iterations: Iterations,
    found: RecoveredStep,
    ends: Ends | None = None,
    ones: Sequence[fx.Node] = (),
    outputs: bool = True,
) -> DecodeLoop:
    """The loop around a step; its ``outputs`` are looked at, or are none.

    Raises:
        LoopError: an output is neither the sequence nor all of its tokens.
    """
    layouts = iterations.layouts
    placeholders = [node for node in layouts.nodes if node.op == "placeholder"]
    drawn = len(iterations.tokens) + concrete.remaining
    returned = output_nodes(layouts.nodes) if outputs else []
    layout = tuple(_layout_of(iterations, output, concrete.remaining) for output in returned)
    return DecodeLoop(
        step=found.step,
        prompt_index=placeholders.index(layouts.prompt),
        invariant_indices=tuple(placeholders.index(node) for node in found.invariants),
        iterations=drawn,
        prompt_length=iterations.prompt_length,
        batch=layouts.batch,
        outputs=layout,
        report=_report(layouts, drawn, found, layout),
        fixed_floats=(*concrete.fixed_floats, *((placeholders.index(node), float(v)) for node, v in found.known)),
        padded=found.padded,
        cached=found.cached,
        longest=longest_text(layouts.prompt, every=iterations.cached),
        window=iterations.window,
        lines_at=functools.partial(iteration_in_lines, iterations),
        any_length=isinstance(symbolic_length(layouts.prompt), sympy.Symbol),
        ends=ends,
        ones=tuple(placeholders.index(node) for node in ones),
        shortest=found.shortest,
    )


def _layout_of(iterations: Iterations, output: Any, remaining: int) -> OutputLayout | None:
    return None if iterations.cached and _is_state(iterations, output) else output_layout(iterations, output, remaining)


def _is_state(iterations: Iterations, output: Any) -> bool:
    """Whether an output holds neither prompt nor tokens: Dynamo also returns the caller's cache after the loop."""
    labels = iterations.layouts.outputs.get(output) if isinstance(output, fx.Node) else None
    sources = set() if labels is None else {iterations.layouts.source(label) for label in labels.flatten().tolist()}
    return not sources & iterations.carriers


def _report(layouts: Layouts, drawn: int, found: RecoveredStep, outputs: Sequence[OutputLayout | None]) -> list[str]:
    draws = [node for node in found.closure if is_draw(node)]
    tokens = [layout for layout in outputs if layout is not None]
    pads = [f" + {len(layout.padding)} constants" if layout.padding else "" for layout in tokens]
    return [
        f"decode loop of {drawn} iterations",
        f"prompt `{layouts.prompt.name}` [{layouts.batch}, {layouts.prompt_length}]",
        f"token drawn by {describe(draws[-1])}",
        *found.report,
        *("returns " + " + ".join(layout.segments) + pad for layout, pad in zip(tokens, pads, strict=True)),
    ]
