"""Branches on tokens: the marks that they leave in a graph, and the tokens by which they end a text.

    if token == eos: break          leaves          branch(eq, False)       the loop goes on where `eq` is False

A graph is traced as if no branch left the loop. Loops with several rows keep those that have ended apart:

    token = where(done, pad, drawn);  done = done | (token == eos)

There the drawn token stands for the token, so that the loop is one without an end. Which tokens end a text is not read
off the code: the integers of the loop are computed for tokens that it compares with, and for others. What is found so
lets a generation end early. That the text is right does not rest on it: the function itself runs on the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from smc_compile.passes.fx_tools import mutated_inputs, op_name, reachable
from smc_compile.passes.loop.draws import is_draw, is_random
from smc_compile.passes.loop.leaves import flatten
from smc_compile.passes.loop.lengths import is_integer
from smc_compile.passes.loop.tensor_info import TOKEN_DTYPES, TensorInfo, tensor_info

_library = torch.library.Library("smc_compile", "FRAGMENT")
_library.define("branch(Tensor condition, bool planned) -> ()")
_library.impl("branch", lambda condition, planned: None, "CompositeExplicitAutograd")
_library.impl("branch", lambda condition, planned: None, "Meta")

_DISCRETE = (*TOKEN_DTYPES, torch.bool)
_MOST_ENDS = 64  # constants that are tried as ends of a text


def note_branch(condition: Tensor, planned: bool) -> None:
    """Leave a mark in the graph that is traced: a branch asked for ``condition``, and the trace took it as planned."""
    torch.ops.smc_compile.branch(condition, planned)


@dataclass(frozen=True)
class Mark:
    """A branch of the trace: what it asked for, the answer that was planned, and the nodes before it."""

    condition: fx.Node
    planned: bool
    drawn: frozenset[fx.Node]


def take_marks(graph: fx.Graph) -> list[Mark]:
    """Remove the marks from a graph."""
    marks: list[Mark] = []
    before: list[fx.Node] = []
    for node in graph.nodes:
        if node.target is not torch.ops.smc_compile.branch:
            before.append(node)
            continue
        condition, planned = node.args
        if isinstance(condition, fx.Node):
            marks.append(Mark(condition, bool(planned), frozenset(n for n in before if is_draw(n))))
        graph.erase_node(node)
    return marks


# ---- drawn tokens --------------------------------------------------------------------------------------------------


def drawn_tokens(nodes: Sequence[fx.Node], tokens: Sequence[fx.Node]) -> list[fx.Node]:
    """For each token the node that is drawn for it: the token itself, unless rows that have ended replace it."""
    drawn: list[fx.Node] = []
    for token in tokens:
        drawn.append(_drawn(nodes, token, frozenset(drawn)))
    return drawn


def _drawn(nodes: Sequence[fx.Node], token: fx.Node, earlier: frozenset[fx.Node]) -> fx.Node:
    """The first node on which alone, of what an iteration draws, its token depends."""
    writers = _writers(nodes)
    behind = reachable([token], lambda node: [s for s in _sources(node, writers) if s not in earlier and _discrete(s)])
    draws = {node for node in behind if _is_drawn(node)}
    size = _numel(token)

    def decides(node: fx.Node) -> bool:
        """Whether the token depends on what is drawn by this node alone."""
        past = reachable([token], lambda n: [s for s in _sources(n, writers) if s in behind and s is not node])
        return not past & draws - {node}

    alike = [node for node in sorted(behind) if _numel(node) == size and not mutated_inputs(node)]
    return next((node for node in alike if node is not token and decides(node)), token) if draws else token


def _numel(node: fx.Node) -> int | None:
    info = tensor_info(node)
    target = mutated_inputs(node)
    info = tensor_info(target[0]) if info is None and target else info
    return info.numel if info is not None else None


def _writers(nodes: Sequence[fx.Node]) -> dict[int, list[fx.Node]]:
    """Storage -> the nodes that write to it."""
    writers: dict[int, list[fx.Node]] = {}
    for node in nodes:
        for target in mutated_inputs(node):
            if (info := tensor_info(target)) is not None:
                writers.setdefault(info.storage, []).append(node)
    return writers


def _sources(node: fx.Node, writers: dict[int, list[fx.Node]]) -> list[fx.Node]:
    """What a node reads, and the writes to it before."""
    found = list(node.all_input_nodes)
    for source in node.all_input_nodes:
        info = tensor_info(source)
        found += [w for w in writers.get(info.storage, []) if w < node] if info is not None else []
    return found


def _discrete(node: fx.Node) -> bool:
    """Whether a node's value is made of integers or truth values."""
    info = tensor_info(node)
    if info is not None:
        return info.dtype in _DISCRETE
    return node.op in ("call_function", "call_method") and all(_discrete(source) for source in node.all_input_nodes)


