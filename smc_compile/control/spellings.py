"""A potential on how texts are spelled in tokens."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from smc_compile.control.canonical import Followers
from smc_compile.control.potentials import Hard
from smc_compile.errors import OptionError

_followers: WeakKeyDictionary[Any, Followers] = WeakKeyDictionary()


class Canonical(Hard):
    """Texts in tokens that the tokenizer itself would make of them, as far as pairs of tokens tell.

    A model has mass on other spellings, too, that are mistakes of it. See ``smc_compile.control.canonical``.
    """

    @property
    def name(self) -> str:
        return "Canonical()"

    def prefix(self, text: bytes) -> float:
        raise OptionError("Canonical has no weight of a text", "it weighs tokens", "")

    complete = prefix


def followers_of(tokenizer: Any) -> Followers:
    """Made once for a tokenizer."""
    key = getattr(tokenizer, "backend_tokenizer", tokenizer)
    try:
        if key not in _followers:
            _followers[key] = Followers(tokenizer)
        return _followers[key]
    except TypeError:  # a list cannot be a key, and is refused there
        return Followers(tokenizer)
