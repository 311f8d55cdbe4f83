"""What exact speculation carries along beside its texts: its uniforms, and how much was accepted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from smc_compile.runtime.algorithms.uniforms import RejectionStreams
from smc_compile.runtime.state.request import Request


@dataclass
class Rejections:
    """Of one call: how many cycles it has run, how many drafted tokens became text, in how many (request, cycle) pairs
    anything was wanted."""

    uniforms: RejectionStreams
    cycles: int = 0
    accepted: int = 0
    live: int = 0

    @classmethod
    def start(cls, request: Request, chains: int, lookahead: int) -> Self:
        most = max(int(request.new_tokens.max()) - 1, 1)  # a cycle commits a token at least
        return cls(RejectionStreams(request.seeds, chains, lookahead, most))

    def take(self, keep: Tensor) -> Self:
        """The same of these requests."""
        return replace(self, uniforms=self.uniforms.take(keep))
