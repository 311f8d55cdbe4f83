"""Which integers of a graph are a*S + b, S being the length of the text that the graph reads.

A graph is traced at one length, so its sizes and positions are plain numbers. They are generalised in two ways:

- `fit_all`: from the values that an integer takes at several lengths, which must lie on a line.
- `solve_lengths`: from a graph of one length L alone. Numbers that may be sizes are read as multiples of S, and the
  graph is run on fake tensors at three other lengths. A reading fits if every call runs, and if every axis of every
  value changes evenly with the length. Exactly one choice of readings must fit.

`longest_text` says up to which length a trace holds.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from smc_compile.passes.fx_tools import call_node, op_name
from smc_compile.passes.length_guards import lengths_off
from smc_compile.passes.loop.leaves import Leaf, flatten, replace_leaves
from smc_compile.passes.loop.tensor_info import TensorInfo, tensor_info

_BACKTRACKS = 64  # how often the search goes back to an earlier call before it gives up
_MOST_OPTIONS = 6  # numbers of one call that are tried as something else than L itself


class Affine(NamedTuple):
    """The integer ``slope * S + offset`` for a text of S tokens."""

    slope: int
    offset: int

    def at(self, length: int) -> int:
        return self.slope * length + self.offset


LENGTH = Affine(1, 0)
LAST = Affine(1, -1)  # the last position

Lengths = dict[Leaf, Affine]
Sample = tuple[int, int]  # (S, the value of an integer at that length)


# ---- from several lengths ------------------------------------------------------------------------------------------


class Uneven(Exception):
    """An integer is no a*S + b: ``off`` is the first sample that is not on the line through the first two."""

    def __init__(self, leaf: Leaf, samples: Sequence[Sample], off: Sample) -> None:
        super().__init__(leaf, samples, off)
        self.leaf, self.samples, self.off = leaf, samples, off


def first_off(samples: Sequence[Sample]) -> Sample | None:
    """The first sample that is not on the line through the first two of different lengths, or None."""
    (s0, v0), (s1, v1) = _two(samples)
    return next(((s, v) for s, v in samples if (v - v0) * (s1 - s0) != (v1 - v0) * (s - s0)), None)


def _two(samples: Sequence[Sample]) -> tuple[Sample, Sample]:
    """The first sample, and the first of another length; two of one length where there is no other."""
    return samples[0], next((sample for sample in samples if sample[0] != samples[0][0]), samples[1])


def fit(samples: Sequence[Sample]) -> Affine | None:
    """The integers a, b with value = a*S + b for every sample (two or more), or None."""
    (s0, v0), (s1, v1) = _two(samples)
    if s0 == s1:
        return Affine(0, v0) if all(v == v0 for _, v in samples) else None
    slope, rest = divmod(v1 - v0, s1 - s0)
    return None if rest or first_off(samples) is not None else Affine(slope, v0 - slope * s0)


def fit_all(samples: Mapping[Leaf, Sequence[Sample]]) -> Lengths:
    """Fit every integer; those that never change are left out.

    Raises:
        Uneven: an integer is no a*S + b.
    """
    found: Lengths = {}
    for leaf, values in samples.items():
        affine = fit(values)
        if affine is None:
            raise Uneven(leaf, values, first_off(values) or values[1])
        if affine.slope:
            found[leaf] = affine
    return found


# ---- numbers that a graph holds ------------------------------------------------------------------------------------


def is_integer(leaf: Any) -> bool:
    """Whether a leaf of a call is a plain integer (a truth value is none)."""
    return isinstance(leaf, int) and not isinstance(leaf, bool)


def numbers_in(nodes: Iterable[fx.Node], inputs: Iterable[TensorInfo | None] = ()) -> set[int]:
    """The integers in the calls of some nodes, and the sizes of what is known of their values and of the inputs."""
    nodes = list(nodes)
    infos = [*map(tensor_info, nodes), *inputs]
    written = {leaf for node in nodes for leaf in flatten(node) if isinstance(leaf, int)}
    return written | {size for info in infos if info is not None for size in info.shape}


_ALL_SIZES = frozenset(
    ["view", "reshape", "expand", "repeat", "tile", "broadcast_to", "unflatten", "split", "split_with_sizes", "narrow",
     "pad", "arange", "zeros", "ones", "empty", "rand", "randn", "new_zeros", "new_ones", "new_empty"]
)  # fmt: skip
_FIRST_SEQUENCE = frozenset(["full", "new_full"])  # the shape is a size, the value is none
_SLICES = frozenset(["getitem", "setitem"])


def sizes_of(node: fx.Node) -> Iterator[tuple[Leaf, int]]:
    """The integers of a call that say how long something is or where a slice begins and ends."""
    name, leaves = op_name(node), flatten(node)
    inside = 0  # leaves left of a slice, or of the first sequence of sizes
    for at, leaf in enumerate(leaves):
        if name in _SLICES and leaf == "slice":
            inside = 5  # the word, "sequence of 3", and the three
        elif name in _FIRST_SEQUENCE and isinstance(leaf, str) and leaf.startswith("sequence") and at:
            inside, name = int(leaf.split()[-1]) + 1, ""
        inside -= 1
        if is_integer(leaf) and (name in _ALL_SIZES or inside >= 0):
            yield (node, at), leaf


# ---- readings of one call ------------------------------------------------------------------------------------------

LeafReading = tuple[tuple[Leaf, Affine], ...]  # what some leaves of a call are; all others are constants


def readings(options: Sequence[Sequence[tuple[Leaf, Affine] | None]]) -> Iterator[LeafReading]:
    """Every way to choose one option for each number; None leaves it a constant."""
    for combination in itertools.product(*options):
        yield tuple(choice for choice in combination if choice is not None)


def change_evenly(lengths: Sequence[int], results: Sequence[Any]) -> bool:
    """Whether every axis of a value changes evenly with the length; ``results`` are the values at ``lengths``."""
    first = results[0]
    if isinstance(first, tuple | list):
        same = len({len(result) for result in results}) == 1
        return same and all(change_evenly(lengths, parts) for parts in zip(*results, strict=True))
    if not isinstance(first, torch.Tensor):
        return True
    if len({result.dim() for result in results}) > 1:
        return False
    axes = zip(*(result.shape for result in results), strict=True)
    return all(first_off(list(zip(lengths, sizes, strict=True))) is None for sizes in axes)


def shape_of(value: Any) -> Any:
    """The shape of a tensor, the shapes of several, and None for what has no shape."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        return tuple(shape_of(part) for part in value)
    return None


