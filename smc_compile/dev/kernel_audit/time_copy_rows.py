"""How long copying rows of caches after resampling takes: the kernel beside its twin, eager and by Inductor."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from smc_compile.dev.kernel_audit.recorded_sessions import AuditedPair
from smc_compile.dev.kernel_audit.time_regions import Timed, attempt, prepared, time_ways
from smc_compile.dev.kernel_audit.verdict import RegionVerdict
from smc_compile.kernels.copy_rows import RowCopy, gather_rows
from smc_compile.pairs.llama import LlamaConfig

SLOTS = 512  # of a suffix
WRITTEN = SLOTS - 128


def time_copy_rows(pair: AuditedPair, device: torch.device) -> Timed:
    """Time one copy in which half of the particles are replaced; each shares three quarters of its text already."""
    timed = Timed("copy_rows, written by hand", 1, RegionVerdict(), False)
    with attempt(timed, device):
        _time(timed, pair, device)
    return timed


def _time(timed: Timed, pair: AuditedPair, device: torch.device) -> None:
    n, shared = pair.n_particles, WRITTEN - WRITTEN // 4
    rows = torch.arange(n, device=device)
    source, since = rows - rows % 2, torch.full_like(rows, shared)
    used = torch.tensor(WRITTEN, device=device)
    caches, twins = ([*suffixes(pair.target, n, pair, device), *suffixes(pair.draft, n, pair, device)] for _ in "ab")
    for cache, twin in zip(caches, twins, strict=True):
        cache[:, :, :shared] = cache[:1, :, :shared].clone()
        twin.copy_(cache)
    ours = RowCopy(caches)
    ours(source, since, used)
    gather_rows(twins, source)
    wrong = max(float((a != b)[:, :, :WRITTEN].double().mean()) for a, b in zip(caches, twins, strict=True))
    timed.verdict, timed.agrees = RegionVerdict(runs=1, beyond=wrong), not wrong
    by_inductor, twin_of = torch.compile(gather_rows, dynamic=False), (twins, source)
    ways = (partial(gather_rows, *twin_of), partial(by_inductor, *twin_of), partial(ours, source, since, used))
    time_ways(timed, [prepared(way, [], device) for way in ways], device)


def suffixes(config: LlamaConfig, n: int, pair: AuditedPair, device: torch.device) -> list[Tensor]:
    """Keys and values [N, H, S, d] of all layers."""
    shape = n, config.n_kv_heads, SLOTS, config.dim // config.n_heads
    return [torch.randn(shape, dtype=pair.dtype, device=device) for _ in range(2 * config.n_layers)]
