"""How the heads of a query line up with the heads of its keys: groups of query heads fold into rows of one product."""

from __future__ import annotations

import math

from smc_compile.errors import CacheError
from smc_compile.passes.axes.axis_types import BATCH, OTHER, QUERY, REPEAT, Atom, Axes, Axis


class HeadLayout:
    """How the query's leading axes fold: atoms in query order, and the order batch, key heads, repeats, positions."""

    def __init__(self, query: Axes, rows: Axis, key: Axes) -> None:
        self.atoms: list[Atom] = []
        for mine, theirs in zip(query, key, strict=True):
            self.atoms.extend(_common_split(mine, theirs))
        self.atoms.extend(Atom(REPEAT, atom.size) if atom.kind == OTHER else atom for atom in rows)
        rank = {BATCH: 0, OTHER: 1, REPEAT: 2, QUERY: 3}
        self.order = sorted(range(len(self.atoms)), key=lambda i: rank[self.atoms[i].kind])
        self.kv_heads = product(tuple(atom for atom in self.atoms if atom.kind == OTHER))
        self.groups = product(tuple(atom for atom in self.atoms if atom.kind == REPEAT))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeadLayout) and (self.atoms, self.order) == (other.atoms, other.order)

    __hash__ = None  # type: ignore[assignment]


def _common_split(query: Axis, key: Axis) -> list[Atom]:
    """A query axis split as the key's axis is, into heads and repeats; repeated or missing key heads are REPEAT."""
    if any(atom.kind == QUERY for atom in query):  # positions stand in front of the heads, alone on their axis
        return list(query)
    batch = [atom for atom in query if atom.kind == BATCH]
    mine = product(tuple(atom for atom in query if atom.kind != BATCH))
    theirs = [atom for atom in key if atom.kind != BATCH]
    if not theirs:
        return batch + ([Atom(REPEAT, mine)] if mine > 1 else [])
    size = product(tuple(theirs))
    if size == mine:
        return batch + theirs
    if mine % size == 0:  # enable_gqa: fewer key heads than query heads, each serving consecutive query heads
        return batch + theirs + [Atom(REPEAT, mine // size)]
    raise CacheError(f"internal: {mine} query heads do not fit {size} key heads")


def padded(axes: Axes, rank: int) -> Axes:
    """Axes with unit axes in front, up to ``rank``."""
    return ((),) * (rank - len(axes)) + axes


def product(axis: Axis) -> int:
    """The size of an axis without its batch and position atoms."""
    return math.prod(atom.size for atom in axis if atom.kind in (OTHER, REPEAT))
