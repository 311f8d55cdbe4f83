"""The iterations of an unrolled loop: which nodes belong to each, and what each reads of the text."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from smc_compile.errors import LoopError
from smc_compile.passes.fx_tools import describe, mutated_inputs, op_name
from smc_compile.passes.loop.needs_value import EndInLoop
from smc_compile.passes.loop.refusals import NO_CACHE, NO_END, READS_TEXT
from smc_compile.passes.loop.tensor_info import tensor_info
from smc_compile.passes.loop.token_labels import MOVES, Layouts

_COMPARISONS = frozenset(["eq", "ne", "isin", "lt", "le", "gt", "ge", "where", "logical_or", "or_", "and_", "any"])
_MODELS = frozenset(["embedding"])  # a model that reads the last tokens alone has a window, or lost its cache


@dataclass
class Iterations:
    """An unrolled loop seen as iterations: number t reads the prompt and ``tokens[:t]`` and draws ``tokens[t]``.

    Attributes:
        cached: iterations may hand values on to later ones, also by writing to inputs.
        writers: storage -> the nodes that write to it.
        history: the columns of the prompt and of all tokens.
        carriers: the nodes whose results are text: the prompt and the tokens.
        earlier: tokens that are drawn before; to these iterations they are the end of the prompt.
        window: the most tokens that an iteration reads: the last ones; None if each reads all.
    """

    layouts: Layouts
    tokens: Sequence[fx.Node]
    cached: bool = False
    window: int | None = None
    writers: dict[int, list[fx.Node]] = field(default_factory=dict)
    history: tuple[int, ...] = ()
    carriers: frozenset[fx.Node] = frozenset()
    earlier: Sequence[fx.Node] = ()

    def __post_init__(self) -> None:
        self.history = self.layouts.history([*self.earlier, *self.tokens])
        self.carriers = frozenset([self.layouts.prompt, *self.earlier, *self.tokens])
        self.writers = find_writers(self.layouts.nodes, self.cached)

    def part(self, start: int, stop: int | None = None) -> Iterations:
        """Some of the iterations as a loop of their own."""
        earlier, tokens = [*self.earlier, *self.tokens[:start]], self.tokens[start:stop]
        return Iterations(self.layouts, tokens, self.cached, self.window, earlier=earlier)

    @property
    def prompt_length(self) -> int:
        """Of the text before iteration 0."""
        return self.layouts.prompt_length + len(self.earlier)

    def reads_history(self, node: fx.Node, source: fx.Node, iteration: int) -> bool:
        """Whether `node` finds the whole text of the iteration in `source`, alone or with padding behind it."""
        return self.read_length(node, source, iteration) is not None

    def read_length(self, node: fx.Node, source: fx.Node, iteration: int) -> int | None:
        """How many columns, of text and of padding behind it, `node` reads; None if it reads something else."""
        reading = self.layouts.readings.get((node, source))
        if reading is None or not reading.exact or reading.columns is None:
            return None
        length, columns = self.length(iteration), reading.columns
        whole = columns[:length] == self.text(iteration)
        return len(columns) if whole and all(self.layouts.source(c) is None for c in columns[length:]) else None

    def texts_read(self, nodes: Sequence[fx.Node]) -> dict[tuple[fx.Node, fx.Node], tuple[int, ...]]:
        """Where nodes of iteration 0 read its text: (reader, source) -> the axes before the text's, () or (B,)."""
        pairs = [(node, source) for node in nodes for source in node.all_input_nodes]
        found = [pair for pair in pairs if self.reads_history(*pair, 0)]
        return {pair: (self.layouts.batch,) if self.layouts.readings[pair].ndim == 2 else () for pair in found}

    def length(self, iteration: int) -> int:
        """S, the length of the text that an iteration reads."""
        total = self.prompt_length + iteration
        return total if self.window is None else min(total, self.window)

    def text(self, iteration: int) -> tuple[int, ...]:
        """The columns that an iteration reads: the whole text, or its end that fits the window."""
        total = self.prompt_length + iteration
        return self.history[total - self.length(iteration) : total]

    def check_reading(self, node: fx.Node, source: fx.Node, iteration: int) -> None:
        """Refuse a reading of tokens that is not the whole text, in whatever arrangement ([S, B], flat)."""
        reading = self.layouts.readings.get((node, source))
        if reading is None or not reading.sources & self.carriers:
            return
        if sorted(reading.columns or ()) == sorted(self.text(iteration)):
            return
        if self.reads_end(node, source, iteration) and self.is_read_whole(iteration):
            return
        what = f"Iteration {iteration} of the decode loop reads tokens other than as the whole sequence so far."
        found = f"{describe(node)} reads `{source.name}`, which holds {self.spell(reading.columns)}"
        expected = self.spell(self.text(iteration))
        whole = any(self.reads_history(reader, read, iteration) for reader, read in self.layouts.readings)
        fix = READS_TEXT if whole else NO_CACHE
        kind: type[LoopError] = LoopError
        if reading.columns and reading.columns[: self.length(iteration)] == self.text(iteration):
            fix = "give the model the filled part of the buffer only, model(buf[:, :length])[:, -1]"
        if op_name(node) in _COMPARISONS:
            fix, kind = NO_END, EndInLoop
        raise kind(what, f"{found}; an iteration may read only {expected}", fix)

    def reads_end(self, node: fx.Node, source: fx.Node, iteration: int) -> bool:
        """Whether `node` reads the last tokens of the text, as a sampler may beside its model; not to end the text."""
        reading = self.layouts.readings.get((node, source))
        if reading is None or not reading.columns or op_name(node) in _COMPARISONS | _MODELS:
            return False
        return sorted(reading.columns) == sorted(self.text(iteration)[-len(reading.columns) :])

    def is_read_whole(self, iteration: int) -> bool:
        """Whether something reads the whole text of an iteration, other than to move it about."""
        return any(
            self.reads_history(node, source, iteration) and not moves(node, source)
            for node, source in self.layouts.readings
        )

    def read_ends(self, nodes: Sequence[fx.Node], iteration: int) -> bool:
        """Whether nodes of an iteration read the end of its text beside the whole."""
        pairs = [(node, source) for node in nodes for source in node.all_input_nodes]
        return any(self.reads_end(*pair, iteration) and not self.reads_history(*pair, iteration) for pair in pairs)

    def spell(self, columns: tuple[int, ...] | None) -> str:
        """Columns in words: ``prompt[0:4] + tokens[1:2] + constant 0``."""
        if columns is None:
            return "cells that do not form columns over the batch"
        numbers = {token: t for t, token in enumerate([*self.earlier, *self.tokens])}
        runs: list[tuple[str, int, int]] = []
        for column in columns:
            source = self.layouts.source(column)
            if source is None:
                name, at = f"constant {column}", -1
            elif source is self.layouts.prompt:
                name, at = "prompt", column - self.history[0]
            elif source in numbers and self.layouts.is_token(column):
                name, at = "tokens", numbers[source]
            else:
                name, at = f"`{source.name}`", -1
            if runs and runs[-1][0] == name and (at < 0 or runs[-1][2] == at):
                runs[-1] = (name, runs[-1][1], at + 1)
            else:
                runs.append((name, at, at + 1))
        shown = [name if start < 0 else f"{name}[{start}:{stop}]" for name, start, stop in runs]
        return " + ".join(shown[:8]) + (" + ..." if len(shown) > 8 else "")

    def predecessors(self, node: fx.Node, iteration: int) -> list[fx.Node]:
        """What a node needs besides the text: its inputs, and the earlier writes to their storage."""
        needed: dict[fx.Node, None] = {}
        for source in node.all_input_nodes:
            if self.reads_history(node, source, iteration):
                continue
            needed[source] = None
            needed.update(dict.fromkeys(self.writes(source, node)))
        return list(needed)

    def writes(self, source: fx.Node, before: fx.Node) -> list[fx.Node]:
        """The writes to the storage of `source` that come before a node."""
        info, order = tensor_info(source), self.layouts.order
        found = self.writers.get(info.storage, []) if info is not None else []
        return [writer for writer in found if order[writer] < order[before]]


