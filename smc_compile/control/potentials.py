"""What a user conditions texts on. The names are those of genlm-control, where it has them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

from smc_compile.control.byte_automata import ByteAutomaton, from_regex, from_texts, product
from smc_compile.errors import OptionError


class Potential(ABC):
    """A weight on texts. ``a * b`` weighs by both.

    A text is the new one, without the prompt: a string, or its bytes in UTF-8. Weights are logarithms.
    """

    @property
    @abstractmethod
    def language(self) -> ByteAutomaton:
        """The texts of weight 1; all others have weight 0."""

    @property
    @abstractmethod
    def name(self) -> str:
        """For reports and errors."""

    def prefix(self, text: str | bytes) -> float:
        """0 where a whole text can begin so, else -inf."""
        language = self.language
        return 0.0 if language.after(_bytes(text)) != language.sink else -math.inf

    def complete(self, text: str | bytes) -> float:
        """0 where the text is whole, else -inf."""
        language = self.language
        return 0.0 if language.accepting[language.after(_bytes(text))] else -math.inf

    def __mul__(self, other: Potential) -> Potential:
        return _Both(self, other) if isinstance(other, Potential) else NotImplemented


def _bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


class Regex(Potential):
    """Texts that a regular expression matches from beginning to end.

    The syntax is that of Python's module re under its flag ASCII, without anchors and references to groups.

    Raises:
        OptionError: the pattern cannot be compiled, or no text matches it.
    """

    def __init__(self, pattern: str) -> None:
        if not isinstance(pattern, str):
            raise OptionError("a pattern must be a string", f"got {type(pattern).__name__}")
        self.pattern = pattern
        self._language = from_regex(pattern)
        _require_texts(self)

    @property
    def language(self) -> ByteAutomaton:
        return self._language

    @property
    def name(self) -> str:
        return f"Regex({self.pattern!r})"


class Choices(Potential):
    """One of some texts.

    Raises:
        OptionError: there are none, or they are no strings.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        wrong = isinstance(texts, str) or not all(isinstance(text, str) for text in texts)
        if wrong or not len(texts):
            raise OptionError("choices must be strings", f"got {texts!r}", 'pass a list: Choices(["yes", "no"])')
        self.texts = tuple(texts)

    @cached_property
    def language(self) -> ByteAutomaton:  # type: ignore[override]
        return from_texts(text.encode() for text in self.texts)

    @property
    def name(self) -> str:
        return f"Choices of {len(self.texts)}"


class _Both(Potential):
    """The texts of two languages."""

    def __init__(self, a: Potential, b: Potential) -> None:
        self._of = a, b
        self._language = product(a.language, b.language)
        _require_texts(self)

    @property
    def language(self) -> ByteAutomaton:
        return self._language

    @property
    def name(self) -> str:
        return " * ".join(potential.name for potential in self._of)


def _require_texts(potential: Potential) -> None:
    language = potential.language
    if not language.accepting.any():
        raise OptionError(
            "no text fits the potential",
            f"{potential.name} has weight 0 everywhere",
            "two potentials that exclude each other have no product" if isinstance(potential, _Both) else "",
        )
