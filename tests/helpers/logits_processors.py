"""Logits processors that read the text, and a model behind them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def penalty(input_ids: Tensor, scores: Tensor) -> Tensor:
    """Tensor code: what was said in the last two tokens is less likely."""
    said = torch.zeros_like(scores).scatter(1, input_ids[:, -2:], 1.0)
    return scores - 0.8 * said


class NoThird:
    """Python on each row, and a count of its calls: never the same token three times in a row."""

    calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        scores = scores.clone()
        for row, text in enumerate(input_ids.tolist()):
            if text[-1] == text[-2]:
                scores[row, text[-1]] = -math.inf
        return scores


no_third = NoThird()


class Applied:
    """A model whose last logits went through processors, as the plain loop would see them."""

    def __init__(self, model: Callable[[Tensor], Tensor], *processors: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.model, self.processors = model, processors

    def __call__(self, ids: Tensor) -> Tensor:
        logits = self.model(ids)
        last = logits[:, -1]
        for processor in self.processors:
            last = processor(ids, last)
        return torch.cat([logits[:, :-1], last[:, None]], 1)
