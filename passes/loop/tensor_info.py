"""What is known of the tensor behind a node, written to ``node.meta["tensor"]`` by `concretise`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

TOKEN_DTYPES = (torch.int64, torch.int32)


@dataclass(frozen=True)
class TensorInfo:
    """A node's tensor: its concrete shape, its dtype, and a number that it shares with all tensors of its storage."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: int

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


def tensor_info(node: fx.Node) -> TensorInfo | None:
    """What is known of a node's tensor; None for nodes that are no tensors."""
    return node.meta.get("tensor")


def plain_tensor(value: Any) -> torch.Tensor | None:
    """A tensor that holds real data (neither fake nor meta), else None."""
    is_plain = isinstance(value, torch.Tensor) and type(value) in (torch.Tensor, torch.nn.Parameter)
    return value if is_plain and value.device.type != "meta" else None
