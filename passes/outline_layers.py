"""Repeated layers compile once: find the period of a graph and move each repetition behind one shared function.

The shared function is a nested compile region: the compiler lowers it a single time and calls it for every layer.
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

from smc_compile.passes.ir import CachedLM, output_values

log = logging.getLogger(__name__)

MIN_REPEATS = 3  # two equal layers do not pay for a call
MIN_PERIOD = 8  # shorter repetitions are patterns inside a layer


@dataclass(frozen=True)
class _Layers:
    """``repeats`` runs of ``period`` consecutive nodes; every run reads ``inputs[t]`` and gives the nodes at ``outputs``."""

    runs: list[list[fx.Node]]
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
    layers = find_layers(module.graph)
    if layers is None:
        return module
    counters["smc_compile"]["layers_outlined"] += len(layers.runs)
    result = _rewrite(module, layers)
    log.debug("outlined %d layers of %d nodes\n%s", len(layers.runs), len(layers.runs[0]), result.graph)
    return result


def find_layers(graph: fx.Graph) -> _Layers | None:
    """The repetition that covers most nodes, at the phase where layers exchange fewest values."""
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    for start, period, repeats, slack in _repetitions(nodes):
        best: _Layers | None = None
        for shift in range(slack + 1):
            runs = [nodes[start + shift + t * period :][:period] for t in range(repeats)]
            found = _consistent(runs, graph)
            if found is not None and (best is None or _traffic(found) < _traffic(best)):
                best = found
        if best is not None:
            return best
    return None


def _traffic(layers: _Layers) -> int:
    return len(layers.outputs) * 100 + len(layers.inputs[0])


def _repetitions(nodes: Sequence[fx.Node]) -> Iterator[tuple[int, int, int, int]]:
    """(start, period, repeats, slack) of repeated stretches of equal ops, best coverage first."""
    codes: dict[Any, int] = {}
    marks = np.array([codes.setdefault(_signature(node), len(codes)) for node in nodes])
    found = []
    for period in range(MIN_PERIOD, len(nodes) // MIN_REPEATS + 1):
        equal = marks[:-period] == marks[period:]
        edges = np.flatnonzero(np.diff(np.concatenate([[False], equal, [False]]).astype(np.int8)))
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            length = int(end - begin)
            repeats = length // period + 1
            if repeats >= MIN_REPEATS:
                found.append((repeats * period, -period, int(begin), repeats, length % period))
    # Smaller periods first among equal coverage: a period of two layers covers the same nodes with half the repeats.
    for coverage, negative, begin, repeats, slack in sorted(found, key=lambda f: (f[0] + f[4], f[1]), reverse=True)[:8]:
        del coverage
        yield begin, -negative, repeats, slack
        if repeats - 1 >= MIN_REPEATS:  # the first layer may read other values than the rest
            yield begin - negative, -negative, repeats - 1, slack


def _signature(node: fx.Node) -> str:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: "%")
    return f"{node.target} {args} {kwargs}"


def _consistent(runs: list[list[fx.Node]], graph: fx.Graph) -> _Layers | None:
    """Check that all runs have the same wiring inside and the same pattern of values from outside."""
    wiring, inputs = zip(*(_wire(run) for run in runs), strict=True)
    if any(w != wiring[0] for w in wiring):
        return None
    place = [{node: i for i, node in enumerate(run)} for run in runs]
    outputs = {i for t, run in enumerate(runs) for i, node in enumerate(run) if _escapes(node, place[t])}
    return _Layers(runs, list(inputs), sorted(outputs))


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


def _escapes(node: fx.Node, inside: dict[fx.Node, int]) -> bool:
    return any(user not in inside for user in node.users)


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
