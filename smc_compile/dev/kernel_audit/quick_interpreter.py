"""Triton's interpreter made quick enough, in a process that does nothing else.

Four things of it are replaced; what a kernel computes is still what the kernel says. Reductions and scans with a
function of the kernel's own go through the block in halves, as on a GPU, and not number by number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def install() -> None:
    """Replace them."""
    from triton.runtime import interpreter

    interpreter._patch_lang_tensor = _index_of_one_element(interpreter._patch_lang_tensor)
    interpreter._patch_lang = _once_for_each_module(interpreter._patch_lang)
    interpreter.ReduceOps.generic_reduce = _reduce
    interpreter.ScanOps.generic_scan = _scan


def _index_of_one_element(replace: Callable[..., Any]) -> Callable[..., Any]:
    """A block of one element serves as an index. Triton 3.6 leaves that to numpy, which refuses it since 2.5."""

    def replaced(tensor: Any, *args: Any) -> None:
        replace(tensor, *args)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    return replaced


def _once_for_each_module(replace: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Triton replaces its language by the interpreter's at every call of a function, which takes longer than the call.
    Here what was replaced stays so."""
    known: dict[int, Any] = {}

    def replace_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module not in known:
            known[module] = replace(function)
            known[module].restore = lambda: None
        return known[module]

    return replace_once


def _combined(ops: Any, kinds: Sequence[Any], left: list[Any], right: list[Any]) -> list[Any]:
    """The kernel's own function on two lists of blocks."""
    arguments = [ops.to_tensor(data, kind) for data, kind in zip([*left, *right], [*kinds, *kinds], strict=True)]
    result = ops.combine_fn.fn(*arguments)
    results = result if isinstance(result, tuple) else (result,)
    return [r.handle.data.reshape(a.shape).astype(a.dtype) for r, a in zip(results, left, strict=True)]


def _reduce(ops: Any, blocks: Sequence[Any]) -> list[Any]:
    """Blocks have powers of two."""
    kinds = [block.dtype for block in blocks]
    whole = ops.axis is None
    parts = [block.handle.data.reshape(-1) if whole else block.handle.data for block in blocks]
    axis = 0 if whole else ops.axis % parts[0].ndim
    while parts[0].shape[axis] > 1:
        left, right = zip(*(np.split(part, 2, axis) for part in parts), strict=True)
        parts = _combined(ops, kinds, list(left), list(right))
    if ops.keep_dims:
        parts = [part.reshape([1] * len(blocks[0].handle.data.shape)) if whole else part for part in parts]
    else:
        parts = [part.reshape(-1)[0] if whole else part.squeeze(axis) for part in parts]
    return [ops.to_tensor(part if part.ndim else part.item(), kind) for part, kind in zip(parts, kinds, strict=True)]


def _scan(ops: Any, blocks: Sequence[Any]) -> list[Any]:
    """Each entry combined with the one ``distance`` before it, for distances 1, 2, 4, ... (Hillis and Steele, 1986)."""
    kinds = [block.dtype for block in blocks]
    parts = [block.handle.data for block in blocks]
    axis, distance = ops.axis % parts[0].ndim, 1
    place = np.arange(parts[0].shape[axis]).reshape([-1 if i == axis else 1 for i in range(parts[0].ndim)])
    while distance < parts[0].shape[axis]:
        combined = _combined(ops, kinds, [np.roll(part, distance, axis) for part in parts], parts)
        parts = [np.where(place >= distance, new, old) for new, old in zip(combined, parts, strict=True)]
        distance *= 2
    return [ops.to_tensor(part, kind) for part, kind in zip(parts, kinds, strict=True)]
