"""Every error a user can meet. Each says what happened, why, and how to fix it."""

from __future__ import annotations

from typing import Any


class SMCError(Exception):
    """Base of all errors raised by smc_compile.

    Args:
        what: one sentence, what went wrong.
        why: the cause, naming the op, the argument or the value.
        fix: what the reader can do about it.
    """

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        parts = [what] + [f"  {label}: {text}" for label, text in (("why", why), ("fix", fix)) if text]
        super().__init__("\n".join(parts))


class OptionError(SMCError, ValueError):
    """An option is unknown, ill-typed or out of range."""


class InputError(SMCError, ValueError):
    """A prompt, a length, a model or a draft does not fit the request."""


class LoopError(SMCError):
    """A decode loop was recognised but cannot be compiled."""


class CacheError(SMCError):
    """No cache can be synthesized for the model; the message names the op.

    Attributes:
        node: the op, where there is one.
    """

    node: Any = None


class ValidationError(SMCError):
    """The cached form does not reproduce the original model."""


class GenerationError(SMCError):
    """Generation stopped in the middle; ``partial`` holds what was generated so far.

    Attributes:
        partial: the result up to the last whole cycle, or None if no token was drawn.
    """

    def __init__(self, what: str, why: str = "", fix: str = "", partial: Any = None) -> None:
        super().__init__(what, why, fix)
        self.partial = partial
