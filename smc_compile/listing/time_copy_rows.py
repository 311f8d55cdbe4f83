"""What it takes to copy rows of caches after resampling: the kernel beside its twin, eager and by Inductor."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from smc_compile.kernels.copy_rows import RowCopy, gather_rows
from smc_compile.llama import LlamaConfig

from .sessions import Pair
from .timing import Timed, prepared, time_ways
from .verdict import Verdict

SLOTS = 512  # of a suffix
WRITTEN = SLOTS - 128


def time_copy_rows(pair: Pair, device: torch.device) -> Timed:
    """Half of the particles die, each of which shares all but a quarter of its text with its ancestor."""
    n = pair.n_particles
    rows = torch.arange(n, device=device)
    source = rows - rows % 2
    since = torch.full_like(rows, WRITTEN - WRITTEN // 4)
    used = torch.tensor(WRITTEN, device=device)
    caches, twins = ([*suffixes(pair.target, n, pair, device), *suffixes(pair.draft, n, pair, device)] for _ in "ab")
    for cache, twin in zip(caches, twins, strict=True):
        cache[:, :, : WRITTEN - WRITTEN // 4] = cache[:1, :, : WRITTEN - WRITTEN // 4].clone()  # what all share
        twin.copy_(cache)
    ours = RowCopy(caches)
    ours(source, since, used)
    gather_rows(twins, source)
    wrong = max(float((a != b)[:, :, :WRITTEN].double().mean()) for a, b in zip(caches, twins, strict=True))
    verdict = Verdict(runs=1, beyond=wrong)
    timed = Timed("copy_rows, written by hand", 1, verdict, not wrong)
    by_inductor = torch.compile(gather_rows, dynamic=False)
    ways = (
        partial(gather_rows, twins, source),
        partial(by_inductor, twins, source),
        partial(ours, source, since, used),
    )
    time_ways(timed, [prepared(way, [], device) for way in ways], device)
    return timed


def suffixes(config: LlamaConfig, n: int, pair: Pair, device: torch.device) -> list[Tensor]:
    """Keys and values [N, H, S, d] of all layers."""
    shape = n, config.n_kv_heads, SLOTS, config.dim // config.n_heads
    return [torch.randn(shape, dtype=pair.dtype, device=device) for _ in range(2 * config.n_layers)]
