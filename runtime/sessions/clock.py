"""Where the wall-clock of one call went."""

from __future__ import annotations

import time
from collections.abc import Sequence

from smc_compile.result import Stats
from smc_compile.runtime.execution.region import Region


class Clock:
    """Starts with a call. Regions serve many calls, so what they had spent before it is subtracted.

    Attributes:
        resample_seconds: what the host spent on copying texts and caches of particles.
    """

    def __init__(self, regions: Sequence[Region]) -> None:
        self._regions = regions
        self._start = time.perf_counter()
        self._before = [region.seconds for region in regions]
        self._compiled = sum(region.compile_seconds for region in regions)
        self._prefill = 0.0
        self.resample_seconds = 0.0

    def prefilled(self) -> None:
        """Note that the prompts have been read."""
        self._prefill = time.perf_counter() - self._start

    def spent(self, *names: str) -> float:
        """Seconds in the regions of these names."""
        return sum(r.seconds - s for r, s in zip(self._regions, self._before, strict=True) if r.name in names)

    def fill(self, stats: Stats) -> Stats:
        """Write the seconds of the whole call, of compilation and of the prompts into ``stats``, and return it."""
        stats.compile_seconds = sum(region.compile_seconds for region in self._regions) - self._compiled
        stats.seconds = time.perf_counter() - self._start - stats.compile_seconds
        stats.prefill_seconds = self._prefill
        return stats
