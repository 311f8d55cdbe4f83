"""Rows of caches over other rows, in place, as a device decides: which ones stands in a tensor, not with the host.

On a GPU a Triton kernel goes over all caches of one shape in one launch (copy_rows_kernel.py), and touches only rows
that change, and slots in which they do. Elsewhere, as its twin, tensor code gathers all rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 1024  # words that one program copies


def gather_rows(caches: Sequence[Tensor], source: Tensor) -> None:
    """The twin: whole rows. caches: [R, H, S, d] each; source: [R]."""
    for cache in caches:
        cache.copy_(cache.index_select(0, source))


class RowCopy:
    """Gives row r of every cache [R, H, S, d] what row ``source[r]`` holds in slots ``since[r]`` to ``used``.

    What they hold before is the same already, and nothing is meant from ``used`` on.

    Rows that others take from keep their own: ``source[source[r]] == source[r]``.
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
    """By the kernel, for contiguous caches shaped as ``like`` [R, H, S, d] that stand at ``addresses`` [C] int64."""
    from smc_compile.kernels.copy_rows_kernel import WORDS, copy_rows_kernel

    rows, heads, slots, width = like.shape
    size = next(size for size in WORDS if width * like.itemsize % size == 0)
    words = width * like.itemsize // size
    grid = (rows * heads, len(addresses), -(-slots * words // BLOCK))
    copy_rows_kernel[grid](addresses, source, since, used, heads, slots * words, words, WORDS[size], BLOCK)
