"""A function that holds a decode loop: how it is traced, and how its result is made from the tokens of a generation.

`Plain` functions are tensor code from the first to the last line. Dynamo traces them whole, and what they return is put
together from the prompt and the tokens. `Written` functions hold Python that needs a token's value: branches, prints,
``.item()``, a tokenizer. Their twins are traced, and they run as they are written on the tokens of the generation.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smc_compile.errors import LoopError
from smc_compile.passes.loop.branches import EndTokens
from smc_compile.passes.loop.recover import DecodeLoop
from smc_compile.program.callables import innermost
from smc_compile.program.caller_caches import own_copy
from smc_compile.program.capture import Capture, CapturedCall
from smc_compile.program.dynamo_refusals import Untraceable
from smc_compile.program.forced_run import ForcedText, Outputs, forced_run
from smc_compile.program.twin import Twin, twin_of
from smc_compile.program.twin_calls import following, noting
from smc_compile.result import Generation


@dataclass(frozen=True)
class Answered:
    """A call whose tokens are generated.

    Attributes:
        outputs: those of the graph that was traced.
        generation: the tokens, [B, P+n].
        ends: how the loop ends its texts.
        vocabulary: rows of the target's logits.
        loop: the loop that was found.
        prompt: [B, P].
        bound: the arguments of the call.
        short: those with which it was traced.
        models: those that the function can reach.
    """

    outputs: Sequence[Any]
    generation: Generation
    ends: EndTokens
    vocabulary: int
    loop: DecodeLoop
    prompt: Tensor
    bound: inspect.BoundArguments
    short: inspect.BoundArguments
    models: Sequence[nn.Module]


class Plain:
    """A function of tensor code."""

    def __init__(self, function: types.FunctionType, nodes: bool = False) -> None:
        """With ``nodes``, models are one node each in what is captured."""
        self._function, self.nodes = function, nodes
        self._capture = Capture(function, nodes=nodes)

    def anew(self) -> Plain:
        """The same code, of which nothing was traced yet."""
        return Plain(self._function, self.nodes)

    def captured(self, bound: inspect.BoundArguments) -> CapturedCall | None:
        return self._capture.captured(*bound.args, **bound.kwargs)

    def result(self, answered: Answered) -> Any:
        """What the function returns.

        Raises:
            NumbersReturned: numbers are among it, which may be those of the few iterations that were traced.
        """
        result = self._capture.result(answered.outputs, *answered.short.args, **answered.short.kwargs)
        numbers = [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, int | float | str)]
        if numbers:
            raise NumbersReturned(
                "The function returns numbers beside its tokens.",
                f"{numbers[0]!r} is among them, and may be counted in the iterations that were traced",
                "return the token ids and nothing else",
            )
        return result


class NumbersReturned(LoopError):
    """What was traced does not tell what the function returns."""


class Written:
    """A function with Python that needs the values of tokens."""

    def __init__(self, twin: Twin, nodes: bool = False) -> None:
        """With ``nodes``, models are one node each in what is captured."""
        self._twin, self.nodes = twin, nodes
        self._capture = Capture(twin.function, tokens_only=True, nodes=nodes)
        self._on_tokens: set[int] = set()
        self._outputs = Outputs()

    def anew(self) -> Written:
        """The same code, of which nothing was traced yet."""
        return Written(self._twin, self.nodes)

    def captured(self, bound: inspect.BoundArguments) -> CapturedCall | None:
        with following(self._twin.plan, self._on_tokens):
            return self._capture.captured(*bound.args, **bound.kwargs)

    def result(self, answered: Answered) -> Any:
        own = {name: _apart(value) for name, value in answered.bound.arguments.items()}
        bound = inspect.BoundArguments(answered.bound.signature, own)  # type: ignore[arg-type]
        tokens = drawn_and_appended(answered)
        if self._twin.quiet:
            answered.generation.stats.warnings.append(
                f"the loop's own code ran after its tokens were drawn: so did {', '.join(self._twin.quiet)}"
            )
        with noting(self._twin.plan, self._on_tokens) as left, _unwritten(answered):
            branches = self._twin.branches
            text = ForcedText(answered.prompt, *tokens, known(answered), answered.vocabulary, left, branches)
            return forced_run(self._twin.function, bound.args, bound.kwargs, answered.models, text, self._outputs)


def written_code(
    function: types.FunctionType, trace: Callable[[Written], Any], nodes: bool = False
) -> tuple[Written, Any] | None:
    """The function by its twin, and what ``trace`` finds in it; None where its source is not known.

    Code behind the loop that Dynamo cannot trace is left out of the trace.

    Raises:
        LoopError: from ``trace``.
    """
    end: int | None = None
    first: Untraceable | None = None
    while True:
        twin = twin_of(function, end)
        if twin is None:
            return None
        written = Written(twin, nodes)
        try:
            return written, trace(written)
        except LoopError as error:
            if not isinstance(error, Untraceable):
                raise (first or error) from error
            code = innermost(function).__code__
            own = [line for file, line in error.frames if file == code.co_filename and line in _lines(code)]
            if not own or own[0] == end or twin_of(function, own[0]) is None:
                raise (first or error) from error
            first, end = first or error, own[0]


def _lines(code: types.CodeType) -> range:
    lines = [line for *_, line in code.co_lines() if line is not None]
    return range(min(lines), max(lines) + 1)


def drawn_and_appended(answered: Answered) -> tuple[Tensor, Tensor]:
    """The tokens [B, n] that the loop is made to draw, and those that it then appends.

    Rows that have ended draw a token that nobody wants: if the loop did not fill them up, its text would be another.
    """
    generation, ends, pad = answered.generation, answered.ends, answered.ends.pad
    tokens = generation.sequences[:, answered.prompt.shape[1] :]
    if pad is None:
        return tokens, tokens
    at = torch.arange(tokens.shape[1], device=tokens.device)
    lengths = generation.new_lengths[:, None]
    is_end = torch.isin(tokens, torch.tensor(ends.ids, device=tokens.device)) & (at == lengths - 1)
    unwanted = next((token for token in range(answered.vocabulary) if token != pad and token not in ends.ids), pad)
    drawn = torch.where(at >= lengths, unwanted, tokens)
    return drawn, torch.where(is_end, pad, tokens) if ends.replaced else tokens


def known(answered: Answered) -> int:
    """How many tokens of the text were drawn, or follow from those that were."""
    tokens = answered.generation.sequences.shape[1] - answered.prompt.shape[1]
    ends_text = bool(answered.ends.ids) and answered.ends.pad is None
    return int(answered.generation.new_lengths.max()) if ends_text else tokens


def _apart(value: Any) -> Any:
    """An argument that the function may write to: caches are copied with their tensors."""
    return copy.deepcopy(value) if own_copy(value) is not value and not _holds_models(value) else value


def _holds_models(value: Any) -> bool:
    return any(isinstance(leaf, nn.Module) for leaf in torch.utils._pytree.tree_leaves(value))


@contextmanager
def _unwritten(answered: Answered) -> Iterator[None]:
    """Buffers of models that keep a cache in them are left as they were."""
    modules = answered.models if answered.loop.cached is not None else ()
    saved = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)
