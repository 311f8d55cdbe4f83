"""What the texts of a call are conditioned on, and who says what they weigh.

Three forms, which may come together: an automaton, whose tables the compiled regions read; a guide, which tells on the
host what each next token weighs; a critic, which weighs texts on the host after they have been written. And a power of
the model's own law.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from smc_compile.runtime.algorithms.automata import Automaton


class Guide(Protocol):
    """Tells what each next token weighs. States are numbers that it gives out, one for each text it has met."""

    def weights(self, states: Tensor, left: Tensor) -> Tensor:
        """Of the next tokens, as ``Steering`` has them, with so many tokens left behind these: [...], [...] -> [..., V]
        or [..., W]."""
        ...

    def after(self, states: Tensor, tokens: Tensor, live: Tensor) -> Tensor:
        """The states that tokens lead to, and the same states where not ``live``: [R], [R], [R] bool -> [R]."""
        ...

    def ends(self, states: Tensor) -> Tensor:
        """Log weights [R] float64 of texts that end here without an end token."""
        ...

    def keep(self, states: Tensor) -> None:
        """Forget all states but these [...]."""
        ...


class WrittenText(NamedTuple):
    """A text for a critic."""

    request: int  # in the caller's batch
    tokens: list[int]  # the new ones, without an end token
    whole: bool  # it goes no further: an end token follows, or it must be whole at the limit


class Appraiser(Protocol):
    def __call__(self, texts: Sequence[WrittenText]) -> Sequence[float]:
        """Log weights of texts. The last one that is asked for a text counts, so it may change as the text grows.

        Raises:
            GenerationError: a weight is NaN or infinite, or there is not one for each text.
        """
        ...


@dataclass(frozen=True)
class Conditioning:
    """What the texts of B requests are conditioned on.

    Attributes:
        names: of what weighs the texts, one for each request of the caller's batch.
        tables: a line about each, for a report.
        start: [B], the state that each begins in.
        slack: added to the budget of tokens that an automaton counts: 0, or FAR where a text may be cut off.
        automaton, guide, critic: see above; one for all requests.
        power: [B], the exponent of the target's law; None where all are 1.
    """

    names: tuple[str, ...]
    tables: tuple[str, ...]
    start: Tensor
    slack: int = 0
    automaton: Automaton | None = None
    guide: Guide | None = None
    critic: Appraiser | None = None
    power: Tensor | None = None

    @property
    def from_host(self) -> bool:
        """Whether the host takes part in each cycle."""
        return self.guide is not None or self.critic is not None

    def take(self, index: Tensor) -> Conditioning:
        """The same of requests ``index``."""
        return replace(self, start=self.start[index], power=None if self.power is None else self.power[index])


def no_states(batch: int, device: torch.device) -> Tensor:
    """``start`` where neither automaton nor guide is there: [B]."""
    return torch.zeros(batch, dtype=torch.int64, device=device)