def moves(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node only puts the cells of a source elsewhere; an index says which cells of another are read."""
    name = op_name(node)
    if name in ("getitem", "gather", "index_select", "take_along_dim"):
        return bool(node.args) and node.args[0] is source
    return name in MOVES or name in ("to", "long", "int", "size", "setitem", "slice", "output")


def find_writers(nodes: Sequence[fx.Node], to_inputs: bool = False) -> dict[int, list[fx.Node]]:
    """Storage -> nodes that write to it, in program order.

    Raises:
        LoopError: a node writes to an input or a parameter, and ``to_inputs`` is False.
    """
    inputs = [node for node in nodes if node.op in ("placeholder", "get_attr")]
    owners = {info.storage: node for node in inputs if (info := tensor_info(node)) is not None}
    writers: dict[int, list[fx.Node]] = defaultdict(list)
    for node in nodes:
        for target in mutated_inputs(node):
            info = tensor_info(target)
            if info is None:
                continue
            if info.storage in owners and not to_inputs:
                raise LoopError(
                    "The decode loop writes into one of its inputs.",
                    f"{describe(node)} changes `{owners[info.storage].name}` in place",
                    "write to a copy made inside the function; a model with its own cache or counters must run without",
                )
            writers[info.storage].append(node)
    return dict(writers)


def iteration_nodes(iterations: Iterations, iteration: int) -> list[fx.Node]:
    """The nodes that compute an iteration's token from its text, in program order.

    Raises:
        LoopError: one of them reads tokens in another way than as the whole text.
    """
    order, nodes = iterations.layouts.order, iterations.layouts.nodes
    queue, found = [-order[iterations.tokens[iteration]]], {iterations.tokens[iteration]}
    while queue:
        node = nodes[-heapq.heappop(queue)]
        if node.op == "placeholder" and node is iterations.layouts.prompt:
            raise LoopError(
                f"Iteration {iteration} of the decode loop does not read the whole sequence so far.",
                f"the prompt `{node.name}` is used apart from the tokens drawn after it",
                NO_CACHE,
            )
        for source in node.all_input_nodes:
            if not iterations.reads_history(node, source, iteration):
                iterations.check_reading(node, source, iteration)
        for source in iterations.predecessors(node, iteration):
            if source not in found:
                found.add(source)
                heapq.heappush(queue, -order[source])
    return sorted(found, key=order.__getitem__)
