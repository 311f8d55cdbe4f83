"""What a generation returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Stats:
    """Where the time of one generation went; seconds are wall-clock, without compilation unless named."""

    method: str
    new_tokens: int  # per request
    cycles: int = 0
    resamplings: int = 0  # (request, cycle) pairs whose population was resampled
    retries: int = 0  # (request, cycle) pairs drawn again because every particle had weight zero
    seconds: float = 0.0
    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    score_seconds: float = 0.0
    resample_seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)

    @property
    def host_seconds(self) -> float:
        """What is left of ``seconds`` outside the compiled regions."""
        spent = self.prefill_seconds + self.draft_seconds + self.score_seconds + self.resample_seconds
        return max(0.0, self.seconds - spent)


@dataclass(frozen=True)
class Generation:
    """The answer of one generation. B requests, N particles, P prompt tokens, n new tokens, C cycles.

    Attributes:
        sequences: [B, P+n] int64, one particle per request drawn in proportion to its weight.
        particles: [B, N, P+n] int64.
        log_weights: [B, N], unnormalised, since the last resampling.
        log_evidence: [B], log of an unbiased estimate of the evidence (1 for a normalised target). A cycle drawn again
            (``stats.retries``) divides it by the number of tries, which overestimates.
        ess: [B, C], effective sample size at the end of each cycle, before resampling.
        ancestors: [B, C, N] int64, the particle each particle descends from at each cycle (identity: no resampling).
    """

    sequences: Tensor
    particles: Tensor
    log_weights: Tensor
    log_evidence: Tensor
    ess: Tensor
    ancestors: Tensor
    stats: Stats
