"""The proof that all iterations of an unrolled loop are one step: they are compared call by call."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import fx

from smc_compile.passes.fx_tools import describe, op_name
from smc_compile.passes.loop.iterations import Iterations
from smc_compile.passes.loop.leaves import Leaf, flatten
from smc_compile.passes.loop.lengths import Lengths, Sample, Uneven, fit_all, is_integer
from smc_compile.passes.loop.needs_value import ShortPrompt, UnlikeIterations
from smc_compile.passes.loop.tensor_info import plain_tensor


class Varying(defaultdict[Leaf, dict[int, int]]):
    """Integer of iteration 0 -> its values in the iterations where it differs."""

    def __init__(self) -> None:
        super().__init__(dict)


def compare_iterations(iterations: Iterations) -> Lengths:
    """The integers of iteration 0 that grow with the text; all other arguments are the same in every iteration.

    Raises:
        UnlikeIterations: an iteration differs from iteration 0 in something else than an integer.
        LoopError: an integer is no a*S + b.
        ShortPrompt: they differ in that the prompt is as short as what others read of the text's end.
    """
    varying = Varying()
    short: list[fx.Node] = []  # they read the whole prompt, and the end of longer texts
    count = len(iterations.tokens)
    for iteration in range(1, count):
        _compare_iteration(iterations, iteration, varying, short)
    if short:
        raise ShortPrompt(
            "The prompt is as short as the part of the text that the sampler reads.",
            f"{describe(short[0])} reads all {iterations.length(0)} tokens in iteration 0, and so many at the end of "
            "the text in later ones",
            "give a prompt of one token more, or use @smc_compile.decode",
        )
    try:
        return fit_all({leaf: _samples(iterations, leaf, values, count) for leaf, values in varying.items()})
    except Uneven as error:
        raise _grows_unevenly(iterations, error) from None


def even_parts(iterations: Iterations) -> list[Iterations]:
    """The iterations in parts, as long as each can be, in which all are like the first one but for integers a*S + b."""
    starts, part, varying = [0], iterations.part(0), Varying()
    for number in range(1, len(iterations.tokens)):
        if not _continues(part, number - starts[-1], varying):
            starts.append(number)
            part, varying = iterations.part(number), Varying()
    ends = [*starts[1:], len(iterations.tokens)]
    return [iterations.part(start, end) for start, end in zip(starts, ends, strict=True)]


def _continues(part: Iterations, iteration: int, varying: Varying) -> bool:
    """Whether an iteration is like those before it in a part."""
    short: list[fx.Node] = []
    try:
        _compare_iteration(part, iteration, varying, short)
        fit_all({leaf: _samples(part, leaf, values, iteration + 1) for leaf, values in varying.items()})
    except (UnlikeIterations, Uneven):
        return False
    return not short


def _samples(iterations: Iterations, leaf: Leaf, values: dict[int, int], count: int) -> list[Sample]:
    """The value of an integer in so many iterations, beside the length that each reads."""
    node, at = leaf
    first = flatten(node)[at]
    return [(iterations.length(number), values.get(number, first)) for number in range(count)]


def _compare_iteration(iterations: Iterations, iteration: int, varying: Varying, short: list[fx.Node]) -> None:
    """Compare the nodes behind a token with those behind token 0.

    Integers that differ are added to `varying`, and nodes that read the end of longer texts to `short`.
    """
    pairs = {iterations.tokens[0]: iterations.tokens[iteration]}
    pending = [iterations.tokens[0]]
    while pending:
        first = pending.pop()
        other = pairs[first]
        _compare_calls(iterations, first, other, iteration, varying, short)
        for source, counterpart in _operand_pairs(iterations, first, other, iteration):
            if source not in pairs:
                pairs[source] = counterpart
                pending.append(source)
            elif pairs[source] is not counterpart:
                raise _unlike(source, counterpart, iteration, f"`{pairs[source].name}`", f"`{counterpart.name}`")


def _operand_pairs(
    iterations: Iterations, first: fx.Node, other: fx.Node, iteration: int
) -> list[tuple[fx.Node, fx.Node]]:
    """Inputs that must correspond, and the earlier writes to them."""
    pairs = []
    for source, counterpart in zip(flatten(first), flatten(other), strict=True):
        if isinstance(source, fx.Node) and not iterations.reads_history(first, source, 0):
            pairs.append((source, counterpart))
            writes, others = iterations.writes(source, first), iterations.writes(counterpart, other)
            if len(writes) != len(others):
                raise _unlike(source, counterpart, iteration, f"{len(writes)} writes in place", str(len(others)))
            pairs.extend(zip(writes, others, strict=True))
    return pairs


def _compare_calls(
    iterations: Iterations, first: fx.Node, other: fx.Node, iteration: int, varying: Varying, short: list[fx.Node]
) -> None:
    """Compare the targets and the arguments of two calls."""
    if first is not other and (first.op == "placeholder" or other.op == "placeholder"):
        raise _unlike(first, other, iteration, f"the input `{first.name}`", f"`{other.name}`")
    if first.op != other.op or not _same_target(first, other):
        raise _unlike(first, other, iteration, op_name(first) or str(first.target), op_name(other) or str(other.target))
    leaves, others = flatten(first), flatten(other)
    if len(leaves) != len(others):
        raise _unlike(first, other, iteration, str(first.args), str(other.args))
    for i, (leaf, counterpart) in enumerate(zip(leaves, others, strict=True)):
        if isinstance(leaf, fx.Node) and isinstance(counterpart, fx.Node):
            if _reads_end_of_longer(iterations, (first, leaf), (other, counterpart), iteration):
                short.append(first)
            elif not _read_alike(iterations, (first, leaf), (other, counterpart), iteration):
                raise _unlike(first, other, iteration, f"`{leaf.name}`", f"`{counterpart.name}`")
        elif is_integer(leaf) and is_integer(counterpart):
            if leaf != counterpart:
                varying[first, i][iteration] = counterpart
        elif not _same_constant(leaf, counterpart):
            raise _unlike(first, other, iteration, str(leaf), str(counterpart))


def _read_alike(
    iterations: Iterations, first: tuple[fx.Node, fx.Node], other: tuple[fx.Node, fx.Node], iteration: int
) -> bool:
    """Whether both read their whole text, both read it in a buffer of the same length, or neither reads it."""
    length, found = iterations.read_length(*first, 0), iterations.read_length(*other, iteration)
    if length is None or found is None:
        return length is found
    return found == (length if length > iterations.length(0) else iterations.length(iteration))


def _reads_end_of_longer(
    iterations: Iterations, first: tuple[fx.Node, fx.Node], other: tuple[fx.Node, fx.Node], iteration: int
) -> bool:
    """Whether the whole prompt is read in iteration 0, and so many tokens at the end of a longer text."""
    length = iterations.length(0)
    if iterations.read_length(*first, 0) != length or not iterations.reads_end(*other, iteration):
        return False
    return len(iterations.layouts.readings[other].columns or ()) == length < iterations.length(iteration)


def _same_target(first: fx.Node, other: fx.Node) -> bool:
    if first.target == other.target:
        return True
    value, counterpart = plain_tensor(first.meta.get("constant")), plain_tensor(other.meta.get("constant"))
    if value is None or counterpart is None:
        return False
    return value.dtype == counterpart.dtype and torch.equal(value, counterpart)


def _same_constant(leaf: Any, other: Any) -> bool:
    if isinstance(leaf, float) and isinstance(other, float) and math.isnan(leaf):
        return math.isnan(other)
    return type(leaf) is type(other) and leaf == other


def _grows_unevenly(iterations: Iterations, error: Uneven) -> UnlikeIterations:
    (_, first), (_, second) = error.samples[:2]
    _, value = error.off
    return UnlikeIterations(
        "An integer of the decode loop does not grow evenly from iteration to iteration.",
        f"{describe(error.leaf[0])} uses {first} in iteration 0, {second} in iteration 1 and {value} in iteration "
        f"{list(error.samples).index(error.off)}; only a*S + b can be generalised, S being the sequence length",
        "compute shapes and positions from ids.shape[1] by sums and constant multiples only",
    )


def _unlike(first: fx.Node, other: fx.Node, iteration: int, value: str, counterpart: str) -> UnlikeIterations:
    return UnlikeIterations(
        "The iterations of the decode loop are not alike, so it cannot be compiled as one step.",
        f"{describe(first)} has {value} in iteration 0 but {counterpart} in iteration {iteration}, {describe(other)}",
        "make every iteration do the same: no values and no branches that change with the iteration number",
    )
