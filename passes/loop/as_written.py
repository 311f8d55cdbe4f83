"""TODO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from smc_compile.errors import LoopError
from smc_compile.passes.closeness import NARROW, TOLERANCE, relative_error
from smc_compile.passes.loop.iterations import describe
from smc_compile.passes.loop.kv_loop import FROM_IDS, NO_END, log
from smc_compile.passes.loop.op_tables import (
    is_draw,
    is_random,
    mutated_inputs,
    op_name,
)
from smc_compile.passes.loop.padded_buffer import _CHECKED_LENGTHS


@dataclass(frozen=True)
class CachedIterations:
    """The loop as it was written, beside the step that replaces it.

    Attributes:
        graph: the loop, for the prompt's own length; its constants are in ``root``.
        longer: the same for a prompt with ``more`` tokens more, if the loop was traced for such.
        prompt, tokens, invariants: nodes of ``graph``; ``invariants`` are the inputs of ``step`` after the ids.
    """

    root: fx.GraphModule
    graph: fx.Graph
    longer: fx.Graph | None
    more: int
    prompt: fx.Node
    tokens: tuple[fx.Node, ...]
    step: fx.GraphModule
    invariants: tuple[fx.Node, ...]

    def check(self, arguments: Sequence[Any]) -> float:
        """Run both on the prompt and random tokens and return the largest relative difference of what is drawn from.

        Raises:
            LoopError: they differ: the loop does something else to its cache than keep it.
        """
        draws = self.draws()
        worst = self.difference(self.graph, draws, arguments)
        if self.longer is not None:
            numbers = {node: at for at, node in enumerate(self.graph.nodes)}
            nodes = list(self.longer.nodes)
            there = [Draw(tuple(nodes[numbers[n]] for n in d.nodes), nodes[numbers[d.token]]) for d in draws]
            at = [n for n in self.graph.nodes if n.op == "placeholder"].index(self.prompt)
            text = arguments[at]
            more = text.repeat(*(1,) * (text.dim() - 1), 2 + self.more // text.shape[-1])
            longer = [*arguments[:at], more[..., : text.shape[-1] + self.more], *arguments[at + 1 :]]
            try:
                worst = max(worst, self.difference(self.longer, there, longer))
            except _Fails:  # longer than the positions of the model
                log.debug("the loop was not compared on a longer prompt")
        log.debug("the step agrees with %d iterations to %.1e", len(self.tokens), worst)
        return worst

    def difference(self, graph: fx.Graph, draws: Sequence[Draw], arguments: Sequence[Any]) -> float:
        """The largest relative difference over all iterations.

        Raises:
            LoopError: it is too large.
        """
        given = dict(zip((n for n in self.graph.nodes if n.op == "placeholder"), arguments, strict=True))
        prompt = given[self.prompt]
        ids = prompt.reshape(-1, prompt.shape[-1])
        with torch.no_grad(), torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else []):
            torch.manual_seed(0)
            as_written = _Recorder(fx.GraphModule(self.root, graph), draws)
            as_written.run_all([_copied(value) for value in arguments])
            self.refuse_conditions(as_written.seen)
            coarsest = _coarsest([*arguments, *as_written.seen[0]])
            worst = 0.0
            for iteration, expected in enumerate(as_written.seen):
                rewritten = _Recorder(self.step, [_draw(list(self.step.graph.nodes), _token(self.step))])
                invariants = [given[node] for node in self.invariants]
                try:
                    rewritten.run_all([torch.cat([ids, *as_written.drawn[:iteration]], 1), *invariants])
                except _Fails as error:
                    what = "The first iteration of a loop with a cache cannot be run on another number of tokens."
                    raise LoopError(what, error.why, FROM_IDS) from error
                worst = max(worst, self.compare(iteration, rewritten.seen[0], expected, coarsest))
        return worst

    def draws(self) -> list[Draw]:
        """How each iteration draws its token.

        Raises:
            LoopError: a later iteration draws in another way than the first.
        """
        nodes = list(self.graph.nodes)
        found: list[Draw] = []
        for at, token in enumerate(self.tokens):
            earlier = set(self.tokens[:at])
            found.append(_draw([n for n in nodes if n not in earlier], token))
            ops = [[op_name(n) for n in draw.nodes] for draw in (found[0], found[at])]
            if ops[0] != ops[1]:
                raise LoopError(
                    "The iterations of the decode loop do not draw their tokens alike.",
                    f"iteration 0 draws by {', '.join(ops[0])}; iteration {at} by {', '.join(ops[1])}, at {describe(token)}",
                    f"sample in the same way after the first call as after the others; {NO_END}",
                )
        return found

    def refuse_conditions(self, seen: Sequence[Sequence[torch.Tensor]]) -> None:
        """A draw that is replaced under some condition: random tokens need not meet it."""
        for token, values in zip(self.tokens, seen, strict=True):
            if any(value.dtype == torch.bool for value in values):
                raise LoopError(
                    "A token of the decode loop is replaced after it was drawn.",
                    f"{describe(token)} depends on a condition",
                    NO_END,
                )

    def compare(
        self, iteration: int, actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], dtype: torch.dtype
    ) -> float:
        error = float("inf")
        floats = [[v for v in values if v.dtype.is_floating_point] for values in (actual, expected)]
        if floats[0] and len(floats[0]) == len(floats[1]):
            pairs = list(zip(*floats, strict=True))
            if all(a.numel() == e.numel() for a, e in pairs):
                error = max(relative_error(a.reshape(e.shape), e, dtype in NARROW) for a, e in pairs)
        if error <= TOLERANCE.get(dtype, 1e-4):
            return error
        raise LoopError(
            "The loop with its cache does not compute what the model computes on all tokens so far.",
            f"what token {iteration} is drawn from, at {describe(self.tokens[iteration])}, differs from the first call's on "
            f"prompt + {iteration} tokens by {error:.1e} of its spread, allowed {TOLERANCE.get(dtype, 1e-4):.0e}",
            "keep the whole cache from iteration to iteration (no cropping, no reset, one model, positions that go on counting); "
            "or write the loop without a cache, model(ids)[:, -1]: the compiler makes its own",
        )


@dataclass(frozen=True)
class Draw:
    """The nodes from the first that is random, or picks the token, to the token."""

    nodes: tuple[fx.Node, ...]
    token: fx.Node


def _draw(nodes: Sequence[fx.Node], token: fx.Node) -> Draw:
    """How a token is drawn, among the nodes of its iteration."""
    allowed, needed = set(nodes), {token}
    for node in reversed(nodes):
        if node in needed:
            needed.update(source for source in node.all_input_nodes if source in allowed)
    random = [node for node in nodes if node in needed and is_random(node)]
    picks = [node for node in nodes if node in needed and is_draw(node)]
    drawing = set(random) or set(picks[-1:])
    drawing |= {target for node in drawing for target in mutated_inputs(node)}
    if not random and picks and op_name(picks[-1]) == "getitem":
        drawing |= set(picks[-1].all_input_nodes)
    for node in nodes:
        if node in needed and any(source in drawing for source in node.all_input_nodes):
            drawing.add(node)
    return Draw(tuple(node for node in nodes if node in drawing), token)


class _Fails(LoopError):
    """The loop as it was written fails on its own."""


class _Recorder(fx.Interpreter):
    """Runs a graph, notes what each token is drawn from, and puts random tokens in the place of those drawn."""

    def __init__(self, module: fx.GraphModule, draws: Sequence[Draw]) -> None:
        super().__init__(module)
        self.seen: list[list[torch.Tensor]] = [[] for _ in draws]
        self.drawn: list[torch.Tensor] = []  # [B, 1] each
        self.reads = {node: at for at, draw in enumerate(draws) for node in draw.nodes}
        self.ends = {draw.token: at for at, draw in enumerate(draws)}
        self.generator = torch.Generator().manual_seed(0)

    def run_all(self, arguments: Sequence[Any]) -> None:
        """Run the graph.

        Raises:
            _Fails: it cannot be run: positions beyond those of the model, or of its cache.
        """
        try:
            self.run(*arguments)
        except (RuntimeError, IndexError) as error:
            raise _Fails(
                "The loop with its cache fails when it is run as it was written.",
                str(error).splitlines()[0][:300] if str(error) else repr(error),
                "make the cache long enough for the prompt and all new tokens, and its batch that of the prompt",
            ) from error

    def run_node(self, n: fx.Node) -> Any:
        at = self.reads.get(n)
        if at is not None and (not is_random(n) or op_name(n) in ("multinomial", "bernoulli")):
            sources = [s for s in n.all_input_nodes if self.reads.get(s) != at]
            values = [self.env[s] for s in sources]
            self.seen[at] += [v.clone() for v in values if isinstance(v, torch.Tensor)]
        value = super().run_node(n)
        if n not in self.ends:
            return value
        vocabulary = max((v.shape[-1] for v in self.seen[self.ends[n]] if v.dtype.is_floating_point), default=2)
        forced = torch.randint(vocabulary, value.shape, generator=self.generator).to(value)
        self.drawn.append(forced.reshape(-1, 1).long())
        return forced


def _token(step: fx.GraphModule) -> fx.Node:
    returned = step.graph.output_node().args[0]
    assert isinstance(returned, fx.Node)
    return returned


def _copied(value: Any) -> Any:
    """Arguments are written to; parameters are not, and large."""
    is_buffer = isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter)
    return value.clone() if is_buffer else value


def _coarsest(values: Sequence[Any]) -> torch.dtype:
    present = {v.dtype for v in values if isinstance(v, torch.Tensor) and v.dtype.is_floating_point}
    return next((d for d in (torch.bfloat16, torch.float16, torch.float32) if d in present), torch.float64)


@dataclass(frozen=True)
class PaddedIteration:
    """An iteration as it was written and as it was rewritten; both return the token and what it is drawn from.

    Attributes:
        written: ``forward(buffer [B, L], length, *invariants)``.
        rewritten: ``forward(ids [B, S], *invariants)``.
        padding: the constants behind the prompt.
        length: L.
        sees_law: whether what the token is drawn from is returned too.
    """

    written: fx.GraphModule
    rewritten: fx.GraphModule
    padding: tuple[int, ...]
    length: int
    sees_distribution: bool

    def check(self, prompt: torch.Tensor, invariants: Sequence[Any]) -> None:
        """Compare the two on random histories of many lengths.

        Raises:
            LoopError: they differ, so the model reads the padding.
        """
        generator = torch.Generator().manual_seed(0)
        prompt = prompt.detach().reshape(-1, prompt.shape[-1])
        known = torch.tensor([*prompt.unique().tolist(), *self.padding])  # tokens that the model takes for sure
        lengths = range(1, self.length, max(1, (self.length - 1) // _CHECKED_LENGTHS))
        failures: list[int] = []
        with torch.no_grad(), torch.random.fork_rng(devices=[prompt.device] if prompt.is_cuda else []):
            for length in lengths:
                cells = known[torch.randint(len(known), (len(prompt), self.length), generator=generator)]
                cells[:, length:] = self.padding[-1]
                buffer = cells.to(prompt)
                torch.manual_seed(length)
                expected = self.returned(self.written(buffer, length, *invariants))
                torch.manual_seed(length)
                actual = self.returned(self.rewritten(buffer[:, :length], *invariants))
                if not _agree(actual, expected):
                    failures.append(length)
                if len(expected) > 1:
                    known = torch.arange(max(value.shape[-1] for value in expected[1:]))
        coarse = any(v.dtype in (torch.bfloat16, torch.float16) for v in expected[1:])
        if len(failures) > (len(lengths) // 4 if coarse else 0):  # roundings may move a token across a cut-off
            raise LoopError(
                "The padded buffer of the decode loop is not read causally.",
                f"with {failures[0]} tokens in a buffer of {self.length} the logits differ from those of the "
                f"{failures[0]} tokens alone, so they depend on the padding",
                "use a causal model (is_causal=True), or give it the filled part only, model(buf[:, :length])[:, -1]",
            )

    def returned(self, values: Any) -> tuple[torch.Tensor, ...]:
        return values if self.sees_distribution else (values,)


def _agree(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    if len(expected) == 1:
        return torch.equal(actual[0], expected[0])
    return all(
        a.shape == e.shape and relative_error(a, e) <= TOLERANCE.get(e.dtype, 1e-4)
        for a, e in zip(actual[1:], expected[1:], strict=True)
    )
