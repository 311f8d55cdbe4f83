"""Refusals after which a loop is looked at in another way: its own code runs on the tokens, or its prompt is longer."""

from __future__ import annotations

from smc_compile.errors import LoopError


class NeedsValue(LoopError):
    """The loop asks for a value that only a run for real has."""


class EndInLoop(NeedsValue):
    """The loop computes with the tokens as one does to end texts."""


class ShortPrompt(LoopError):
    """The prompt is so short that its iteration is a case of its own: the loop may be traced with a longer one."""
