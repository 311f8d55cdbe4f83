"""The distribution that the draft follows, given that of the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from smc_compile.options import Options
from smc_compile.runtime.algorithms.next_token import SETTINGS, Mixture, NextTokenDistribution, Warper

WIDE_SHARE = 0.1  # of the draft's distribution without truncation, where the target truncates


def draft_distribution_for(
    warpers: Sequence[Warper], greedy: bool, options: Options
) -> NextTokenDistribution | Mixture:
    """What the draft follows where the target's scores pass through ``warpers``.

    SMC must be able to propose every token, so a part of the proposal does not truncate.
    """
    if greedy:
        return NextTokenDistribution("greedy", warpers=tuple(warpers))
    return proposal(warpers, options.draft_temperature)


def rejected(distribution: NextTokenDistribution | Mixture) -> NextTokenDistribution | Mixture:
    """What the draft follows where tokens are rejected: most are accepted where it truncates as the target does, and
    it need not propose every token."""
    return replace(distribution, share=0.0) if isinstance(distribution, Mixture) else distribution


def proposal(warpers: Sequence[Warper], draft_temperature: float | None) -> NextTokenDistribution | Mixture:
    """The draft under its temperature. Where the target has other warpers too: the draft under all of them, mixed with
    the draft under its temperature alone."""
    temperature = SETTINGS["temperature"][0]
    own = temperature if draft_temperature is None else divided_by(draft_temperature)
    wide = NextTokenDistribution("logits", warpers=(own,))
    if all(warper is temperature for warper in warpers):
        return wide
    narrow = tuple(own if warper is temperature else warper for warper in warpers)
    return Mixture(NextTokenDistribution("logits", warpers=narrow), wide, WIDE_SHARE)


def divided_by(temperature: float) -> Warper:
    """A warper that divides scores by a fixed number."""

    def divided(scores: Tensor, _: Any) -> Tensor:
        return scores / temperature

    return divided
