"""Windows: loops whose model reads the last W tokens of the text only, once there are more.

    ids = ids if ids.size(1) <= W else ids[:, -W:]

Such a model sees another text at every iteration, from position 0 on. Keys of an earlier iteration are those of another
text, unless the model has one layer and no positions: no cache can be kept. The step is the same for all lengths up to
W; it is told apart from a window *inside* of a model, which a cache can hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from smc_compile.passes.loop.iterations import Iterations, iteration_nodes, moves
from smc_compile.passes.loop.leaves import flatten
from smc_compile.passes.loop.tensor_info import plain_tensor
from smc_compile.passes.loop.token_labels import Layouts

SHORTEST = 3  # a window that iterations of three lengths fit in: 1, 2 and 3 tokens


def window_of(layouts: Layouts, tokens: Sequence[fx.Node]) -> int | None:
    """How many tokens the last two iterations read, if they read the end of the text and nothing reads all of it."""
    if len(tokens) < 2:
        return None
    history = layouts.history(tokens)
    found = [_longest_end(layouts, history[: layouts.prompt_length + at]) for at in (len(tokens) - 2, len(tokens) - 1)]
    last, whole = found[1], layouts.prompt_length + len(tokens) - 1
    if last is None or last >= whole or last < 2:
        return None
    return last if found[0] == last else None


def _longest_end(layouts: Layouts, text: tuple[int, ...]) -> int | None:
    """The most tokens at the end of a text that some node reads, other than to move them about."""
    lengths = [
        len(reading.columns)
        for (node, source), reading in layouts.readings.items()
        if reading.exact
        and reading.columns
        and not moves(node, source)
        and text[-len(reading.columns) :] == reading.columns
    ]
    return max(lengths, default=None)


def iteration_in_lines(iterations: Iterations, length: int) -> tuple[str, ...]:
    """The iteration that reads so many tokens, as it was written: two are alike where their lines are.

    Inputs go by their names, constant tensors by their values. () if no iteration reads so many.
    """
    numbers = [at for at in range(len(iterations.tokens)) if iterations.length(at) == length]
    if not numbers:
        return ()
    nodes = iteration_nodes(iterations, numbers[0])
    names = {node: f"%{i}" for i, node in enumerate(nodes)}
    lines = []
    for node in nodes:
        if node.op == "placeholder":
            lines.append(f"input {node.name}")
            continue
        constant = plain_tensor(node.meta.get("constant"))
        target = f"{constant.dtype} {constant.tolist()}" if constant is not None else _target(node)
        leaves = [leaf if not isinstance(leaf, fx.Node) else names.get(leaf, "text") for leaf in flatten(node)]
        lines.append(f"{node.op} {target} {leaves}")
    return tuple(lines)


def _target(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, str) else torch.typename(node.target) + str(node.target)
