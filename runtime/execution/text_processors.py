"""Rules that read the text so far: the same for target and draft, applied to every particle outside the regions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from smc_compile.errors import GenerationError
from smc_compile.runtime.algorithms.tensors import mark_dynamic
from smc_compile.runtime.execution.region import Region
from smc_compile.runtime.state.request import Request, Rows, TextProcessor


class TextProcessors:
    """Logits processors in order, ``(text [R, L], scores [R, V], rows) -> scores [R, V]``, before a distribution's stages.

    Rules in ``traced`` are tensor code and compile into one region for texts of every length. Others may keep a state:
    with ``by_hand`` each request brings its own, and they run as they are, once a position.
    """

    def __init__(self, traced: Sequence[TextProcessor] = (), on_host: bool = False, compiler: str = "inductor") -> None:
        self.text_processors, self._on_host_too = tuple(traced), on_host
        self.region = Region("rules", _in_order(self.text_processors), compiler) if traced else None
        self.seconds = 0.0

    def __bool__(self) -> bool:
        return self.region is not None or self._on_host_too

    def told(self) -> list[str]:
        """Each rule and where it runs."""
        where = "compiled" if self.region is not None else "on the host, once a position"
        return [f"{name_of(text_processor)}: {where}, on target and draft" for text_processor in self.text_processors]

    def begin(self, request: Request) -> None:
        """Take the rules of a request."""
        self.seconds = 0.0
        if self.region is None:
            self.text_processors = request.text_processors

    def apply(self, text: Tensor, scores: Tensor, rows: Rows, live: Tensor) -> Tensor:
        """Scores [R, T, V] after the T last prefixes of text [R, L].

        Prefixes that are not ``live`` [R, T] count for nothing: no rule is asked about them.

        Raises:
            GenerationError: without a partial result, when a rule raises, changes the shape, or leaves no token.
        """
        start = time.perf_counter()
        count = scores.shape[1]
        columns = []
        for t in range(count):
            prefix = text[:, : text.shape[1] - count + 1 + t].contiguous()
            columns.append(self._position(prefix, scores[:, t].contiguous(), rows, live[:, t]))
        self.seconds += time.perf_counter() - start
        return torch.stack(columns, 1)

    def _position(self, text: Tensor, scores: Tensor, rows: Rows, live: Tensor) -> Tensor:
        if self.region is not None:
            try:
                after = self.region(mark_dynamic(text, 1), scores.clone(), rows)
            except Exception as error:
                raise processor_error(
                    self.text_processors, f"compiled, it raised {type(error).__name__}: {error}"
                ) from error
            check_scores(after[live], scores[live], self.text_processors)
            return torch.where(live[:, None], after, scores)
        if live.any():
            some = Rows(rows.request[live], rows.padding[live])
            scores[live] = self._on_host(text[live], scores[live], some)
        return scores

    def _on_host(self, text: Tensor, scores: Tensor, rows: Rows) -> Tensor:
        for text_processor in self.text_processors:
            before = scores
            try:
                scores = text_processor(text, before.clone(), rows)
            except Exception as error:
                raise processor_error(text_processor, f"it raised {type(error).__name__}: {error}") from error
            check_scores(scores, before, (text_processor,))
        return scores


def _in_order(text_processors: Sequence[TextProcessor]) -> Callable[[Tensor, Tensor, Rows], Tensor]:
    def apply_processors(text: Tensor, scores: Tensor, rows: Rows) -> Tensor:
        for text_processor in text_processors:
            scores = text_processor(text, scores, rows)
        return scores

    return apply_processors


def check_scores(after: object, before: Tensor, text_processors: Sequence[TextProcessor]) -> None:
    """Raises GenerationError when rules returned something else than scores of a distribution, though they were given some."""
    text_processor = text_processors[0] if len(text_processors) == 1 else text_processors
    if not isinstance(after, Tensor) or after.shape != before.shape:
        found = f"a tensor of shape {tuple(after.shape)}" if isinstance(after, Tensor) else type(after).__name__
        raise processor_error(text_processor, f"it returned {found} for scores of shape {tuple(before.shape)}")
    if after.isnan().any() and not before.isnan().any():
        raise processor_error(text_processor, "it returned NaN")
    if bool((after == -torch.inf).all(-1).any()) and not bool((before == -torch.inf).all(-1).any()):
        raise processor_error(text_processor, "it removed every token: nothing is left to draw")


def processor_error(text_processor: object, why: str) -> GenerationError:
    names = [name_of(r) for r in (text_processor if isinstance(text_processor, Sequence) else [text_processor])]
    return GenerationError(
        f"the logits processor {' or '.join(names)} broke the distribution of the next token",
        why,
        "return scores of the same shape [rows, vocabulary] in which every row keeps a finite score",
    )


def name_of(text_processor: object) -> str:
    """What a reader knows a rule by."""
    return str(
        getattr(text_processor, "name", None)
        or getattr(text_processor, "__name__", None)
        or type(text_processor).__name__
    )
