"""Strides and marked dimensions of tensors: Dynamo's guards read both, so they decide whether code compiles again."""

from __future__ import annotations

import torch


def packed(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with contiguous strides, also of axes of size one: Dynamo guards those too."""
    return tensor.clone(memory_format=torch.contiguous_format)


def mark_dynamic(tensor: torch.Tensor, *dims: int) -> torch.Tensor:
    """Mark dimensions whose sizes may change without another compilation. Returns ``tensor`` itself."""
    for dim in dims:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return tensor
