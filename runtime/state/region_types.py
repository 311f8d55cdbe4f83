"""Types of what compiled regions take and give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

State = list[Tensor]  # what a model keeps of each row, and particles copy: caches [R, H, S, d], or any other [R, ...]


class Places(NamedTuple):
    """Where a block of T new tokens stands."""

    positions: Tensor  # [B, T], in the sequence of each request
    slots: Tensor  # [B, T], in the suffix
    keys: Tensor  # [B, P+S], positions of the cached keys


class EosIds(NamedTuple):
    """The tokens that end the sequences of R rows, and the padding after them."""

    tokens: Tensor  # [R, E]; -1 fills up, and is no token
    pad: Tensor  # [R], the token that follows an end


Settings = Mapping[str, Tensor]  # sampler settings by name, [R] each

# (tokens [R, T], places, state, context shared by the particles) -> (logits, state)
Forward = Callable[[Tensor, Places, State, Any], tuple[Tensor, State]]


def is_eos(tokens: Tensor, eos_ids: EosIds) -> Tensor:
    """Which tokens [R, T] end a sequence: [R, T] bool."""
    return (tokens[..., None] == eos_ids.tokens[:, None, :]).any(-1)


def unify(caches: Sequence[Tensor], dim: int) -> None:
    """Let the compiler know that all caches have one size along ``dim``: one symbol then stands for all layers."""
    for cache in caches[1:]:
        torch._check(cache.shape[dim] == caches[0].shape[dim])
