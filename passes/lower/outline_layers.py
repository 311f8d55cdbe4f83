"""Repeated layers compile once: split a graph into what comes before its layers, one layer, and what comes after.

Layers are found by structure alone: the longest stretch of ops that repeats with a period and with equal wiring.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx
from torch._dynamo.utils import counters

from smc_compile.passes.cache.position_tables import add, multiply
from smc_compile.passes.fx_tools import output_values
from smc_compile.passes.ir import CachedLM

log = logging.getLogger(__name__)

MIN_REPEATS = 6  # below that one whole graph costs little more to compile, and runs without the calls in between
MIN_PERIOD = 8  # shorter repetitions are patterns inside a layer


class Layered:
    """A graph as ``head``, ``layer`` (called once a layer with its own weights and caches) and ``tail``.

    Values are numbered: the graph's arguments first, then what the head gives, then what each layer gives. Called like
    the graph it came from.

    Attributes:
        pieces: the three graph modules; replace their callables with ``with_pieces`` to run compiled ones.
        reads: which values each call reads: the head, every layer, the tail.
    """

    def __init__(self, pieces: Sequence[Callable[..., Any]], reads: Sequence[Sequence[int]]) -> None:
        self.pieces, self.reads = tuple(pieces), tuple(tuple(r) for r in reads)

    def with_pieces(self, pieces: Sequence[Callable[..., Any]]) -> Layered:
        return Layered(pieces, self.reads)

    def __call__(self, *arguments: Any) -> Any:
        head, layer, tail = self.pieces
        first, *layers, last = self.reads
        values = list(arguments)
        values.extend(head(*(values[i] for i in first)))
        for reads in layers:
            values.extend(layer(*(values[i] for i in reads)))
        return tail(*(values[i] for i in last))


@dataclass(frozen=True)
class _Layers:
    """Runs of consecutive nodes with equal wiring; run t reads ``inputs[t]`` and gives the nodes at ``outputs``."""

    runs: list[list[fx.Node]]
    inputs: list[list[fx.Node]]
    outputs: list[int]


def outline_layers(cached: CachedLM) -> CachedLM:
    """The same model with the graphs of a cycle split at repeated layers; without enough repetition they stay whole."""
    return replace(cached, score=outline(cached.score), advance=outline(cached.advance))


def outline(module: fx.GraphModule) -> fx.GraphModule | Layered:
    """``module`` split at its longest repetition, or ``module`` itself when nothing repeats often enough."""
    layers = find_layers(module.graph)
    if layers is None:
        return module
    counters["smc_compile"]["layers_outlined"] += len(layers.runs)
    log.debug("outlined %d layers of %d nodes", len(layers.runs), len(layers.runs[0]))
    return _split(module, layers)


def find_layers(graph: fx.Graph) -> _Layers | None:
    """The repetition that covers most nodes, at the phase where layers exchange fewest values."""
    nodes = [node for node in graph.nodes if node.op == "call_function" and not _is_size(node)]
    for start, length, period in _repetitions(nodes):
        best: _Layers | None = None
        for shift in range(min(period, length - MIN_REPEATS * period + 1)):
            repeats = (length - shift) // period
            runs = [nodes[start + shift + t * period :][:period] for t in range(repeats)]
            found = _consistent(runs)
            if found is not None and (best is None or _traffic(found) < _traffic(best)):
                best = found
        if best is not None:
            return best
    return None


def _is_size(node: fx.Node) -> bool:
    """Sizes are integers computed from shapes: every piece computes its own, so that none crosses as a constant."""
    return node.op == "call_function" and node.target in (torch.ops.aten.sym_size.int, add, multiply)


def _traffic(layers: _Layers) -> int:
    return len(layers.outputs) * 100 + len(layers.inputs[0])


def _repetitions(nodes: Sequence[fx.Node]) -> Iterator[tuple[int, int, int]]:
    """(start, length, period) of stretches in which every op equals the op one period later, best coverage first."""
    codes: dict[Any, int] = {}
    marks = np.array([codes.setdefault(_signature(node), len(codes)) for node in nodes])
    found = []
    for period in range(MIN_PERIOD, len(nodes) // MIN_REPEATS + 1):
        equal = marks[:-period] == marks[period:]
        edges = np.flatnonzero(np.diff(np.concatenate([[False], equal, [False]]).astype(np.int8)))
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            length = int(end - begin) + period
            if length >= MIN_REPEATS * period:
                found.append((length, -period, int(begin)))
    # Smaller periods first among equal coverage: a period of two layers covers the same nodes with half the repeats.
    for length, negative, begin in sorted(found, reverse=True)[:8]:
        yield begin, length, -negative
        if length + negative >= MIN_REPEATS * -negative:  # the first layer may read other values than the rest
            yield begin - negative, length + negative, -negative


def _signature(node: fx.Node) -> str:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: "#" if _is_size(n) else "%")
    return f"{node.target} {args} {kwargs}"


def _consistent(runs: list[list[fx.Node]]) -> _Layers | None:
    """Check that all runs have the same wiring inside and the same pattern of values from outside."""
    wiring, inputs = zip(*(_wire(run) for run in runs), strict=True)
    if any(w != wiring[0] for w in wiring):
        return None
    outputs = {i for run in runs for i in _escaping(run)}
    return _Layers(runs, list(inputs), sorted(outputs))


def _escaping(run: list[fx.Node]) -> Iterator[int]:
    inside = set(run)
    return (i for i, node in enumerate(run) if any(_reaches_out(user, inside) for user in node.users))


def _reaches_out(user: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether a use lies outside the run; a size counts as where it is used."""
    if _is_size(user):
        return any(_reaches_out(further, inside) for further in user.users)
    return user not in inside