def same_but_for_length(before: Any, after: Any, lengths: Sequence[int], length: int) -> bool:
    """Whether two shapes (as of `shape_of`) agree, but for axes of one of ``lengths`` that have become ``length``."""
    if not isinstance(before, tuple) or not isinstance(after, tuple) or len(before) != len(after):
        return bool(before == after)
    pairs = zip(before, after, strict=True)
    if any(isinstance(part, tuple) for part in before):
        return all(same_but_for_length(a, b, lengths, length) for a, b in pairs)
    return all(a == b or (a in lengths and b == length) for a, b in pairs)


@contextmanager
def quiet_shapes() -> Iterator[None]:
    """Readings that do not fit are expected to fail; fake tensors log each failure as an error."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


# ---- from one length, by shapes ------------------------------------------------------------------------------------


class UnclearLengths(Exception):
    """No choice of readings fits (``several`` is False), or more than one. ``node`` is where that shows."""

    def __init__(self, node: fx.Node | None, several: bool) -> None:
        super().__init__(node, several)
        self.node, self.several = node, several


@dataclass(frozen=True)
class TracedCalls:
    """Calls that were traced at one length of the text.

    Attributes:
        nodes: the calls in program order, with the placeholders and constants that they need.
        result: the node whose shape does not depend on the length: the token.
        length: L, the length of the text in the trace.
        texts: (reader, source) -> the axes before the last of the text that ``reader`` finds in ``source``: () or (B,).
        known: integers whose form is known already.
    """

    nodes: Sequence[fx.Node]
    result: fx.Node
    length: int
    texts: Mapping[tuple[fx.Node, fx.Node], tuple[int, ...]]
    known: Lengths


def solve_lengths(calls: TracedCalls) -> Lengths:
    """The integers that are a*S + b, besides those that are known.

    Raises:
        UnclearLengths: the numbers fit in no way, or in several.
    """
    refusal: UnclearLengths | None = None
    for lengths in _lengths_to_try(calls):
        try:
            return _Search(calls, lengths).solve()
        except UnclearLengths as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _lengths_to_try(calls: TracedCalls) -> Iterator[tuple[int, int, int]]:
    """Three lengths: one below L and two above; then all below, for models that end at L."""
    taken, length = numbers_in(calls.nodes), calls.length
    above = [n for n in range(length + 1, length + 200) if n not in taken][:2]
    below = sorted(range(length - 1, 1, -1), key=lambda n: n in taken)  # stable: free ones first
    if below:
        yield below[0], above[0], above[1]
    if len(below) > 2:
        yield below[2], below[1], below[0]


class _Misfit(Exception):
    """No reading of the numbers of a call fits."""


@dataclass
class _State:
    """How far a search is: ``values[k]`` are those of the first ``at`` nodes at the k-th length."""

    at: int
    values: list[dict[fx.Node, Any]]
    chosen: list[LeafReading]

    def copy(self) -> _State:
        return _State(self.at, [dict(values) for values in self.values], list(self.chosen))


Branches = list[tuple[_State, list[LeafReading]]]  # where several readings fit a call: those that were not taken


class _Search:
    """Runs calls at several lengths at once, depth first over the readings that fit each call."""

    def __init__(self, calls: TracedCalls, lengths: tuple[int, ...]) -> None:
        self.calls, self.lengths = calls, lengths
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.misfit: fx.Node | None = None  # the latest call that no reading fitted

    def solve(self) -> Lengths:
        with _disable_current_modes(), torch.no_grad(), quiet_shapes():
            branches: Branches = []
            found = self.first(_State(0, [{} for _ in self.lengths], []), branches)
            if found is None:
                raise UnclearLengths(self.misfit, several=False)
            for state, others in branches:
                if any(self.fits_too(state, other) for other in others):
                    raise UnclearLengths(self.calls.nodes[state.at], several=True)
        return {leaf: affine for reading in found for leaf, affine in reading}

    def first(self, state: _State, branches: Branches) -> list[LeafReading] | None:
        """The first choice of readings that fits all calls; ``branches`` collects where others fit one call."""
        budget = _BACKTRACKS
        while True:
            try:
                self.advance(state, branches)
                return state.chosen
            except _Misfit:
                budget -= 1
                while branches and not branches[-1][1]:
                    branches.pop()
                if not branches or budget < 0:
                    return None
                saved, others = branches[-1]
                state = saved.copy()
                self.apply(state, others.pop(0))

    def fits_too(self, state: _State, reading: LeafReading) -> bool:
        """Whether all calls can be fitted after this reading of the next one."""
        state = state.copy()
        try:
            self.apply(state, reading)
            self.advance(state, [])
        except _Misfit:
            return False
        return True

    def advance(self, state: _State, branches: Branches) -> None:
        """Fit the calls that are left, with the likeliest reading of each."""
        while state.at < len(self.calls.nodes):
            node = self.calls.nodes[state.at]
            if node.op in ("placeholder", "get_attr"):
                self.keep(state, [self.given(node) for _ in self.lengths], ())
                continue
            fitting = self.fitting(state, node)
            if not fitting:
                self.misfit = node
                raise _Misfit
            if len(fitting) > 1:
                branches.append((state.copy(), fitting[1:]))
            self.apply(state, fitting[0])
        self.check_result(state)

    def apply(self, state: _State, reading: LeafReading) -> None:
        results = self.run(state, self.calls.nodes[state.at], reading)
        if results is None:
            raise _Misfit
        self.keep(state, results, reading)

    def keep(self, state: _State, results: Sequence[Any], reading: LeafReading) -> None:
        node = self.calls.nodes[state.at]
        for values, result in zip(state.values, results, strict=True):
            values[node] = result
        state.at += 1
        state.chosen.append(reading)

    def fitting(self, state: _State, node: fx.Node) -> list[LeafReading]:
        """Ways to read a call's numbers as lengths with which it still runs, the likeliest first.

        Numbers equal to L or -L are tried; if none of them fits, others too.
        """
        length = self.calls.length
        numbers = [(leaf, v) for leaf, v in sizes_of(node) if leaf not in self.calls.known]
        options: list[list[tuple[Leaf, Affine] | None]]
        options = [[(leaf, Affine(v // length, 0)), None] for leaf, v in numbers if abs(v) == length]
        fitting = [reading for reading in readings(options) if self.run(state, node, reading) is not None]
        if fitting:
            return fitting
        others = [(leaf, v) for leaf, v in numbers if abs(v) != length]
        options += [[None, (leaf, affine)] for leaf, v in others if (affine := self.related(v)) is not None]
        found = (reading for reading in readings(options[:_MOST_OPTIONS]) if self.run(state, node, reading) is not None)
        return list(itertools.islice(found, 1))

    def related(self, v: int) -> Affine | None:
        """A number as a multiple of the length, or as one beside it."""
        length = self.calls.length
        if v and v % length == 0:
            return Affine(v // length, 0)
        return Affine(1, v - length) if 0 < abs(v - length) <= 2 else None

    def run(self, state: _State, node: fx.Node, reading: LeafReading) -> list[Any] | None:
        """The node's values at every length, or None if it fails or they change unevenly."""
        known = {leaf: affine for leaf, affine in self.calls.known.items() if leaf[0] is node}
        results = []
        for length, values in zip(self.lengths, state.values, strict=True):
            leaves = {at: affine.at(length) for (_, at), affine in {**known, **dict(reading)}.items()}
            inputs = {source: self.operand(values, node, source, length) for source in node.all_input_nodes}
            try:
                with self.mode:
                    results.append(call_node(node, *replace_leaves(node, leaves, inputs)))
            except Exception:  # ops raise many types when shapes do not fit
                return None
        return results if change_evenly(self.lengths, results) else None

    def operand(self, values: dict[fx.Node, Any], node: fx.Node, source: fx.Node, length: int) -> Any:
        rows = self.calls.texts.get((node, source))
        if rows is None:
            return values[source]
        info = tensor_info(source)
        return self.empty((*rows, length), info.dtype if info else torch.int64, source)

    def given(self, node: fx.Node) -> Any:
        info = tensor_info(node)
        return node.meta.get("constant") if info is None else self.empty(info.shape, info.dtype, node)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, like: fx.Node) -> torch.Tensor:
        value = like.meta.get("example_value")
        with self.mode:
            return torch.empty(shape, dtype=dtype, device=value.device if isinstance(value, torch.Tensor) else None)

    def check_result(self, state: _State) -> None:
        info = tensor_info(self.calls.result)
        if info is not None and any(tuple(values[self.calls.result].shape) != info.shape for values in state.values):
            self.misfit = self.calls.result
            raise _Misfit


# ---- lengths for which a trace holds -------------------------------------------------------------------------------


def symbolic_length(prompt: fx.Node) -> sympy.Expr | None:
    """The prompt's length as Dynamo's symbol; None if it is a number in the trace."""
    example = prompt.meta.get("example_value")
    size = example.shape[-1] if isinstance(example, torch.Tensor) else None
    return size.node.expr if isinstance(size, torch.SymInt) else None


def longest_text(prompt: fx.Node, every: bool = True) -> int | None:
    """The longest prompt whose text takes the path that was traced; None if there is no such bound.

    A branch on a length leaves a guard: the model's window begins, a cache is full, the loop crops its cache. A branch
    that every iteration takes leaves guards that end one after the other; one alone looks at the prompt.

    Args:
        every: whether single guards count too.
    """
    symbol = symbolic_length(prompt)
    if not isinstance(symbol, sympy.Symbol):
        return None
    size = prompt.meta["example_value"].shape[-1].node
    firsts = [next(lengths_off(guard.expr, symbol, size.hint), None) for guard in size.shape_env.guards]
    ends = [first - 1 for first in firsts if first is not None]
    return min((end for end in ends if every or end + 1 in ends), default=None)
