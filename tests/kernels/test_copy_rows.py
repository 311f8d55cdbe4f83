"""Rows of caches over other rows, where there is no GPU: in tensor code, whatever the shapes."""

from __future__ import annotations

import torch

from smc_compile.kernels.copy_rows import RowCopy


def test_each_row_gets_what_its_source_holds() -> None:
    caches = [torch.randn(4, 2, 5, 3), torch.randn(4, 2, 5, 3), torch.randn(4, 1, 5, 6, dtype=torch.float64)]
    before = [cache.clone() for cache in caches]
    source = torch.tensor([0, 0, 2, 2])
    RowCopy(caches)(source, torch.zeros(4, dtype=torch.int64), torch.tensor(3))
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache[:, :, :3], old[source][:, :, :3])
