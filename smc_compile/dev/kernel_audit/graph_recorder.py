"""Record the regions of sessions: graphs as Dynamo hands them to a compiler, and arguments of some calls."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo import register_backend

BACKEND = "smc_record"  # the name under which sessions are asked to compile
END_OF_CYCLE = ("weigh", "conclude", "close")
_recorders: list[GraphRecorder] = []


@dataclass
class RecordedGraph:
    """One graph of a region.

    Attributes:
        name: of the region, with a number from its second graph on.
        inputs: fake inputs, with symbols for the sizes that vary.
        calls: the arguments of one call in each session that ran.
        a_cycle: how often the last whole cycle of the last session called it.
    """

    name: str
    graph: fx.GraphModule
    inputs: list[Any]
    calls: list[list[Any]] = field(default_factory=list)
    a_cycle: int = 0


class GraphRecorder:
    """All graphs that sessions compiled while it was open, with one call of each for each session."""

    def __init__(self, seed: int = 0) -> None:
        self.found: list[RecordedGraph] = []
        self._random = torch.Generator().manual_seed(seed)
        self._log: list[int] = []  # calls of this session, by number in ``found``
        self._seen: dict[int, int] = {}

    def new_session(self) -> None:
        """Begin another session: calls are counted and kept anew."""
        self._log, self._seen = [], {}

    def add(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """The graph as a function that notes its calls; the same graph of another program counts as one."""
        # What Dynamo hands over are real tensors; the sizes that may vary stand on the graph's own placeholders.
        places = graph.graph.find_nodes(op="placeholder")
        fakes = [node.meta.get("example_value", given) for node, given in zip(places, inputs, strict=True)]
        name = region_name(graph)
        of_region = [n for n, other in enumerate(self.found) if other.name.partition(" ")[0] == name]
        met = [n for n in of_region if alike(self.found[n], graph, fakes)]
        number = met[0] if met else len(self.found)
        if not met:
            self.found.append(RecordedGraph(f"{name} ({len(of_region) + 1})" if of_region else name, graph, fakes))

        def call(*arguments: Any) -> Any:
            self._log.append(number)
            self._keep(number, arguments)
            return graph(*arguments)

        return call

    def end_session(self) -> None:
        """Count the calls of the last whole cycle."""
        ends = [i for i, n in enumerate(self._log) if self.found[n].name.partition(" ")[0] in END_OF_CYCLE]
        if len(ends) > 1:
            last = self._log[ends[-2] + 1 : ends[-1] + 1]
            for number, recorded in enumerate(self.found):
                recorded.a_cycle = last.count(number)

    def _keep(self, number: int, arguments: Sequence[Any]) -> None:
        """Keep one call of each session, each with the same probability (reservoir sampling)."""
        calls, count = self.found[number].calls, self._seen.get(number, 0) + 1
        self._seen[number] = count
        if int(torch.randint(count, (), generator=self._random)):
            return
        if count > 1:
            calls.pop()
        calls.append([copy_of(a) for a in arguments])


def alike(recorded: RecordedGraph, graph: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether the graph is the recorded one again: the same code, for inputs of the same kinds."""
    return recorded.graph.code == graph.code and list(map(_kind, recorded.inputs)) == list(map(_kind, inputs))


def _kind(value: Any) -> tuple[str, ...]:
    """Type, sizes and strides of an input; sizes may be symbols."""
    if isinstance(value, Tensor):
        return str(value.dtype), str(tuple(value.shape)), str(value.stride())
    return (str(value),)


def copy_of(value: Any) -> Any:
    """A copy of a tensor; weights, which nothing changes, and other values are returned as they are."""
    return value.clone() if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) else value


def region_name(graph: fx.GraphModule) -> str:
    """The region whose function Dynamo traced: regions run as functions called smc_<name>."""
    for node in graph.graph.nodes:
        if found := re.search(r"in smc_(\w+)", node.meta.get("stack_trace") or ""):
            return found[1]
    return "unnamed"


@contextmanager
def recording(seed: int = 0) -> Iterator[GraphRecorder]:
    """Regions compiled inside with the compiler ``BACKEND`` are recorded, and run eagerly."""
    _recorders.append(GraphRecorder(seed))
    try:
        yield _recorders[-1]
    finally:
        _recorders.pop()


@register_backend(name=BACKEND)
def _record(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    return _recorders[-1].add(graph, inputs)
