"""Repeated layers compile once: find the period of a graph and move each repetition behind one shared function.

The shared function is a nested compile region: the compiler lowers it a single time and calls it for every layer. Cache
writes stay outside of it, between two calls, so that the function is pure: a region that mutates is traced anew each time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import numpy as np
import torch
from torch import fx
from torch._dynamo.utils import counters

from smc_compile.passes.cached_attention import write_cache
from smc_compile.passes.ir import CachedLM, output_values

log = logging.getLogger(__name__)

MIN_REPEATS = 3  # two equal layers do not pay for a call
MIN_PERIOD = 8  # shorter repetitions are patterns inside a layer


@dataclass(frozen=True)
class _Layers:
    """Runs of consecutive nodes with equal wiring; run t reads ``inputs[t]`` and gives the nodes at places ``outputs``.

    ``writes[t]`` are the cache writes that follow run t.
    """

    runs: list[list[fx.Node]]
    writes: list[list[fx.Node]]
    inputs: list[list[fx.Node]]
    outputs: list[int]


def outline_layers(cached: CachedLM) -> CachedLM:
    """The same model with repeated layers outlined in each of its graphs; graphs without repetition stay as they are."""
    return replace(
        cached,
        prefill=outline(cached.prefill),
        score=outline(cached.score),
        advance=outline(cached.advance),
    )


def outline(module: fx.GraphModule) -> fx.GraphModule:
    """``module`` with its longest repetition outlined, or ``module`` itself when nothing repeats often enough."""
    layers = find_layers(gather_writes(module.graph))
    if layers is None:
        return module
    counters["smc_compile"]["layers_outlined"] += len(layers.runs)
    result = _rewrite(module, layers)
    log.debug("outlined %d layers of %d nodes\n%s", len(layers.runs), len(layers.runs[0]), result.graph)
    return result


def gather_writes(graph: fx.Graph) -> fx.Graph:
    """Move each cache write, with what it needs, up to the write before it unless it depends on that one.

    Keys and values of a layer are then written side by side, before its attention.
    """
    previous: fx.Node | None = None
    for node in [n for n in graph.nodes if n.target is write_cache]:
        if previous is not None:
            needed = _between(previous, node)
            if needed is not None:
                for moved in needed:
                    previous.prepend(moved)
                previous.append(node)
        previous = node
    graph.lint()
    return graph


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node] | None:
    """What ``last`` needs and stands after ``first``, in order; None when something of it depends on ``first``."""
    order = {node: i for i, node in enumerate(first.graph.nodes)}
    needed: set[fx.Node] = set()
    stack = [n for n in last.all_input_nodes if order[n] >= order[first]]
    while stack:
        node = stack.pop()
        if node is first:
            return None
        if node not in needed:
            needed.add(node)
            stack.extend(n for n in node.all_input_nodes if order[n] >= order[first])
    return sorted(needed, key=order.__getitem__)


def find_layers(graph: fx.Graph) -> _Layers | None:
    """The repetition that covers most nodes, at the phase where layers exchange fewest values."""
    nodes = [node for node in graph.nodes if node.op == "call_function"]
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
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: "%")
    return f"{node.target} {args} {kwargs}"


def _consistent(runs: list[list[fx.Node]]) -> _Layers | None:
    """Check that cache writes come last, and that runs have the same wiring and the same pattern of outside values."""
    is_write = [[node.target is write_cache for node in run] for run in runs]
    count = sum(is_write[0])
    if any(flags != sorted(flags) or sum(flags) != count for flags in is_write):
        return None
    cut = len(runs[0]) - count
    bodies, writes = [run[:cut] for run in runs], [run[cut:] for run in runs]
    wiring, inputs = zip(*(_wire(body) for body in bodies), strict=True)
    if any(w != wiring[0] for w in wiring):
        return None
    outputs = {i for body in bodies for i in _escaping(body)}
    return _Layers(bodies, writes, list(inputs), sorted(outputs))


def _escaping(body: list[fx.Node]) -> Iterator[int]:
    inside = set(body)
    return (i for i, node in enumerate(body) if any(user not in inside for user in node.users))


def _wire(run: list[fx.Node]) -> tuple[list[tuple[str, int]], list[fx.Node]]:
    """Every node argument in order, as (inside, position in the run) or (outside, number of the input)."""
    inside = {node: i for i, node in enumerate(run)}
    outside: dict[fx.Node, int] = {}
    wiring: list[tuple[str, int]] = []

    def note(value: fx.Node) -> fx.Node:
        if value in inside:
            wiring.append(("inside", inside[value]))
        else:
            wiring.append(("outside", outside.setdefault(value, len(outside))))
        return value

    for node in run:
        fx.map_arg((node.args, node.kwargs), note)
    return wiring, list(outside)


def _rewrite(module: fx.GraphModule, layers: _Layers) -> fx.GraphModule:
    layer = _layer_function(module, layers)
    first = {run[0]: t for t, run in enumerate(layers.runs)}
    moved = {node for run in layers.runs for node in run}
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node in first:
            t = first[node]
            call = graph.call_function(layer, tuple(env[value] for value in layers.inputs[t]))
            for k, i in enumerate(layers.outputs):
                env[layers.runs[t][i]] = graph.call_function(getitem, (call, k))
        elif node not in moved and node.op != "output":
            env[node] = graph.node_copy(node, lambda n: env[n])
    values = tuple(env[value] for value in output_values(module.graph))
    graph.output(values if isinstance(module.graph.output_node().args[0], (tuple, list)) else values[0])
    graph.lint()
    return fx.GraphModule(module, graph)


def _layer_function(module: fx.GraphModule, layers: _Layers) -> Callable[..., Any]:
    """One layer as a function of its inputs; the compiler sees the same function at every call."""
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {value: graph.placeholder(f"input_{i}") for i, value in enumerate(layers.inputs[0])}
    for node in layers.runs[0]:
        env[node] = graph.node_copy(node, lambda n: env[n])
    graph.output(tuple(env[layers.runs[0][i]] for i in layers.outputs))
    graph.lint()
    body = fx.GraphModule(module, graph)

    def layer(*inputs: Any) -> Any:
        return body(*inputs)

    marked = torch.compiler.nested_compile_region(layer)
    marked.__module__, marked.__name__ = __name__, "layer"  # generated code calls it by this name
    return marked
