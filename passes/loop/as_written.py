"""The step beside the loop as it was written: both run on random tokens, and what tokens are drawn from is compared.

What the passes assume of a model and do not prove is measured here, on real weights: that a padded buffer is read
causally, and that a loop keeps its cache.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from smc_compile.errors import LoopError
from smc_compile.passes.closeness import NARROW, allowed_error, coarsest_dtype, relative_error
from smc_compile.passes.fx_tools import describe, mutated_inputs, op_name, reachable
from smc_compile.passes.loop.concretise import Concrete
from smc_compile.passes.loop.draws import is_draw, is_random
from smc_compile.passes.loop.iterations import Iterations
from smc_compile.passes.loop.lengths import longest_text, symbolic_length
from smc_compile.passes.loop.needs_value import EndInLoop
from smc_compile.passes.loop.preparation import Preparation
from smc_compile.passes.loop.refusals import FROM_IDS, NO_END

log = logging.getLogger(__name__)
_MORE = 40  # tokens that a prompt is longer by in the second comparison: a cropped cache shows there
_CHECKED_LENGTHS = 12  # about how many lengths of text a padded buffer is compared at


# ---- a cache -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CachedIterations:
    """A loop with a cache as it was written, beside the step that replaces it.

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
            twins = dict(zip(self.graph.nodes, self.longer.nodes, strict=True))
            there = [Draw(tuple(twins[node] for node in draw.nodes), twins[draw.token]) for draw in draws]
            try:
                worst = max(worst, self.difference(self.longer, there, self.with_longer_prompt(arguments)))
            except _Fails:  # longer than the positions of the model
                log.debug("the loop was not compared on a longer prompt")
        log.debug("the step agrees with %d iterations to %.1e", len(self.tokens), worst)
        return worst

    def with_longer_prompt(self, arguments: Sequence[Any]) -> list[Any]:
        """The arguments with a prompt that is repeated until it has ``more`` tokens more."""
        at = self.graph.find_nodes(op="placeholder").index(self.prompt)
        text = arguments[at]
        repeated = text.repeat(*(1,) * (text.dim() - 1), 2 + self.more // text.shape[-1])
        return [*arguments[:at], repeated[..., : text.shape[-1] + self.more], *arguments[at + 1 :]]

    def difference(self, graph: fx.Graph, draws: Sequence[Draw], arguments: Sequence[Any]) -> float:
        """The largest relative difference over all iterations, for ``self.graph`` or its twin for longer prompts.

        Raises:
            LoopError: it is too large.
        """
        given = dict(zip(self.graph.find_nodes(op="placeholder"), arguments, strict=True))
        prompt = given[self.prompt]
        ids = prompt.reshape(-1, prompt.shape[-1])
        with torch.no_grad(), torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else []):
            torch.manual_seed(0)
            as_written = _Recorder(fx.GraphModule(self.root, graph), draws)
            as_written.run_all([_copied(value) for value in arguments])
            self.refuse_conditions(as_written.seen)
            coarsest = coarsest_dtype([*arguments, *as_written.seen[0]])
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
                raise EndInLoop(
                    "The iterations of the decode loop do not draw their tokens alike.",
                    f"iteration 0 draws by {', '.join(ops[0])}; iteration {at} by {', '.join(ops[1])}, "
                    f"at {describe(token)}",
                    f"sample in the same way after the first call as after the others; {NO_END}",
                )
        return found

    def refuse_conditions(self, seen: Sequence[Sequence[torch.Tensor]]) -> None:
        """A draw that is replaced under some condition: random tokens need not meet it."""
        for token, values in zip(self.tokens, seen, strict=True):
            if any(value.dtype == torch.bool for value in values):
                raise EndInLoop(
                    "A token of the decode loop is replaced after it was drawn.",
                    f"{describe(token)} depends on a condition",
                    NO_END,
                )

    def compare(
        self, iteration: int, actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], dtype: torch.dtype
    ) -> float:
        """The relative difference of what one token is drawn from.

        Raises:
            LoopError: it is more than rounding explains in this dtype.
        """
        error = float("inf")
        floats = [[v for v in values if v.dtype.is_floating_point] for values in (actual, expected)]
        if floats[0] and len(floats[0]) == len(floats[1]):
            pairs = list(zip(*floats, strict=True))
            if all(a.numel() == e.numel() for a, e in pairs):
                error = max(relative_error(a.reshape(e.shape), e, dtype in NARROW) for a, e in pairs)
        if error <= allowed_error(dtype):
            return error
        raise LoopError(
            "The loop with its cache does not compute what the model computes on all tokens so far.",
            f"what token {iteration} is drawn from, at {describe(self.tokens[iteration])}, differs from the first "
            f"call's on prompt + {iteration} tokens by {error:.1e} of its spread, allowed {allowed_error(dtype):.0e}",
            "keep the whole cache from iteration to iteration (no cropping, no reset, one model, positions that go on "
            "counting); or write the loop without a cache, model(ids)[:, -1]: the compiler makes its own",
        )


