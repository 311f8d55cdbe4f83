"""Copying rows of caches over other rows, in place, where a tensor on the device says which ones.

On a GPU one launch of a Triton kernel (copy_rows_kernel.py) serves all caches of one shape. It touches only the rows
that change, and in them only the slots that do. Elsewhere its twin gathers whole rows in tensor code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 1024  # words that one program copies


def gather_rows(caches: Sequence[Tensor], source: Tensor) -> None:
    """The twin: copies whole rows in place. caches: [R, H, S, d] each; source: [R]."""
    for cache in caches:
        cache.copy_(cache.index_select(0, source))


class RowCopy:
    """Copies row ``source[r]`` of every cache [R, H, S, d] to row r, in slots ``since[r]`` to ``used``.

    Slots before ``since[r]`` must be the same already; slots from ``used`` on are empty. A row that is copied keeps its
    own: ``source[source[r]] == source[r]``.
    """

    def __init__(self, caches: Sequence[Tensor]) -> None:
        groups: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        for cache in caches:
            groups.setdefault((cache.shape, cache.dtype), []).append(cache)
        self._groups = list(groups.values())
        self._addresses = [
            torch.tensor([cache.data_ptr() for cache in group], device=group[0].device)
            for group in self._groups
            if group[0].is_cuda
        ]

    def __call__(self, source: Tensor, since: Tensor, used: Tensor) -> None:
        """source, since: [R] int64; used: [] int64; all on the device of the caches."""
        if not self._addresses:
            for group in self._groups:
                gather_rows(group, source)
            return
        for group, addresses in zip(self._groups, self._addresses, strict=True):
            with torch.cuda.device_of(group[0]):  # Triton launches on the current device
                copy_group(group[0], addresses, source, since, used)


def copy_group(like: Tensor, addresses: Tensor, source: Tensor, since: Tensor, used: Tensor) -> None:
    """The kernel, for C contiguous caches shaped as ``like`` [R, H, S, d], whose addresses are given [C] int64."""
    from smc_compile.kernels.copy_rows_kernel import WORDS, copy_rows_kernel

    rows, heads, slots, width = like.shape
    size = next(size for size in WORDS if width * like.itemsize % size == 0)
    words = width * like.itemsize // size
    grid = (rows * heads, len(addresses), -(-slots * words // BLOCK))
    copy_rows_kernel[grid](addresses, source, since, used, heads, slots * words, words, WORDS[size], BLOCK)
