"""How tensors lie in memory and which of their sizes may vary, as compiled code is guarded by both."""

from __future__ import annotations

import torch


def packed(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the strides of its shape: compiled code is guarded by strides, even those of axes of size one."""
    return tensor.clone(memory_format=torch.contiguous_format)


def mark_dynamic(tensor: torch.Tensor, *dims: int) -> torch.Tensor:
    """Let these dimensions vary without recompilation."""
    for dim in dims:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return tensor
