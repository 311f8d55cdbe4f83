"""The distribution that the draft follows, given that of the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from smc_compile.runtime.algorithms.next_token import SETTINGS, Mixture, NextTokenDistribution, Warper

WIDE_SHARE = 0.1  # of the draft's distribution without truncation, where the target truncates


def draft_distribution_for(warpers: Sequence[Warper], greedy: bool) -> NextTokenDistribution | Mixture:
    """What the draft follows where the target's scores pass through ``warpers``.

    SMC must be able to propose every token, so a part of the proposal does not truncate.
    """
    if greedy:
        return NextTokenDistribution("greedy", warpers=tuple(warpers))
    return proposal(warpers)


def rejected(distribution: NextTokenDistribution | Mixture) -> NextTokenDistribution | Mixture:
    """What the draft follows where tokens are rejected: most are accepted where it truncates as the target does, and
    it need not propose every token."""
    return replace(distribution, share=0.0) if isinstance(distribution, Mixture) else distribution


def proposal(warpers: Sequence[Warper]) -> NextTokenDistribution | Mixture:
    """The draft under the target's temperature. Where the target has other warpers too: the draft under all of them,
    mixed with the draft under the temperature alone."""
    temperature = SETTINGS["temperature"][0]
    wide = NextTokenDistribution("logits", warpers=(temperature,))
    if all(warper is temperature for warper in warpers):
        return wide
    return Mixture(NextTokenDistribution("logits", warpers=tuple(warpers)), wide, WIDE_SHARE)
