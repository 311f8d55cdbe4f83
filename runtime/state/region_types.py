"""What compiled regions take and give: places of tokens, ends of sequences, settings, states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

State = list[Tensor]


class Places(NamedTuple):
    """Where a block of T new tokens goes."""

    positions: Tensor  # [B, T] in the sequence of each request
    slots: Tensor  # [T] in the suffix
    keys: Tensor  # [B, P+S] positions of what is cached


class EosIds(NamedTuple):
    """How the sequences of R rows end."""

    tokens: Tensor  # [R, E]: any of these; -1 never occurs
    pad: Tensor  # [R]: what follows


Settings = Mapping[str, Tensor]  # [R] each


Forward = Callable[[Tensor, Places, State, Any], tuple[Tensor, State]]


def is_eos(tokens: Tensor, eos_ids: EosIds) -> Tensor:
    """[R, T] -> [R, T]"""
    return (tokens[..., None] == eos_ids.tokens[:, None, :]).any(-1)


def unify(caches: Sequence[Tensor], dim: int) -> None:
    """Tell the compiler that all caches share one length, so that it carries one symbol and not one a layer."""
    for cache in caches[1:]:
        torch._check(cache.shape[dim] == caches[0].shape[dim])
