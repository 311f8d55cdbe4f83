"""A model that reads a padded buffer, ``model(buf)[:, i - 1]``: the same step on the text alone.

The buffer has L columns: the text, then constants. A causal model gives at the text's last position what it gives there
for the text alone. So the step reads the text [B, S], and every size that is L becomes S (`lengths.solve_lengths`). If
two readings of a number fit, the loop is refused. That the model is causal is not proved but measured:
`as_written.PaddedIteration` compares the step with the iteration as it was written, on real weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from smc_compile.errors import LoopError
from smc_compile.passes.fx_tools import describe, op_name
from smc_compile.passes.loop.draws import is_draw
from smc_compile.passes.loop.iterations import Iterations
from smc_compile.passes.loop.leaves import Leaf, flatten
from smc_compile.passes.loop.lengths import LAST, LENGTH, Lengths, TracedCalls, UnclearLengths, solve_lengths
from smc_compile.passes.loop.tensor_info import tensor_info


def padded_length(iterations: Iterations, closure: Sequence[fx.Node]) -> int | None:
    """L, if iteration 0 reads its text in a buffer of L columns with padding; None if it reads the text alone.

    Raises:
        LoopError: it reads buffers of several lengths.
    """
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


def lengths_in_buffer(iterations: Iterations, closure: Sequence[fx.Node], growing: Lengths, length: int) -> Lengths:
    """The integers of an iteration that are sizes of the buffer's axis, besides those that grow with the iteration.

    Args:
        closure: the nodes of iteration 0.
        growing: what is known from comparing the iterations.
        length: L, the columns of the buffer.

    Raises:
        LoopError: the numbers fit in no way, or in several.
    """
    calls = TracedCalls(closure, iterations.tokens[0], length, iterations.texts_read(closure), growing)
    try:
        return solve_lengths(calls)
    except UnclearLengths as error:
        raise _unclear(error, growing, length) from None


def _unclear(error: UnclearLengths, growing: Lengths, length: int) -> LoopError:
    if error.several:
        return LoopError(
            "The model reads a padded buffer whose length is also another size.",
            unclear_in_words(error, length),
            f"trace with a buffer of another length than {length}, one that is no other size of the model "
            "(vocabulary, width)",
        )
    for (node, _), position in growing.items():  # the likeliest reason: the logits are not those of the last token
        if node is error.node and op_name(node) in ("getitem", "select", "narrow") and position != LAST:
            return LoopError(
                "The decode loop does not take the logits of the last token.",
                f"{describe(node)} reads position length{position.offset:+} of the padded buffer, the last token is at "
                "length-1",
                "draw from model(buf)[:, length - 1], the logits behind the last token written",
            )
    return LoopError(
        "The model reads a padded buffer, and which of its sizes are the buffer's length is not clear.",
        unclear_in_words(error, length),
        f"trace with a buffer of another length than {length} (no other size of the model), or give the model the "
        "filled part only, model(buf[:, :length])[:, -1]",
    )


def unclear_in_words(error: UnclearLengths, length: int) -> str:
    """Why the lengths could not be told apart, with the node where that shows."""
    if error.several and error.node is not None:
        return f"{length} in {describe(error.node)} may be the length of the buffer or a constant"
    where = describe(error.node) if error.node is not None else "its token"
    return f"buffer length {length}; no reading of the sizes fits {where}"


def last_positions(closure: Sequence[fx.Node], growing: Lengths) -> dict[Leaf, int | None]:
    """Integers that become constants: ``x[:, S - 1]`` is ``x[:, -1]``, and ``x[:, S - 1 : S]`` is ``x[:, -1:]``."""
    fixed: dict[Leaf, int | None] = {}
    for node in closure:
        name, leaves = op_name(node), flatten(node)
        lasts = [at for at in range(len(leaves)) if growing.get((node, at)) == LAST]
        if name == "select" and len(lasts) == 1:
            fixed[node, lasts[0]] = -1
        for at in lasts if name == "getitem" else ():
            in_slice = at >= 2 and leaves[at - 2 : at] == ["slice", "sequence of 3"]
            stops = at >= 3 and leaves[at - 3 : at - 1] == ["slice", "sequence of 3"]
            if in_slice and growing.get((node, at + 1)) == LENGTH:
                fixed[node, at], fixed[node, at + 1] = -1, None
            elif not in_slice and not stops:
                fixed[node, at] = -1
    return fixed


def draw_inputs(token: fx.Node, closure: Sequence[fx.Node]) -> list[fx.Node]:
    """The floating tensors that the last draw of an iteration reads."""
    draw = [node for node in closure if is_draw(node)][-1]
    sources = list(draw.all_input_nodes)
    if sources and tensor_info(sources[0]) is None:
        sources = list(sources[0].all_input_nodes)  # values, indices = logits.topk(1)
    found = [s for s in sources if (info := tensor_info(s)) and info.dtype.is_floating_point]
    return [source for source in found if source in closure and source is not token]
