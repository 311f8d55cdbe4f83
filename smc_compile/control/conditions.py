"""From potentials and a tokenizer to requests that are conditioned on them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch

from smc_compile.control.potentials import Potential
from smc_compile.control.token_automata import TokenAutomaton, cross, joined
from smc_compile.control.token_bytes import token_bytes
from smc_compile.errors import InputError, OptionError
from smc_compile.options import AUTO, Options
from smc_compile.runtime.algorithms.automata import FAR
from smc_compile.runtime.state.request import Request

AT_LIMIT = ("complete", "cut")
_crossed: WeakKeyDictionary[Potential, dict[Hashable, TokenAutomaton]] = WeakKeyDictionary()
_bytes_of: WeakKeyDictionary[Any, tuple[int, tuple[bytes | None, ...]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Conditions:
    """What the texts of a call are conditioned on.

    Attributes:
        potential: one for all requests, or one for each.
        tokenizer: as of ``token_bytes``.
        at_limit: where the budget of tokens ends a text. "complete", or None: it must be whole by then. "cut": it may
            be the beginning of a whole one.
    """

    potential: Any = None
    tokenizer: Any = None
    at_limit: str | None = None

    def __bool__(self) -> bool:
        return self.potential is not None

    def method(self, options: Options, greedy: bool) -> Options:
        """The options of a call that is conditioned.

        Raises:
            OptionError: another method than SMC is asked for, or N or K is to be chosen.
        """
        if self.at_limit not in (None, *AT_LIMIT):
            raise OptionError(f"at_limit {self.at_limit!r} is unknown", f"valid values are {', '.join(AT_LIMIT)}")
        if options.method not in (None, "smc"):
            raise OptionError(
                f'method="{options.method}" cannot condition on a potential',
                "it has no weights, and would follow another law: that of tokens which are masked one by one",
                'leave method out, or pass method="smc"',
            )
        if greedy:
            raise OptionError(
                "temperature 0 cannot condition on a potential",
                "the likeliest text that fits is not found by taking the likeliest tokens",
                "use a temperature above 0",
            )
        if AUTO in (options.n_particles, options.lookahead):
            raise OptionError(
                'n_particles and lookahead cannot be "auto" with a potential',
                "a pilot would measure the pair without it",
                "give numbers",
            )
        return replace(options, method="smc")

    def of(self, request: Request, each: Any, vocabulary: int, forgets: bool) -> Request:
        """The request with what its texts are conditioned on.

        Args:
            each: the potential, or one for each request.
            forgets: whether the models can forget drafted tokens.

        Raises:
            OptionError, InputError: potential, tokenizer and vocabulary do not fit each other.
        """
        if not forgets:
            raise OptionError(
                "a potential needs models that can forget tokens",
                "one of them carries a state of its own, and the compiler makes no cache for it",
                "use a model and a loop that the compiler can make a cache for",
            )
        potentials = list(each) if isinstance(each, list | tuple) else [each] * request.batch
        if len(potentials) != request.batch:
            raise OptionError(
                f"potential has {len(potentials)} values for {request.batch} requests",
                "",
                "give one for all requests, or one for each",
            )
        for potential in potentials:
            if not isinstance(potential, Potential):
                raise OptionError(
                    "potential must be a Potential",
                    f"got {type(potential).__name__}",
                    "build one from smc_compile.control, and give one for all requests or one for each",
                )
        if self.tokenizer is None:
            raise OptionError(
                "a potential needs the tokenizer",
                "it is about texts, and the models are about tokens",
                "pass tokenizer=..., of tokenizers or transformers, or a list with the bytes of each token",
            )
        if request.stop is not None:
            raise OptionError(
                "a potential says where a text ends",
                "stop_strings and stopping_criteria end it elsewhere",
                "leave them out, and let the potential end with the text that should end it",
            )
        tokens = self._tokens(vocabulary)
        found: dict[Hashable, int] = {}
        automata: list[TokenAutomaton] = []
        which = []
        for potential, ids in zip(potentials, request.eos_ids.tolist(), strict=True):
            ends = tuple(sorted(i for i in ids if i >= 0))
            if (potential, ends) not in found:
                found[potential, ends] = len(automata)
                automata.append(_automaton(potential, tokens, ends))
            which.append(found[potential, ends])
        self._require(potentials, [automata[i] for i in which], request)
        automaton, starts = joined(automata, request.ids.device)
        return replace(
            request,
            automaton=automaton,
            start=torch.tensor([starts[i] for i in which], device=request.ids.device),
            slack=FAR if self.at_limit == "cut" else 0,
            potentials=tuple(potential.name for potential in potentials),
            tables=tuple(dict.fromkeys(_table(p, automata[i]) for p, i in zip(potentials, which, strict=True))),
        )

    def _tokens(self, vocabulary: int) -> tuple[bytes | None, ...]:
        """The bytes of each token that the models know; those that the tokenizer does not have are no text."""
        tokens = _tokens_of(self.tokenizer)
        if len(tokens) > vocabulary:
            raise InputError(
                "the tokenizer does not fit the models",
                f"it has {len(tokens)} tokens, and the models know {vocabulary}",
                "pass the tokenizer that the models were trained with",
            )
        return (*tokens, *[None] * (vocabulary - len(tokens)))

    def _require(self, potentials: Sequence[Potential], automata: Sequence[TokenAutomaton], request: Request) -> None:
        """Every request can be answered within its budget."""
        for b, (potential, automaton) in enumerate(zip(potentials, automata, strict=True)):
            needed, budget = int(automaton.distance[0]), int(request.new_tokens[b])
            if not bool((request.eos_ids[b] >= 0).any()):
                raise OptionError(
                    "a potential needs an end token",
                    f"request {b} has none, so nothing says that a text of {potential.name} is whole",
                    "pass eos_token_id=...",
                )
            if needed >= FAR:
                raise InputError(
                    "no text fits the potential",
                    f"the tokenizer's tokens spell no text of {potential.name}",
                    "look whether it has the bytes that such a text needs",
                )
            if needed > budget and self.at_limit != "cut":
                raise InputError(
                    "max_new_tokens is too small for the potential",
                    f"the shortest text of {potential.name} has {needed} tokens, and request {b} may write {budget}",
                    f'raise max_new_tokens to {needed} at least, or pass at_limit="cut"',
                )


def _tokens_of(tokenizer: Any) -> tuple[bytes | None, ...]:
    """As ``token_bytes``, kept for a tokenizer as long as it has as many tokens."""
    size = getattr(getattr(tokenizer, "backend_tokenizer", tokenizer), "get_vocab_size", None)
    if not callable(size):
        return tuple(token_bytes(tokenizer))
    count = size(with_added_tokens=True)
    if tokenizer not in _bytes_of or _bytes_of[tokenizer][0] != count:
        _bytes_of[tokenizer] = count, tuple(token_bytes(tokenizer))
    return _bytes_of[tokenizer][1]


def _table(potential: Potential, automaton: TokenAutomaton) -> str:
    """A line for a report."""
    states, classes = automaton.successor.shape
    return f"{potential.name}: an automaton in the compiled cycle, {states} states, {classes} classes of tokens"


def _automaton(potential: Potential, tokens: tuple[bytes | None, ...], ends: tuple[int, ...]) -> TokenAutomaton:
    """Built once for a potential, a vocabulary and its end tokens."""
    kept = _crossed.setdefault(potential, {})
    key = (_hash(tokens), ends)
    if key not in kept:
        kept[key] = cross(potential.language, tokens, ends)
    return kept[key]


@lru_cache(maxsize=8)
def _hash(tokens: tuple[bytes | None, ...]) -> tuple[int, int]:
    """A vocabulary is told by its size and its contents."""
    return len(tokens), hash(tokens)
