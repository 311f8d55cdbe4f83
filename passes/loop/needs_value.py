"""Refusals of loops that need the value of a token. Their own code may run on the tokens instead of being compiled."""

from __future__ import annotations

from smc_compile.errors import LoopError


class NeedsValue(LoopError):
    """The loop asks for a value that only a run for real has."""


class EndInLoop(NeedsValue):
    """The loop computes with the tokens as one does to end texts."""