def _is_drawn(node: fx.Node) -> bool:
    """Whether a discrete node is made from others: a draw, an argmax, an order."""
    return is_random(node) or not all(_discrete(source) for source in node.all_input_nodes)


# ---- ends ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EndTokens:
    """The tokens that end a row.

    Attributes:
        ids: any of them ends it; () where no token does so by itself.
        pad: what follows them, if the loop goes on for other rows; None if it does not.
        replaced: whether `pad` also stands for the token that ends the row.
    """

    ids: tuple[int, ...] = ()
    pad: int | None = None
    replaced: bool = False


@dataclass(frozen=True, eq=False)
class Ends:
    """What a loop computes from drawn tokens besides its text.

    Attributes:
        graph: (drawn tokens, inputs) -> (tokens, conditions).
        drawn: (shape, dtype) of each drawn token.
        inputs: numbers of the placeholders behind the inputs.
        planned: the conditions' values while the loop goes on.
        after: for each condition, how many tokens are drawn before it is asked for.
        masked: whether tokens are replaced in rows that have ended.
        batch: rows.
    """

    graph: fx.GraphModule
    drawn: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    inputs: tuple[int, ...]
    planned: tuple[bool, ...]
    after: tuple[int, ...]
    masked: bool
    batch: int

    def tokens(self, arguments: Sequence[Any], vocabulary: int) -> EndTokens:
        """Which tokens end a row, with these arguments of the loop's graph."""
        given = [arguments[at] for at in self.inputs]
        compared = sorted({number for number in self._numbers(given) if 0 <= number < vocabulary})
        if len(compared) > _MOST_ENDS:
            return EndTokens()
        others = [number for number in range(min(vocabulary, _MOST_ENDS + 2)) if number not in compared]
        return self._of_rows(given, compared, others) if self.masked else self._of_text(given, compared, others)

    def _of_text(self, given: Sequence[Any], compared: Sequence[int], others: Sequence[int]) -> EndTokens:
        """The tokens at which the whole loop ends. With several rows none does so by itself."""
        count = len(self.drawn)
        usual = (number for number in (*others[:1], *compared) if not self._leaves([number] * count, given, count))
        go_on = next(usual, None) if self.batch == 1 else None
        if go_on is None:
            return EndTokens()
        first = tuple(number for number in compared if self._leaves([number], given, 1))
        second = tuple(number for number in compared if self._leaves([go_on, number], given, 2))
        return EndTokens(first) if first == second else EndTokens()

    def _of_rows(self, given: Sequence[Any], compared: Sequence[int], others: Sequence[int]) -> EndTokens:
        """The tokens after which a row is filled up."""
        ids, pads, replaced = [], set(), set()
        for number in compared:
            after = [self._run([number, *[then] * len(self.drawn)], given)[0] for then in (*others[:2], *compared)]
            seconds = {int(tokens[1].flatten()[0]) for tokens in after}
            if len(seconds) == 1:  # the second token does not depend on what is drawn
                ids.append(number)
                pads |= seconds
                replaced.add(int(after[0][0].flatten()[0]) != number)
        if not ids or len(pads) > 1 or len(replaced) > 1:
            return EndTokens()
        return EndTokens(tuple(ids), pads.pop(), replaced.pop())

    def _leaves(self, tokens: Sequence[int], given: Sequence[Any], count: int) -> bool:
        """Whether the loop ends with the last of these tokens, or before, and asks for no other first."""
        filled = [*tokens, *[tokens[-1]] * (len(self.drawn) - len(tokens))]
        _, conditions = self._run(filled, given)
        asked = zip(conditions, self.planned, self.after, strict=True)
        return any(bool(value) != planned for value, planned, after in asked if after <= count)

    def _run(self, tokens: Sequence[int], given: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
        """The tokens and conditions where every row draws the same tokens, one for each iteration."""
        device = next((value.device for value in given if isinstance(value, Tensor)), torch.device("cpu"))
        drawn = [
            torch.full(shape, token, dtype=dtype, device=device)
            for token, (shape, dtype) in zip(tokens, self.drawn, strict=False)
        ]
        copies = [value.clone() if isinstance(value, Tensor) else value for value in given]
        with torch.no_grad():
            results = list(self.graph(*drawn, *copies))
        return results[: len(self.drawn)], results[len(self.drawn) :]

    def _numbers(self, given: Sequence[Any]) -> set[int]:
        """The integers that tokens may be compared with: constants of the graph and small inputs."""
        found = {leaf for node in self.graph.graph.nodes for leaf in flatten(node) if is_integer(leaf)}
        constants = [getattr(self.graph, str(n.target)) for n in self.graph.graph.nodes if n.op == "get_attr"]
        for value in (*given, *constants):
            if isinstance(value, Tensor) and value.numel() <= _MOST_ENDS and not value.dtype.is_floating_point:
                found |= {int(number) for number in value.flatten().tolist()}
        return found


def find_ends(
    root: fx.GraphModule,
    nodes: Sequence[fx.Node],
    tokens: Sequence[fx.Node],
    drawn: Sequence[fx.Node],
    marks: Sequence[Mark],
    batch: int,
) -> Ends | None:
    """What tokens and conditions are computed from drawn tokens; None if there is nothing that could end a text."""
    masked = list(tokens) != list(drawn)
    if not masked and not marks:
        return None
    writers = _writers(nodes)
    stops = set(drawn)

    def behind(node: fx.Node) -> set[fx.Node]:
        return reachable([node], lambda n: [] if n in stops else _sources(n, writers))

    known = [mark for mark in marks if all(map(_computable(stops), behind(mark.condition)))]
    results = [*tokens, *(mark.condition for mark in known)]
    if not all(map(_computable(stops), set().union(*map(behind, tokens)))):
        return None
    needed = sorted(set().union(*map(behind, results)))
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(f"drawn_{t}") for t, node in enumerate(drawn)}
    inputs = [node for node in needed if node.op == "placeholder"]
    copies |= {node: graph.placeholder(node.name) for node in inputs}
    for node in needed:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    values = [copies[mutated_inputs(node)[0] if op_name(node) == "setitem" else node] for node in results]
    graph.output(tuple(values))
    placeholders = [node for node in nodes if node.op == "placeholder"]
    infos = [info for node in drawn if (info := tensor_info(node)) is not None]
    return Ends(
        fx.GraphModule(root, graph, class_name="Ends"),
        tuple((info.shape, info.dtype) for info in infos),
        tuple(placeholders.index(node) for node in inputs),
        tuple(mark.planned for mark in known),
        tuple(sum(draw in mark.drawn for draw in drawn) for mark in known),
        masked,
        batch,
    )


def _computable(drawn: set[fx.Node]) -> Any:
    return lambda node: node in drawn or (_discrete(node) and not _is_drawn(node)) or mutated_inputs(node)


def without_masks(graph: fx.Graph, tokens: Sequence[fx.Node], drawn: Sequence[fx.Node]) -> None:
    """Let every drawn token stand for the token, in place."""
    for token, draw in zip(tokens, drawn, strict=True):
        if token is draw:
            continue
        info = tensor_info(token)
        for node in [n for n in graph.nodes if draw < n <= token and mutated_inputs(n) and _numel(n) == _numel(token)]:
            node.replace_all_uses_with(mutated_inputs(node)[0])
            graph.erase_node(node)
        if info is None or token not in graph.nodes:
            continue
        own = tensor_info(draw)
        assert own is not None
        with graph.inserting_after(draw):
            shaped = graph.call_method("reshape", (draw, info.shape))
            shaped.meta = {**token.meta, "tensor": TensorInfo(info.shape, own.dtype, own.storage)}
        with graph.inserting_after(shaped):
            copy = graph.call_method("to", (shaped, info.dtype))
            copy.meta = {**token.meta, "tensor": TensorInfo(info.shape, info.dtype, own.storage)}
        token.replace_all_uses_with(copy)