def _wire(run: list[fx.Node]) -> tuple[list[Any], list[fx.Node]]:
    """Every node argument in order, as a place in the run or the number of an input; sizes are followed to tensors."""
    inside = {node: i for i, node in enumerate(run)}
    outside: dict[fx.Node, int] = {}
    wiring: list[Any] = []

    def note(value: fx.Node) -> fx.Node:
        if _is_size(value):
            wiring.append(str(value.target))
            fx.map_arg((value.args, value.kwargs), note)
        elif value in inside:
            wiring.append(inside[value])
        else:
            wiring.append(-1 - outside.setdefault(value, len(outside)))
        return value

    for node in run:
        fx.map_arg((node.args, node.kwargs), note)
    return wiring, list(outside)


def _split(module: fx.GraphModule, layers: _Layers) -> Layered:
    nodes = [n for n in module.graph.nodes if n.op == "call_function" and not _is_size(n)]
    first, last = nodes.index(layers.runs[0][0]), nodes.index(layers.runs[-1][-1])
    before, after = nodes[:first], nodes[last + 1 :]
    results = output_values(module.graph)
    number = {node: i for i, node in enumerate(n for n in module.graph.nodes if n.op == "placeholder")}
    in_layers = {node for run in layers.runs for node in run}
    head_outputs = [n for n in before if n in results or any(_reaches_out(user, set(before)) for user in n.users)]
    _, head_inputs = _wire(before)
    for node in head_outputs:
        number[node] = len(number)
    for run in layers.runs:
        for i in layers.outputs:
            number[run[i]] = len(number)
    _, tail_inputs = _wire(after)
    tail_inputs += [n for n in results if n not in tail_inputs and n not in after]
    assert not in_layers & set(after)
    pieces = (
        _piece(module, before, head_inputs, head_outputs),
        _piece(module, layers.runs[0], layers.inputs[0], [layers.runs[0][i] for i in layers.outputs]),
        _piece(module, after, tail_inputs, results, unwrap=not _returns_tuple(module.graph)),
    )
    reads = [head_inputs, *layers.inputs, tail_inputs]
    return Layered(pieces, [[number[node] for node in read] for read in reads])


def _returns_tuple(graph: fx.Graph) -> bool:
    return isinstance(graph.output_node().args[0], (tuple, list))


def _piece(
    module: fx.GraphModule,
    run: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    unwrap: bool = False,
) -> fx.GraphModule:
    """Some nodes as a graph of their own; the sizes that they use are computed inside from its inputs."""
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {value: graph.placeholder(f"input_{i}") for i, value in enumerate(inputs)}

    def place(node: fx.Node) -> Any:
        if node not in env:
            env[node] = graph.node_copy(node, place)
        return env[node]

    for node in run:
        env[node] = graph.node_copy(node, place)
    values = tuple(env[node] for node in outputs)
    graph.output(values[0] if unwrap else values)
    graph.lint()
    return fx.GraphModule(module, graph)