def cached_iterations(
    preparation: Preparation,
    concrete: Concrete,
    iterations: Iterations,
    step: fx.GraphModule,
    invariants: Sequence[fx.Node],
) -> CachedIterations:
    """The loop as it was written, also for a longer prompt if Dynamo traced it for any."""
    prompt, length = iterations.layouts.prompt, iterations.layouts.prompt_length
    size, end = symbolic_length(prompt), longest_text(prompt)
    more = _MORE if end is None else min(_MORE, end - len(iterations.tokens) - length)
    longer = preparation.at({size: length + more}) if size is not None and more > 0 else None
    tokens = tuple(iterations.tokens)
    return CachedIterations(preparation.gm, concrete.graph, longer, more, prompt, tokens, step, tuple(invariants))


@dataclass(frozen=True)
class Draw:
    """How an iteration draws its token: the nodes from the first that is random, or picks it, to the token."""

    nodes: tuple[fx.Node, ...]
    token: fx.Node


def _draw(nodes: Sequence[fx.Node], token: fx.Node) -> Draw:
    """How a token is drawn, among the nodes of its iteration."""
    allowed = set(nodes)
    needed = reachable([token], lambda node: [source for source in node.all_input_nodes if source in allowed])
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
    """The loop as it was written cannot be run with these arguments."""


class _Recorder(fx.Interpreter):
    """Runs a graph, notes what each token is drawn from, and replaces the tokens that it draws by random ones.

    Attributes:
        seen: for each draw, the tensors that it reads.
        drawn: for each draw, the token that replaced its result, [B, 1].
    """

    def __init__(self, module: fx.GraphModule, draws: Sequence[Draw]) -> None:
        super().__init__(module)
        self.seen: list[list[torch.Tensor]] = [[] for _ in draws]
        self.drawn: list[torch.Tensor] = []
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
    """A copy of an argument that the loop may write to; parameters are large and are not written to."""
    is_buffer = isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter)
    return value.clone() if is_buffer else value


# ---- a padded buffer ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PaddedIteration:
    """An iteration as it was written and as it was rewritten.

    Attributes:
        written: ``forward(buffer [B, L], length, *invariants) -> token``.
        rewritten: ``forward(ids [B, S], *invariants) -> token``.
        padding: the constants behind the prompt.
        length: L.
        sees_distribution: whether both return ``(token, *what it is drawn from)``.
    """

    written: fx.GraphModule
    rewritten: fx.GraphModule
    padding: tuple[int, ...]
    length: int
    sees_distribution: bool

    def check(self, prompt: torch.Tensor, invariants: Sequence[Any]) -> None:
        """Compare the two on random texts of many lengths.

        Raises:
            LoopError: they differ, so the model reads the padding.
        """
        generator = torch.Generator().manual_seed(0)
        prompt = prompt.detach().reshape(-1, prompt.shape[-1])
        known = torch.tensor(
            [*prompt.unique().tolist(), *self.padding]
        )  # ids that the model surely has; all of them once its rows were seen
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
        coarse = any(v.dtype in NARROW for v in expected[1:])
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
        a.shape == e.shape and relative_error(a, e) <= allowed_error(e.dtype)
        for a, e in zip(actual[1:], expected[1:], strict=True)
    )
