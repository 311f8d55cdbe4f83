"""Logits processors as libraries write them, in the two forms that run here: text processors and warpers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from smc_compile.runtime.algorithms.next_token import Warper
from smc_compile.runtime.execution.text_processors import name_of
from smc_compile.runtime.state.request import Rows, TextProcessor


class WrappedProcessor:
    """A processor ``(input_ids [R, L], scores [R, V]) -> scores`` as a text processor."""

    def __init__(self, processor: Any) -> None:
        self.processor, self.name = processor, name_of(processor)

    def __call__(self, text: Tensor, scores: Tensor, rows: Rows) -> Tensor:
        result: Tensor = self.processor(text, scores)
        return result


class UnseenPadding(WrappedProcessor):
    """A processor that is given, once for a batch, the number of padding tokens that it must overlook.

    Here rows leave a batch while it runs. So padding is shown as a token past the vocabulary, which it drops.
    """

    def __init__(self, processor: Any) -> None:
        super().__init__(copy.copy(processor))
        self.processor.prompt_ignore_length = None

    def __call__(self, text: Tensor, scores: Tensor, rows: Rows) -> Tensor:
        padding = torch.arange(text.shape[1], device=text.device) < rows.padding[:, None]
        return super().__call__(text.masked_fill(padding, scores.shape[-1]), scores, rows)


class AllowedTokens:
    """``allowed(request, text [L]) -> token ids`` as a text processor: in each row all other tokens are removed."""

    def __init__(self, allowed: Any, name: str) -> None:
        self.allowed, self.name = allowed, name

    def __call__(self, text: Tensor, scores: Tensor, rows: Rows) -> Tensor:
        masked = torch.full_like(scores, -torch.inf)
        for row, (request, mine) in enumerate(zip(rows.request.tolist(), text, strict=True)):
            tokens = torch.as_tensor(self.allowed(request, mine), dtype=torch.int64, device=scores.device)
            masked[row, tokens] = scores[row, tokens]
        return masked


def score_warper(processor: Any) -> Warper:
    """A processor that reads the scores alone, as a warper of the distribution."""

    def apply(scores: Tensor, settings: Mapping[str, Tensor]) -> Tensor:
        result: Tensor = processor(torch.zeros(scores.shape[0], 1, dtype=torch.int64, device=scores.device), scores)
        return result

    apply.__name__ = name_of(processor)
    return apply


def as_text_processor(processor: Any) -> TextProcessor:
    """A processor that may read the text, in the form that fits what it needs to know of its rows."""
    allowed = getattr(processor, "_prefix_allowed_tokens_fn", None)
    if callable(allowed):
        return AllowedTokens(allowed, name_of(processor))
    if isinstance(getattr(processor, "prompt_ignore_length", None), Tensor):
        return UnseenPadding(processor)
    return WrappedProcessor(processor)
