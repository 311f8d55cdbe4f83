"""Refusals after which a loop is looked at in another way.

Its own code runs on the tokens, it is taken in parts, or its prompt is longer.
"""

from __future__ import annotations

from smc_compile.errors import LoopError


class NeedsValue(LoopError):
    """The loop asks for a value that only a run for real has."""


class EndInLoop(NeedsValue):
    """The loop computes with the tokens as one does to end texts."""


class UnlikeIterations(LoopError):
    """The iterations are not all alike: those that are may be compiled as parts."""


class ShortPrompt(LoopError):
    """The prompt is so short that its iteration is a case of its own: the loop may be traced with a longer one."""
