"""The types of the axis analysis: batch, query position, key position or other, for each axis of a value."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from smc_compile.errors import CacheError
from smc_compile.passes.fx_tools import describe
from smc_compile.passes.ir import CausalLM

BATCH, QUERY, KEY, REPEAT, OTHER = "batch", "query", "key", "repeat", "other"


CHOSEN = "chosen"  # the keys that each query chose


@dataclass(frozen=True)
class Atom:
    """One factor of an axis. ``size`` is 0 for batch, query and key, whose size depends on the region.

    A key atom's size counts sink columns that stand beside the keys: after them if positive, before them if negative.
    A chosen atom's size says how many keys a query chooses, if there are as many; 0 for all.
    """

    kind: str
    size: int = 0


Axis = tuple[Atom, ...]


Axes = tuple[Axis, ...]


B, Q, K = Atom(BATCH), Atom(QUERY), Atom(KEY)


@dataclass
class Typing:
    """The result for one graph.

    Attributes:
        axes: axes of each token-dependent node; a list of them for ops with several outputs.
        dependent: the nodes whose value depends on the tokens.
        after_last: the nodes computed from the last position only: their batch axis counts rows of tokens.
        last: the nodes that select the last position.
        attention: matmul-like nodes (and SDPA) that contract over positions, with the role each plays.
        slots: nodes that hold numbers of keys, with the scores that these were chosen by.
        chosen_sizes: by the size of a chosen atom, how many keys the trace chose.
        hiding: values over [query, key] that must hide later keys themselves.
    """

    lm: CausalLM
    length: sympy.Expr
    axes: dict[fx.Node, Any] = field(default_factory=dict)
    dependent: set[fx.Node] = field(default_factory=set)
    after_last: set[fx.Node] = field(default_factory=set)
    last: list[fx.Node] = field(default_factory=list)
    attention: dict[fx.Node, str] = field(default_factory=dict)
    slots: dict[fx.Node, fx.Node] = field(default_factory=dict)
    chosen_sizes: dict[int, sympy.Expr] = field(default_factory=dict)
    hiding: list[fx.Node] = field(default_factory=list)

    def of(self, node: Any) -> Axes:
        return self.axes[node]

    def is_dependent(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and value in self.dependent

    def atom_size(self, atom: Atom) -> sympy.Expr:
        if atom.kind == BATCH:
            return sympy.Integer(self.lm.batch)
        if atom.kind in (QUERY, KEY):
            return self.length + abs(atom.size)
        if atom.kind == CHOSEN:
            return self.chosen_sizes[atom.size]
        return sympy.Integer(atom.size)

    def axis_size(self, axis: Axis) -> sympy.Expr:
        return math.prod((self.atom_size(atom) for atom in axis), start=sympy.Integer(1))


def refuse(node: fx.Node, why: str, fix: str = "") -> CacheError:
    """The error for an op that has no incremental form; it names the op and the user's line."""
    default = (
        "wrap a model that has a cache of its own: smc_compile.OwnCache(model); or write the explicit protocol "
        "step(tokens, pos, state) -> (logits, state) with initial_state(batch)"
    )
    error = CacheError(f"no cache can be synthesized: {why}", describe(node), fix or default)
    error.node = node
    return error


def expression(size: Any) -> sympy.Expr:
    """The sympy expression of an int, a SymInt or a node that carries one."""
    if isinstance(size, fx.Node):
        size = size.meta["val"]
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def split_atoms(atoms: list[Atom], sizes: list[sympy.Expr], typing: Typing) -> list[Axis] | None:
    """Regroup ``atoms`` into axes of the given sizes, splitting plain atoms where needed; None when they do not fit."""
    pending = list(atoms)
    axes: list[Axis] = []
    for size in sizes:
        taken: list[Atom] = []
        left = size
        while left != 1 or (not taken and pending and typing.atom_size(pending[0]) == 1 and size == 1):
            if not pending:
                return None
            atom = pending.pop(0)
            ratio = sympy.cancel(left / typing.atom_size(atom))
            if _is_whole(ratio):
                taken.append(atom)
                left = ratio
            elif atom.kind in (OTHER, REPEAT) and left.is_Integer and atom.size % int(left) == 0:
                taken.append(Atom(atom.kind, int(left)))
                pending.insert(0, Atom(atom.kind, atom.size // int(left)))
                left = sympy.Integer(1)
            else:
                return None
        axes.append(tuple(taken))
    if any(typing.atom_size(atom) != 1 for atom in pending):
        return None
    if pending:  # leftover atoms of size 1 (a batch of one) join the first axis that can hold them
        axes[0] = tuple(pending) + axes[0] if axes else ()
    return axes


def _is_whole(ratio: sympy.Expr) -> bool:
    """Whether a ratio of sizes is a polynomial with integer coefficients."""
    if not ratio.free_symbols:
        return bool(ratio.is_Integer)
    if not ratio.is_polynomial(*ratio.free_symbols):
        return False
    return all(coefficient.is_Integer for coefficient in sympy.Poly(ratio, *ratio.free_symbols).coeffs())
