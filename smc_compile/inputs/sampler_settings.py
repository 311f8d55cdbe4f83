"""How a user wants the next token to be drawn from the target's scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from smc_compile.inputs.prompts import Prompts
from smc_compile.inputs.requests import is_greedy, settings_of


@dataclass(frozen=True)
class Sampling:
    """Temperature and truncation: each is one value for all requests, or one for each prompt.

    Attributes:
        temperature: divides the scores; 0 for all takes the most likely token.
        top_k, top_p, min_p: truncate the distribution in this order; 0, 1 and 0 change nothing.
    """

    temperature: Any = 1.0
    top_k: Any = 0
    top_p: Any = 1.0
    min_p: Any = 0.0

    def settings(self, prompts: Prompts) -> dict[str, Tensor]:
        """What the distribution reads, [B*M] each: the temperature, and what truncates; nothing in a greedy batch.

        Raises:
            OptionError: a value is out of its range, or some requests are greedy and others are not.
        """
        found = settings_of(prompts.batch, **{name: prompts.each(value) for name, value in vars(self).items()})
        return {} if is_greedy(found) else found
