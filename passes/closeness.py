"""How near the numbers of two tensors are, and how near they must be in each dtype."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Largest difference allowed, relative to the spread of the logits: a few hundred roundings of each format.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.12, torch.float16: 0.02}
NARROW = (torch.bfloat16, torch.float16)  # rounding there decides which token a truncating sampler cuts off last


def coarsest_dtype(values: Iterable[Any]) -> torch.dtype:
    """The coarsest floating dtype among the tensors of ``values``; float64 if there is none."""
    present = {value.dtype for value in values if isinstance(value, Tensor)}
    return next((dtype for dtype in (*NARROW, torch.float32) if dtype in present), torch.float64)


def allowed_error(dtype: torch.dtype) -> float:
    """The largest relative error that rounding explains."""
    return TOLERANCE.get(dtype, 1e-4)


def relative_error(actual: Tensor, expected: Tensor, cut_may_move: bool = False) -> float:
    """Largest difference over the spread of the finite expected values; infinities must agree in place.

    With ``cut_may_move`` a token that one side has at -inf and the other keeps counts as far off as it lies above the
    least token that both keep in its row: nothing at the edge of a top-k or top-p, much for a token that is masked.
    """
    actual, expected = actual.double(), expected.double()
    both, either = expected.isfinite() & actual.isfinite(), expected.isfinite() | actual.isfinite()
    moved = both != either
    infinite = torch.where(expected.isfinite(), actual, expected)[moved]  # the side that is not finite
    if moved.any() and not (cut_may_move and bool((infinite == -torch.inf).all())):
        return float("inf")
    if not both.any():
        return 0.0 if not moved.any() else float("inf")
    spread = expected[both].std().clamp(min=1e-3) if both.sum() > 1 else torch.tensor(1.0)
    kept = torch.where(expected.isfinite(), expected, actual)
    least = torch.where(both, expected, torch.inf).amin(-1, keepdim=True)
    above = torch.where(moved, kept - least, 0.0).clamp(min=0.0)
    difference = torch.where(both, actual - expected, 0.0).abs()
    return (torch.maximum(difference, above).max() / spread).item()
