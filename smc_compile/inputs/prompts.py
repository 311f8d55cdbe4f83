"""Prompts as a user gives them, each for one request or for several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from smc_compile.errors import InputError, OptionError
from smc_compile.inputs.requests import check_prompt


@dataclass(frozen=True)
class Prompts:
    """B prompts, each of which M requests answer.

    Attributes:
        ids: [B*M, P] int64; rows b*M to (b+1)*M - 1 hold prompt b.
        mask: [B*M, P] in the same order, 0 at the padding; None without any.
        count: B.
        copies: M.
    """

    ids: Tensor
    mask: Any
    count: int
    copies: int

    @property
    def batch(self) -> int:
        """Requests, B*M."""
        return len(self.ids)

    def each(self, value: Any) -> Any:
        """One value for each prompt as one for each request; a value for all stays as it is."""
        values = value.tolist() if isinstance(value, Tensor) and value.dim() else value
        if self.copies == 1 or not isinstance(values, (list, tuple)) or len(values) != self.count:
            return value
        return [one for one in values for _ in range(self.copies)]


def prompts_of(ids: Any, mask: Any, copies: Any) -> Prompts:
    """Prompts ``ids`` [B, P] with their mask [B, P], for ``copies`` requests each.

    Raises:
        InputError: the ids are no prompts.
        OptionError: ``copies`` is no positive integer.
    """
    if not isinstance(ids, Tensor):
        raise InputError("prompts must be ids [B, P] int64", f"got {type(ids).__name__}", "pass token ids")
    check_prompt(ids)
    if isinstance(copies, bool) or not isinstance(copies, int) or copies < 1:
        raise OptionError("num_return_sequences must be a positive integer", f"got {copies!r}")
    repeated = mask.repeat_interleave(copies, 0) if isinstance(mask, Tensor) else mask
    return Prompts(ids.repeat_interleave(copies, 0), repeated, len(ids), copies)
