"""Text processors: logits processors that read the text so far, applied to target and draft outside their regions."""

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
    """What a session knows of text processors, ``(text [R, L], scores [R, V], rows) -> scores [R, V]``.

    Those in ``traced`` are tensor code and compile into one region for texts of every length. Others may keep a state:
    with ``on_host`` each request brings its own, and they run as they are, once a position.
    """

    def __init__(self, traced: Sequence[TextProcessor] = (), on_host: bool = False, compiler: str = "inductor") -> None:
        self._traced, self._on_host = tuple(traced), on_host
        self.region = Region("rules", _in_order(self._traced), compiler) if traced else None

    def __bool__(self) -> bool:
        """Whether there are any."""
        return self.region is not None or self._on_host

    @property
    def regions(self) -> list[Region]:
        """The one that traced processors compile into, if there are any."""
        return [] if self.region is None else [self.region]

    def of(self, request: Request) -> RequestProcessors:
        """Those that a call applies."""
        return RequestProcessors(self._traced if self.region else request.text_processors, self.region)


class RequestProcessors:
    """The text processors of one call, in order: they come before a distribution's warpers.

    Attributes:
        seconds: time spent in ``apply``.
    """

    def __init__(self, processors: Sequence[TextProcessor], region: Region | None) -> None:
        self._processors, self._region = tuple(processors), region
        self.seconds = 0.0

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._processors)

    def report(self) -> list[str]:
        """A line for each: its name, and where it runs."""
        where = "compiled" if self._region is not None else "on the host, once a position"
        return [f"{name_of(processor)}: {where}, on target and draft" for processor in self._processors]

    def apply(self, text: Tensor, scores: Tensor, rows: Rows, live: Tensor) -> Tensor:
        """Scores [R, T, V] after the T last prefixes of text [R, L].

        Prefixes that are not ``live`` [R, T] count for nothing: on the host no processor is called for them.

        Raises:
            GenerationError: without a partial result, when a processor raises, changes the shape, or leaves no token.
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
        """Scores [R, V] after texts [R, L]; as they are where not ``live`` [R]."""
        if self._region is not None:
            try:
                after = self._region(mark_dynamic(text, 1), scores.clone(), rows)
            except Exception as error:
                why = f"compiled, it raised {type(error).__name__}: {error}"
                raise processor_error(self._processors, why) from error
            check_scores(after[live], scores[live], self._processors)
            return torch.where(live[:, None], after, scores)
        if live.any():
            some = Rows(rows.request[live], rows.padding[live])
            scores[live] = self._on_host(text[live], scores[live], some)
        return scores

    def _on_host(self, text: Tensor, scores: Tensor, rows: Rows) -> Tensor:
        for text_processor in self._processors:
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
    """Refuse what processors returned for the scores ``before`` [R, V].

    Raises:
        GenerationError: when it is no tensor of that shape, or leaves no distribution where ``before`` had one.
    """
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
    """The name under which a report lists a processor."""
    return str(
        getattr(text_processor, "name", None)
        or getattr(text_processor, "__name__", None)
        or type(text_processor).__name__
    )
