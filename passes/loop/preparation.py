"""Dynamo's graph of a loop as the passes read it, for its own sizes and, alike node by node, for others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from smc_compile.passes.loop.branches import Mark, take_marks, without_masks
from smc_compile.passes.loop.concretise import Concrete, concretise
from smc_compile.passes.loop.refusals import without_idle_autocast, without_idle_dropouts


@dataclass(frozen=True)
class Preparation:
    """How a graph is prepared.

    Attributes:
        replaced: (number of a token's node, number of the node that is drawn for it), where rows that have ended are
            filled up.
    """

    gm: fx.GraphModule
    example_inputs: Sequence[Any]
    replaced: tuple[tuple[int, int], ...] = ()

    def run(self, sizes: dict[sympy.Expr, int] | None = None) -> tuple[Concrete, list[Mark]]:
        """The graph with the sizes of the inputs, or with others, and the marks that were in it."""
        concrete = concretise(self.gm, self.example_inputs, sizes)
        without_idle_autocast(concrete.graph)
        without_idle_dropouts(concrete.graph)
        marks = take_marks(concrete.graph)
        nodes = list(concrete.graph.nodes)
        without_masks(concrete.graph, [nodes[at] for at, _ in self.replaced], [nodes[at] for _, at in self.replaced])
        return concrete, marks

    def at(self, sizes: dict[sympy.Expr, int]) -> fx.Graph:
        """The graph with other sizes."""
        return self.run(sizes)[0].graph
