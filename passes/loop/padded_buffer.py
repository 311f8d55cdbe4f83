"""A model that reads a padded buffer, ``model(buf)[:, i - 1]``: the same step on the history alone.

The buffer has L columns, the history and constants behind it. A causal model gives at position ``len(history) - 1``
what it gives there for the history alone, so the step reads the history and every size that is L becomes S. Which
numbers are such sizes is derived by shapes: the iteration is run on fake tensors at three other lengths, and every axis of
every value must change evenly with the length. If two readings of a number pass, the loop is refused. That the model is
causal is measured: `PaddedTrip.check` compares the step with the iteration as it was written, on real weights.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from smc_compile.errors import LoopError
from smc_compile.passes.loop.iterations import Iterations, Leaves, describe
from smc_compile.passes.loop.leaves import flatten, replace_leaves
from smc_compile.passes.loop.op_tables import op_name, tensor_info

_ALL_SIZES = frozenset(
    ["view", "reshape", "expand", "repeat", "tile", "broadcast_to", "unflatten", "split", "split_with_sizes", "narrow",
     "pad", "arange", "zeros", "ones", "empty", "rand", "randn", "new_zeros", "new_ones", "new_empty"]
)  # fmt: skip


_FIRST_SEQUENCE = frozenset(["full", "new_full"])  # the shape, not the value


_SLICES = frozenset(["getitem", "setitem"])


_BACKTRACKS = 64


_CHECKED_LENGTHS = 12


def padded_length(iterations: Iterations, closure: Sequence[fx.Node]) -> int | None:
    """L, if the first iteration reads the history in a buffer of L columns with padding."""
    pairs = ((node, source) for node in closure for source in node.all_input_nodes)
    lengths = {iterations.read_length(node, source, 0) for node, source in pairs} - {None, iterations.length(0)}
    if len(lengths) > 1:
        raise LoopError(
            "The decode loop reads padded buffers of several lengths.",
            f"lengths {sorted(map(str, lengths))}",
            "keep the tokens in one buffer",
        )
    return next(iter(lengths), None)


def padding_of(iterations: Iterations, closure: Sequence[fx.Node]) -> tuple[int, ...]:
    """The constants behind the prompt in the buffer that the first iteration reads."""
    for node in closure:
        for source in node.all_input_nodes:
            if (iterations.read_length(node, source, 0) or 0) > iterations.length(0):
                return (iterations.layouts.readings[node, source].columns or ())[iterations.length(0) :]
    return ()


Assignment = tuple[tuple[tuple[fx.Node, int], tuple[int, int]], ...]  # leaf -> (a, b); constants are left out


class _Misfit(Exception):
    """No reading of the sizes of this node fits."""


@dataclass
class _State:
    """Values of the nodes so far at each probed length."""

    at: int
    values: list[dict[fx.Node, Any]]
    chosen: list[Assignment]


def resolve_lengths(iterations: Iterations, closure: Sequence[fx.Node], growing: Leaves, length: int) -> Leaves:
    """The leaves that are sizes of the buffer's axis, as (a, b) of a*S + b.

    Raises:
        LoopError: sizes fit in no way, or in several.
    """
    refusal: LoopError | None = None
    for lengths in _probes(closure, length):
        try:
            return _Probe(iterations, closure, growing, length, lengths).solve()
        except LoopError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _probes(closure: Sequence[fx.Node], length: int) -> Iterator[tuple[int, int, int]]:
    """Lengths to probe: two above and one below; all below for models that end at the length of the buffer."""
    taken = {leaf for node in closure for leaf in flatten(node) if isinstance(leaf, int)}
    taken |= {size for node in closure if (info := tensor_info(node)) for size in info.shape}
    above = [n for n in range(length + 1, length + 200) if n not in taken][:2]
    below = sorted(range(length - 1, 1, -1), key=lambda n: n in taken)  # stable: free ones first
    if below:
        yield below[0], above[0], above[1]
    if len(below) > 2:
        yield below[2], below[1], below[0]


class _Probe:
    """Runs an iteration at several lengths at once and finds the readings of its numbers under which all shapes fit."""

    def __init__(
        self, iterations: Iterations, closure: Sequence[fx.Node], growing: Leaves, length: int, lengths: tuple[int, ...]
    ) -> None:
        self.iterations, self.nodes, self.growing = iterations, closure, growing
        self.length, self.lengths = length, lengths
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.misfit: fx.Node | None = None

    def solve(self) -> Leaves:
        with _disable_current_modes(), torch.no_grad(), quiet_shapes():
            branches: list[tuple[_State, list[Assignment]]] = []
            found = self.first(_State(0, [{} for _ in self.lengths], []), branches)
            if found is None:
                self.refuse_another_position()
                where = describe(self.misfit) if self.misfit is not None else "its token"
                raise LoopError(
                    "The model reads a padded buffer, and which of its sizes are the buffer's length is not clear.",
                    f"buffer length {self.length}; no reading of the sizes fits {where}",
                    f"trace with a buffer of another length than {self.length} (no other size of the model), or give "
                    "the model the filled part only, model(buf[:, :length])[:, -1]",
                )
            for state, others in branches:
                for other in others:
                    if self.fits_too(state, other):
                        node = self.nodes[state.at]
                        raise LoopError(
                            "The model reads a padded buffer whose length is also another size.",
                            f"{self.length} in {describe(node)} may be the length of the buffer or a constant",
                            f"trace with a buffer of another length than {self.length}, one that is no other size of "
                            "the model (vocabulary, width)",
                        )
        return {leaf: pair for assignment in found for leaf, pair in assignment}

    def refuse_another_position(self) -> None:
        """The likeliest reason why nothing fits: the logits are not those of the last token."""
        for (node, _), (a, b) in self.growing.items():
            if node is self.misfit and op_name(node) in ("getitem", "select", "narrow") and (a, b) != (1, -1):
                raise LoopError(
                    "The decode loop does not take the logits of the last token.",
                    f"{describe(node)} reads position length{b:+} of the padded buffer, the last token is at length-1",
                    "draw from model(buf)[:, length - 1], the logits behind the last token written",
                )

    def first(self, state: _State, branches: list[tuple[_State, list[Assignment]]]) -> list[Assignment] | None:
        """The first assignment that fits everywhere; `branches` are the places where others fit locally."""
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
                state = _copy(saved)
                self.apply(state, others.pop(0))

    def fits_too(self, state: _State, assignment: Assignment) -> bool:
        state = _copy(state)
        try:
            self.apply(state, assignment)
            self.advance(state, [])
        except _Misfit:
            return False
        return True

    def advance(self, state: _State, branches: list[tuple[_State, list[Assignment]]]) -> None:
        while state.at < len(self.nodes):
            node = self.nodes[state.at]
            if node.op in ("placeholder", "get_attr"):
                for values in state.values:
                    values[node] = self.given(node)
                state.at += 1
                state.chosen.append(())
                continue
            fitting = self.fitting(state, node)
            if not fitting:
                self.misfit = node
                raise _Misfit
            if len(fitting) > 1:
                branches.append((_copy(state), fitting[1:]))
            self.apply(state, fitting[0])
        self.check_token(state)

    def apply(self, state: _State, assignment: Assignment) -> None:
        node = self.nodes[state.at]
        results = self.run(state, node, assignment)
        if results is None:
            raise _Misfit
        for values, result in zip(state.values, results, strict=True):
            values[node] = result
        state.at += 1
        state.chosen.append(assignment)

    def fitting(self, state: _State, node: fx.Node) -> list[Assignment]:
        """Assignments under which the node runs and its shapes change evenly, the likeliest first."""
        numbers = list(_sizes(node))
        same = [(key, v) for key, v in numbers if abs(v) == self.length and key not in self.growing]
        options = [[(key, (v // self.length, 0)), None] for key, v in same]
        fitting = [a for a in _product(options) if self.run(state, node, a) is not None]
        if fitting:
            return fitting
        others = [(key, v) for key, v in numbers if key not in self.growing and abs(v) != self.length]
        options += [[None, (key, pair)] for key, v in others for pair in self.derived(v)]
        return [a for a in _product(options[:6]) if self.run(state, node, a) is not None][:1]

    def derived(self, v: int) -> Iterator[tuple[int, int]]:
        """Readings of a number as a multiple of the length, or as one beside it."""
        if v and v % self.length == 0:
            yield v // self.length, 0
        elif 0 < abs(v - self.length) <= 2:
            yield 1, v - self.length

    def run(self, state: _State, node: fx.Node, assignment: Assignment) -> list[Any] | None:
        """The node's values at every length, or None if it fails or they change unevenly."""
        pairs = {**{key: pair for key, pair in self.growing.items() if key[0] is node}, **dict(assignment)}
        results = []
        for length, values in zip(self.lengths, state.values, strict=True):
            leaves = {leaf: a * length + b for (_, leaf), (a, b) in pairs.items()}
            inputs = {source: self.operand(values, node, source, length) for source in node.all_input_nodes}
            try:
                with self.mode:
                    results.append(_call(node, *replace_leaves(node, leaves, inputs)))
            except Exception:
                return None
        return results if self.even(results) else None

    def operand(self, values: dict[fx.Node, Any], node: fx.Node, source: fx.Node, length: int) -> Any:
        if self.iterations.read_length(node, source, 0) is None:
            return values[source]
        reading = self.iterations.layouts.readings[node, source]
        shape = (self.iterations.layouts.batch, length) if reading.ndim == 2 else (length,)
        info = tensor_info(source)
        with self.mode:
            return torch.empty(shape, dtype=info.dtype if info else torch.int64, device=_device(source))

    def given(self, node: fx.Node) -> Any:
        info = tensor_info(node)
        if info is None:
            return node.meta.get("constant")
        with self.mode:
            return torch.empty(info.shape, dtype=info.dtype, device=_device(node))

    def even(self, results: Sequence[Any]) -> bool:
        """Every axis changes as a*S + b."""
        if isinstance(results[0], tuple | list):
            same = len({len(result) for result in results}) == 1
            return same and all(self.even(parts) for parts in zip(*results, strict=True))
        if not isinstance(results[0], torch.Tensor):
            return True
        if len({result.dim() for result in results}) > 1:
            return False
        (s0, s1, s2) = self.lengths
        axes = zip(*(result.shape for result in results), strict=True)
        return all((b - a) * (s2 - s1) == (c - b) * (s1 - s0) for a, b, c in axes)

    def check_token(self, state: _State) -> None:
        token = self.iterations.tokens[0]
        info = tensor_info(token)
        if info is not None and any(tuple(values[token].shape) != info.shape for values in state.values):
            self.misfit = token
            raise _Misfit


