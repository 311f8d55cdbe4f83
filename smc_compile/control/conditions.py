"""From potentials and a tokenizer to requests that are conditioned on them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from smc_compile.control.critics import TextCritic, checked
from smc_compile.control.grammars import Grammar, JsonSchema, tokens_for_grammars
from smc_compile.control.guides import GrammarReader, LanguageReader, Reader, SpellingReader, TextGuide, TextReader
from smc_compile.control.potentials import Language, Potential, one_language
from smc_compile.control.soft_potentials import Power, Reward
from smc_compile.control.spellings import Canonical, followers_of
from smc_compile.control.token_automata import TokenAutomaton, cross, joined
from smc_compile.control.token_bytes import token_bytes
from smc_compile.errors import InputError, OptionError
from smc_compile.options import AUTO, Options
from smc_compile.runtime.algorithms.automata import FAR
from smc_compile.runtime.state.conditioning import Conditioning
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

    def __post_init__(self) -> None:
        if self.at_limit is not None and self.potential is None:
            why = "without one a text may end anywhere"
            raise OptionError("at_limit needs a potential", why, "pass potential=..., or leave at_limit out")

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
        parts = [Parts.of(potential) for potential in self._each(each, request.batch)]
        tokens = self._tokens(vocabulary) if any(part.spelled for part in parts) else None
        if any(part.ends_texts for part in parts) and request.stop is not None:
            raise OptionError(
                "a potential says where a text ends",
                "stop_strings and stopping_criteria end it elsewhere",
                "leave them out, and let the potential end with the text that should end it",
            )
        ends = [tuple(sorted(i for i in ids if i >= 0)) for ids in request.eos_ids.tolist()]
        for b, (part, its_ends) in enumerate(zip(parts, ends, strict=True)):
            if part.ends_texts and not its_ends:
                raise OptionError(
                    "a potential needs an end token",
                    f"request {b} has none, so nothing says that a text of {part.name} is whole",
                    "pass eos_token_id=...",
                )
        crossed = [
            None if part.language is None else _automaton(part.language, tokens or (), its_ends)
            for part, its_ends in zip(parts, ends, strict=True)
        ]
        for b, (part, automaton) in enumerate(zip(parts, crossed, strict=True)):
            self._require(part, automaton, int(request.new_tokens[b]), b)
        found = Conditioning(
            names=tuple(part.name for part in parts),
            tables=tuple(dict.fromkeys(line for p, a in zip(parts, crossed, strict=True) for line in p.report(a))),
            start=torch.zeros_like(request.new_tokens),
            slack=FAR if self.at_limit == "cut" else 0,
            power=_powers(parts, request),
            critic=_critic(parts, tokens, request),
        )
        if any(part.reads for part in parts):
            found = self._read(found, parts, crossed, ends, tokens or (), request)
        return replace(request, conditioning=found)

    def _each(self, each: Any, batch: int) -> list[Potential]:
        potentials = list(each) if isinstance(each, list | tuple) else [each] * batch
        if len(potentials) != batch:
            raise OptionError(
                f"potential has {len(potentials)} values for {batch} requests",
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
        return potentials

    def _tokens(self, vocabulary: int) -> tuple[bytes | None, ...]:
        """The bytes of each token that the models know; those that the tokenizer does not have are no text."""
        if self.tokenizer is None:
            raise OptionError(
                "a potential needs the tokenizer",
                "it is about texts, and the models are about tokens",
                "pass tokenizer=... (beside custom_generate text_tokenizer=...), of tokenizers or transformers, or a "
                "list with the bytes of each token",
            )
        tokens = _tokens_of(self.tokenizer)
        if len(tokens) > vocabulary:
            raise InputError(
                "the tokenizer does not fit the models",
                f"it has {len(tokens)} tokens, and the models know {vocabulary}",
                "pass the tokenizer that the models were trained with",
            )
        return (*tokens, *[None] * (vocabulary - len(tokens)))

    def _read(
        self,
        found: Conditioning,
        parts: Sequence[Parts],
        crossed: Sequence[TokenAutomaton | None],
        ends: Sequence[tuple[int, ...]],
        tokens: tuple[bytes | None, ...],
        request: Request,
    ) -> Conditioning:
        """With tables for the compiled cycle where all requests have automata and nothing else says what may follow;
        else with a guide for all."""
        device = request.ids.device
        if all(automaton is not None and not part.guides for automaton, part in zip(crossed, parts, strict=True)):
            automata = list({id(automaton): automaton for automaton in crossed if automaton is not None}.values())
            automaton, starts = joined(automata, device)
            at = {id(one): start for one, start in zip(automata, starts, strict=True)}
            start = torch.tensor([at[id(one)] for one in crossed], device=device)
            return replace(found, automaton=automaton, start=start)
        guide = TextGuide(len(tokens), device)
        roots: dict[Hashable, int] = {}
        which = []
        for part, automaton, its_ends in zip(parts, crossed, ends, strict=True):
            key = (part.language, part.guides, its_ends)
            if key not in roots:
                readers: list[Reader] = [] if automaton is None else [LanguageReader(automaton)]
                readers += [self._reader(potential, tokens) for potential in part.guides]
                first = [potential.prefix(b"") for potential in part.guides if potential.steers]
                roots[key] = guide.begin(
                    tuple(readers), its_ends, sum(checked(part.guides[0], first)) if first else 0.0
                )
            which.append(roots[key])
        return replace(found, guide=guide, start=torch.tensor(which, device=device))

    def _reader(self, potential: Potential, tokens: tuple[bytes | None, ...]) -> Reader:
        if isinstance(potential, Grammar):
            return GrammarReader(potential, _grammar_tokens(tokens), len(tokens))
        if isinstance(potential, Canonical):
            return SpellingReader(followers_of(self.tokenizer), len(tokens))
        return TextReader(potential, tokens)

    def _require(self, part: Parts, automaton: TokenAutomaton | None, budget: int, b: int) -> None:
        """The request can be answered within its budget, as far as its automaton tells."""
        if automaton is None:
            return
        needed = int(automaton.distance[0])
        if needed >= FAR:
            raise InputError(
                "no text fits the potential",
                f"the tokenizer's tokens spell no text of {part.name}",
                "look whether it has the bytes that such a text needs",
            )
        if needed > budget and self.at_limit != "cut":
            raise InputError(
                "max_new_tokens is too small for the potential",
                f"the shortest text of {part.name} has {needed} tokens, and request {b} may write {budget}",
                f'raise max_new_tokens to {needed} at least, or pass at_limit="cut"',
            )


@dataclass(frozen=True)
class Parts:
    """The factors of a potential, by who reads them.

    Attributes:
        language: read by an automaton; all factors that are languages are one.
        guides: those that say on the host what each next token weighs.
        critics: those that weigh texts once a cycle.
        power: the exponent of the model's law.
    """

    name: str
    language: Language | None
    guides: tuple[Potential, ...]
    critics: tuple[Potential, ...]
    power: float

    @classmethod
    def of(cls, potential: Potential) -> Parts:
        regular = [f.regular if isinstance(f, JsonSchema) else None for f in potential.factors]
        factors = [f if r is None else r for f, r in zip(potential.factors, regular, strict=True)]
        languages = tuple(factor for factor in factors if isinstance(factor, Language))
        guides = tuple(
            f
            for f in factors
            if not isinstance(f, Language | Power) and (isinstance(f, Grammar | Canonical) or f.steers)
        )
        powers = [factor for factor in factors if isinstance(factor, Power)]
        rest = (*languages, *guides, *powers)
        power = 1 + sum(factor.alpha - 1 for factor in powers)
        if power <= 0:
            raise OptionError("the exponents of Power leave none", f"together they are {power:g}", "use larger ones")
        return cls(
            name=potential.name,
            language=one_language(languages) if languages else None,
            guides=guides,
            critics=tuple(factor for factor in factors if factor not in rest),
            power=power,
        )

    @property
    def reads(self) -> bool:
        """Whether something says which tokens may follow."""
        return self.language is not None or bool(self.guides)

    @property
    def ends_texts(self) -> bool:
        """Whether something says where a text may end."""
        return self.language is not None or any(not isinstance(guide, Canonical) for guide in self.guides)

    @property
    def spelled(self) -> bool:
        """Whether the bytes of tokens are needed."""
        modules = [c for c in self.critics if isinstance(c, Reward) and isinstance(c.f, nn.Module) and c.at != "step"]
        return self.reads or len(modules) < len(self.critics)

    def report(self, automaton: TokenAutomaton | None) -> list[str]:
        """A line for each factor: where it runs."""
        lines = []
        if automaton is not None:
            assert self.language is not None
            states, classes = automaton.successor.shape
            where = "on the host, before each token" if self.guides else "in the compiled cycle"
            lines.append(f"{self.language.name}: an automaton {where}, {states} states, {classes} classes of tokens")
        lines += [f"{guide.name}: on the host, before each token" for guide in self.guides]
        lines += [f"{critic.name}: on the host, once a cycle" for critic in self.critics]
        if self.power != 1:
            lines.append(f"Power({self.power:g}): in the compiled cycle")
        return lines


def _powers(parts: Sequence[Parts], request: Request) -> torch.Tensor | None:
    if all(part.power == 1 for part in parts):
        return None
    return torch.tensor([part.power for part in parts], dtype=torch.float64, device=request.ids.device)


def _critic(parts: Sequence[Parts], tokens: Sequence[bytes | None] | None, request: Request) -> TextCritic | None:
    if not any(part.critics for part in parts):
        return None
    width, numbers = request.ids.shape[1], request.number
    prompts = {n: ids[width - int(size) :] for n, ids, size in zip(numbers, request.ids, request.lengths, strict=True)}
    return TextCritic({n: part.critics for n, part in zip(numbers, parts, strict=True)}, tokens, prompts)


def _tokens_of(tokenizer: Any) -> tuple[bytes | None, ...]:
    """As ``token_bytes``, kept for a tokenizer as long as it has as many tokens."""
    size = getattr(getattr(tokenizer, "backend_tokenizer", tokenizer), "get_vocab_size", None)
    if not callable(size):
        return tuple(token_bytes(tokenizer))
    count = size(with_added_tokens=True)
    if tokenizer not in _bytes_of or _bytes_of[tokenizer][0] != count:
        _bytes_of[tokenizer] = count, tuple(token_bytes(tokenizer))
    return _bytes_of[tokenizer][1]


def _automaton(potential: Language, tokens: tuple[bytes | None, ...], ends: tuple[int, ...]) -> TokenAutomaton:
    """Built once for a potential, a vocabulary and its end tokens."""
    kept = _crossed.setdefault(potential, {})
    key = (_hash(tokens), ends)
    if key not in kept:
        kept[key] = cross(potential.language, tokens, ends)
    return kept[key]


@lru_cache(maxsize=4)
def _grammar_tokens(tokens: tuple[bytes | None, ...]) -> Any:
    """Made once for a vocabulary, since that takes a second for a large one."""
    return tokens_for_grammars(tokens)


@lru_cache(maxsize=8)
def _hash(tokens: tuple[bytes | None, ...]) -> tuple[int, int]:
    """A vocabulary is told by its size and its contents."""
    return len(tokens), hash(tokens)
