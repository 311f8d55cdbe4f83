"""What a user conditions texts on. The names are those of genlm-control, where it has them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property, lru_cache, reduce
from typing import Any

from smc_compile.control.byte_automata import ByteAutomaton, from_regex, from_texts, product
from smc_compile.errors import OptionError


class Potential(ABC):
    """A weight on texts. ``a * b`` weighs by both, and ``a ** beta`` by a to the power of beta.

    A text is the new one, without the prompt, as bytes in UTF-8; a beginning may break off within a character. Weights
    are logarithms: -inf forbids. A class of one's own has ``prefix`` and ``complete``. Texts are then weighed once a
    cycle, after they have been written. With ``logw_next`` too, its weights also say which tokens are proposed.
    """

    @property
    def name(self) -> str:
        """For reports and errors."""
        return type(self).__name__

    @abstractmethod
    def prefix(self, text: bytes) -> float:
        """The log weight of a beginning; -inf where no whole text can begin so."""

    @abstractmethod
    def complete(self, text: bytes) -> float:
        """The log weight of a whole text."""

    def logw_next(self, text: bytes, tokens: Sequence[bytes | None]) -> Any:
        """[V]: ``prefix`` behind each token less ``prefix(text)``, as a tensor, array or list; tokens that are None are
        no text."""
        raise NotImplementedError

    def score(self, text: bytes, whole: bool = True) -> float:
        """The log weight of a text, whole or not."""
        return self.complete(text) if whole else self.prefix(text)

    def batch_prefix(self, texts: Sequence[bytes]) -> Sequence[float]:
        return [self.prefix(text) for text in texts]

    def batch_complete(self, texts: Sequence[bytes]) -> Sequence[float]:
        return [self.complete(text) for text in texts]

    @property
    def factors(self) -> tuple[Potential, ...]:
        """Those that it is the product of."""
        return (self,)

    @property
    def steers(self) -> bool:
        """Whether it tells what each next token weighs."""
        return type(self).logw_next is not Potential.logw_next

    def __mul__(self, other: Potential) -> Potential:
        if not isinstance(other, Potential):
            return NotImplemented
        return _joined(*self.factors, *other.factors)

    def __pow__(self, beta: float) -> Potential:
        """To the power of ``beta`` > 0.

        Raises:
            OptionError: beta is no number above 0.
        """
        if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 < beta < math.inf:
            raise OptionError("a potential's exponent must be a number above 0", f"got {beta!r}")
        raised = [factor.to_power(float(beta)) for factor in self.factors]
        return raised[0] if len(raised) == 1 else _joined(*raised)

    def to_power(self, beta: float) -> Potential:
        """As ``**``, of a single factor."""
        return Raised(self, beta)


class Raised(Potential):
    """A potential to a power."""

    def __init__(self, base: Potential, beta: float) -> None:
        self.base, self.beta = base, beta

    @property
    def name(self) -> str:
        return f"{self.base.name} ** {self.beta:g}"

    def prefix(self, text: bytes) -> float:
        return self.beta * self.base.prefix(text)

    def complete(self, text: bytes) -> float:
        return self.beta * self.base.complete(text)

    def batch_prefix(self, texts: Sequence[bytes]) -> Sequence[float]:
        return [self.beta * weight for weight in self.base.batch_prefix(texts)]

    def batch_complete(self, texts: Sequence[bytes]) -> Sequence[float]:
        return [self.beta * weight for weight in self.base.batch_complete(texts)]

    def logw_next(self, text: bytes, tokens: Sequence[bytes | None]) -> Any:
        return [self.beta * float(weight) for weight in self.base.logw_next(text, tokens)]

    @property
    def steers(self) -> bool:
        return self.base.steers

    def to_power(self, beta: float) -> Potential:
        return Raised(self.base, self.beta * beta)


class Joined(Potential):
    """Several potentials: the weight of a text is the product of theirs."""

    def __init__(self, *factors: Potential) -> None:
        self._factors = factors

    @property
    def name(self) -> str:
        return " * ".join(factor.name for factor in self._factors)

    @property
    def factors(self) -> tuple[Potential, ...]:
        return self._factors

    def prefix(self, text: bytes) -> float:
        return math.fsum(factor.prefix(text) for factor in self._factors)

    def complete(self, text: bytes) -> float:
        return math.fsum(factor.complete(text) for factor in self._factors)


def _joined(*factors: Potential) -> Potential:
    """The product, in which all languages are one."""
    languages = tuple(factor for factor in factors if isinstance(factor, Language))
    others = [factor for factor in factors if not isinstance(factor, Language)]
    kept = [*([one_language(languages)] if languages else []), *others]
    return kept[0] if len(kept) == 1 else Joined(*kept)


@lru_cache(maxsize=64)
def one_language(languages: tuple[Language, ...]) -> Language:
    """The texts of all of these; kept, since tables are made of it."""
    return reduce(_Both, languages)


class Hard(Potential):
    """Texts that fit have weight 1, and all others 0: a power changes nothing."""

    def to_power(self, beta: float) -> Potential:
        return self


class Language(Hard):
    """Texts of an automaton."""

    @property
    @abstractmethod
    def language(self) -> ByteAutomaton:
        """The texts that fit."""

    def prefix(self, text: str | bytes) -> float:
        """0 where a whole text can begin so, else -inf."""
        language = self.language
        return 0.0 if language.after(as_bytes(text)) != language.sink else -math.inf

    def complete(self, text: str | bytes) -> float:
        """0 where the text is whole, else -inf."""
        language = self.language
        return 0.0 if language.accepting[language.after(as_bytes(text))] else -math.inf


def as_bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


class Regex(Language):
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


class Choices(Language):
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


class _Both(Language):
    """The texts of two languages."""

    def __init__(self, a: Language, b: Language) -> None:
        self._of = a, b
        self._language = product(a.language, b.language)
        _require_texts(self)

    @property
    def language(self) -> ByteAutomaton:
        return self._language

    @property
    def name(self) -> str:
        return " * ".join(potential.name for potential in self._of)


def _require_texts(potential: Language) -> None:
    language = potential.language
    if not language.accepting.any():
        raise OptionError(
            "no text fits the potential",
            f"{potential.name} has weight 0 everywhere",
            "two potentials that exclude each other have no product" if isinstance(potential, _Both) else "",
        )