@contextmanager
def quiet_shapes() -> Iterator[None]:
    """Shapes that do not fit are expected here; fake tensors log each as an error."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _copy(state: _State) -> _State:
    return _State(state.at, [dict(values) for values in state.values], list(state.chosen))


def _product(options: Sequence[Sequence[Any]]) -> Iterator[Assignment]:
    for combination in itertools.product(*options):
        yield tuple(choice for choice in combination if choice is not None)


def _device(node: fx.Node) -> torch.device | None:
    value = node.meta.get("example_value")
    return value.device if isinstance(value, torch.Tensor) else None


def _call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _sizes(node: fx.Node) -> Iterator[tuple[tuple[fx.Node, int], int]]:
    """The integers of a call that say how long something is."""
    name, leaves = op_name(node), flatten(node)
    inside = 0  # leaves left of a slice, or of the first sequence of sizes
    for at, leaf in enumerate(leaves):
        if name in _SLICES and leaf == "slice":
            inside = 5  # the word, "sequence of 3", and the three
        elif name in _FIRST_SEQUENCE and isinstance(leaf, str) and leaf.startswith("sequence") and at:
            inside, name = int(leaf.split()[-1]) + 1, ""
        inside -= 1
        if isinstance(leaf, int) and not isinstance(leaf, bool) and (name in _ALL_SIZES or inside >= 0):
            yield (node, at), leaf


def last_positions(closure: Sequence[fx.Node], growing: Leaves) -> Leaves:
    """``x[:, S - 1]`` and ``x[:, S - 1 : S]`` as ``x[:, -1]`` and ``x[:, -1:]``: leaf -> constant."""
    fixed: Leaves = {}
    for node in closure:
        name, leaves = op_name(node), flatten(node)
        lasts = [at for at in range(len(leaves)) if growing.get((node, at)) == (1, -1)]
        if name == "select" and len(lasts) == 1:
            fixed[node, lasts[0]] = -1
        for at in lasts if name == "getitem" else ():
            in_slice = at >= 2 and leaves[at - 2 : at] == ["slice", "sequence of 3"]
            stops = at >= 3 and leaves[at - 3 : at - 1] == ["slice", "sequence of 3"]
            if in_slice and growing.get((node, at + 1)) == (1, 0):
                fixed[node, at], fixed[node, at + 1] = -1, None
            elif not in_slice and not stops:
                fixed[node, at] = -1
    return fixed


def draw_inputs(token: fx.Node, closure: Sequence[fx.Node], draws: Sequence[fx.Node]) -> list[fx.Node]:
    """The floating tensors that the last draw reads."""
    sources = list(draws[-1].all_input_nodes)
    if draws[-1].all_input_nodes and tensor_info(sources[0]) is None:
        sources = list(sources[0].all_input_nodes)  # values, indices = logits.topk(1)
    found = [s for s in sources if (info := tensor_info(s)) and info.dtype.is_floating_point]
    return [source for source in found if source in closure and source is not token]
