"""Guides: potentials that tell on the host what each next token weighs.

A reader reads texts for one potential. A guide holds the readers of every request of a batch, gives each text that it
meets a number, and puts together what the readers say of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smc_compile.control.canonical import Followers
from smc_compile.control.grammars import Grammar
from smc_compile.control.potentials import Potential
from smc_compile.control.token_automata import TokenAutomaton
from smc_compile.errors import GenerationError, InputError
from smc_compile.runtime.algorithms.automata import FAR

FEW = 64  # tokens that may follow, at most, for what is behind each to be looked at
MOST = 4096  # texts that are kept beside those that particles have
AHEAD = 48  # tokens that are looked at, one behind the other
DEAD = 0  # the number of a text that no whole text begins with


class Reader(Protocol):
    """Reads texts token by token, from states that it makes.

    Attributes:
        horizon: so many tokens before the end of a budget, and more, weights do not depend on what is left.
    """

    horizon: int

    def start(self) -> Any: ...

    def weights(self, state: Any, left: int) -> NDArray[Any]:
        """Of the next tokens but those that end a text, with ``left`` tokens behind them: bits [W] int32 of those that
        may follow, or log weights [V] float32."""
        ...

    def after(self, state: Any, token: int) -> Any:
        """The state behind a token; None where nothing can follow."""
        ...

    def end(self, state: Any) -> float:
        """The log weight of an end here."""
        ...


class GrammarReader:
    """Reads texts of a grammar token by token. A state is an ``LLMatcher``."""

    horizon = 0

    def __init__(self, grammar: Grammar, tokens: Any, vocabulary: int) -> None:
        self._grammar, self._tokens, self._vocabulary = grammar, tokens, vocabulary

    def start(self) -> Any:
        return self._grammar.matcher(self._tokens)

    def weights(self, state: Any, left: int) -> NDArray[np.int32]:
        """Bits [W] of the tokens that may follow."""
        bits = np.zeros((self._tokens.vocab_size + 31) // 32, dtype=np.int32)
        if not state.is_stopped():
            state.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if state.is_error():
            raise InputError(f"{self._grammar.name} cannot be followed further", state.get_error())
        return without(bits, self._tokens.vocab_size - 1)[: (self._vocabulary + 31) // 32]

    def after(self, state: Any, token: int) -> Any:
        """None where the token may not follow."""
        behind = state.deep_copy()
        return behind if behind.consume_token(token) else None

    def end(self, state: Any) -> float:
        return 0.0 if state.is_accepting() else -math.inf


class LanguageReader:
    """Reads texts of an automaton. A state is its state."""

    def __init__(self, automaton: TokenAutomaton) -> None:
        self._automaton = automaton
        finite = automaton.distance[automaton.distance < FAR]
        self.horizon = int(finite.max(initial=0))

    def start(self) -> int:
        return 0

    def weights(self, state: int, left: int) -> NDArray[np.int32]:
        may = self._automaton.distance[self._automaton.successor[state]] <= left  # [C]
        return packed_bits(may[self._automaton.classes])

    def after(self, state: int, token: int) -> int | None:
        behind = int(self._automaton.successor[state, self._automaton.classes[token]])
        return behind if self._automaton.distance[behind] < FAR else None

    def end(self, state: int) -> float:
        return 0.0 if self._automaton.distance[state] == 0 else -math.inf


class SpellingReader:
    """Reads canonical spellings. A state is the last token, or -1 at the beginning."""

    horizon = 0

    def __init__(self, followers: Followers, vocabulary: int) -> None:
        self._followers, self._vocabulary = followers, vocabulary

    def start(self) -> int:
        return -1

    def weights(self, state: int, left: int) -> NDArray[np.int32]:
        may = np.zeros(self._vocabulary, dtype=bool)
        told = self._followers.after(None if state < 0 else state)
        may[: len(told)] = told
        return packed_bits(may)

    def after(self, state: int, token: int) -> int | None:
        told = self._followers.after(None if state < 0 else state)
        return token if token < len(told) and told[token] else None

    def end(self, state: int) -> float:
        return 0.0


class TextReader:
    """Asks a potential's ``logw_next``. A state is a text."""

    horizon = 0

    def __init__(self, potential: Potential, tokens: Sequence[bytes | None]) -> None:
        self._potential, self._tokens = potential, tokens

    def start(self) -> bytes:
        return b""

    def weights(self, state: bytes, left: int) -> NDArray[np.float32]:
        told = np.asarray(self._potential.logw_next(state, self._tokens), dtype=np.float32)
        if told.shape != (len(self._tokens),):
            why = f"for {len(self._tokens)} tokens it gave a shape of {told.shape}"
            raise GenerationError(f"logw_next of {self._potential.name} must give a weight for each token", why)
        weights = np.where([token is None for token in self._tokens], -np.inf, told).astype(np.float32)
        if np.isnan(weights).any() or (weights == np.inf).any():
            raise GenerationError(f"{self._potential.name} gave a weight that is NaN or infinite", f"behind {state!r}")
        return weights

    def after(self, state: bytes, token: int) -> bytes | None:
        spelled = self._tokens[token]
        return None if spelled is None else state + spelled

    def end(self, state: bytes) -> float:
        before = self._potential.prefix(state)
        return -math.inf if before == -math.inf else self._potential.complete(state) - before


@dataclass
class _Text:
    """What is known of a text."""

    readers: tuple[Reader, ...]
    ends: tuple[int, ...]  # tokens that end it
    states: tuple[Any, ...]
    offset: float = 0.0  # the log weight of an empty text, which its first token brings
    weights: dict[int, NDArray[Any]] = field(default_factory=dict)  # by tokens left
    behind: dict[int, int] = field(default_factory=dict)  # numbers of texts that are longer by a token
    lives: dict[int, bool] = field(default_factory=dict)  # by tokens left: whether something may follow, or an end
    hard: int = 0  # readers that say which tokens may follow, and no more

    @property
    def horizon(self) -> int:
        return max((reader.horizon for reader in self.readers), default=0)


class TextGuide:
    """As ``smc_compile.runtime.state.conditioning.Guide``."""

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self._vocabulary, self._device = vocabulary, device
        self._texts: dict[int, _Text] = {DEAD: _Text((), (), ())}
        self._known: dict[Any, int] = {}  # by what readers tell apart
        self._count = 1

    def begin(self, readers: tuple[Reader, ...], ends: tuple[int, ...], offset: float = 0.0) -> int:
        """The number of an empty text that these read."""
        return self._add(_Text(readers, ends, tuple(reader.start() for reader in readers), offset))

    def weights(self, states: Tensor, left: Tensor) -> Tensor:
        numbers, budgets = states.flatten().tolist(), left.flatten().tolist()
        rows = [self._weights(number, budget) for number, budget in zip(numbers, budgets, strict=True)]
        if any(row.dtype == np.float32 for row in rows):
            rows = [row if row.dtype == np.float32 else self._unpacked(row) for row in rows]
        return torch.from_numpy(np.stack(rows)).view(*states.shape, -1).to(self._device)

    def after(self, states: Tensor, tokens: Tensor, live: Tensor) -> Tensor:
        rows = zip(states.tolist(), tokens.tolist(), live.tolist(), strict=True)
        behind = [self._after(state, token) if on else state for state, token, on in rows]
        return torch.tensor(behind, device=states.device)

    def ends(self, states: Tensor) -> Tensor:
        weights = [self._end(number) for number in states.tolist()]
        return torch.tensor(weights, dtype=torch.float64, device=states.device)

    def keep(self, states: Tensor) -> None:
        if len(self._texts) < MOST:
            return
        kept = {DEAD, *states.flatten().tolist()}
        self._known = {key: number for key, number in self._known.items() if number in kept}
        self._texts = {number: text for number, text in self._texts.items() if number in kept}
        for text in self._texts.values():
            text.behind = {token: number for token, number in text.behind.items() if number in kept}

    # ---- of one text -------------------------------------------------------------------------------------------------

    def _add(self, text: _Text) -> int:
        """Its number. Texts that readers cannot tell apart have one."""
        key = (text.readers, text.ends, text.states, text.offset)
        told = all(isinstance(state, int | bytes) for state in text.states)
        if told and key in self._known:
            return self._known[key]
        self._texts[self._count] = text
        if told:
            self._known[key] = self._count
        self._count += 1
        return self._count - 1

    def _after(self, number: int, token: int) -> int:
        text = self._texts[number]
        if number == DEAD or token in text.ends:
            return DEAD
        if token not in text.behind:
            pairs = zip(text.readers, text.states, strict=True)
            states = tuple(reader.after(state, token) for reader, state in pairs)
            dead = any(state is None for state in states)
            text.behind[token] = DEAD if dead else self._add(_Text(text.readers, text.ends, states))
        return text.behind[token]

    def _end(self, number: int) -> float:
        if number == DEAD:
            return -math.inf
        text = self._texts[number]
        return text.offset + math.fsum(r.end(s) for r, s in zip(text.readers, text.states, strict=True))

    def _weights(self, number: int, left: int) -> NDArray[Any]:
        """Bits [W] int32 or log weights [V] float32, ends included."""
        text = self._texts[number]
        left = min(left, text.horizon)
        if left not in text.weights:
            text.weights[left] = self._together(number, left)
        return text.weights[left]

    def _together(self, number: int, left: int) -> NDArray[Any]:
        text = self._texts[number]
        bits, soft = self._allowed(text, left)
        if text.hard > 1:
            bits = self._living(number, bits, left)
        end = self._end(number) if text.readers else 0.0
        if not soft and text.offset == 0.0 and end in (0.0, -math.inf):
            for token in text.ends if number != DEAD else ():
                bits = having(bits, token) if end == 0.0 else without(bits, token)
            return bits
        found = self._unpacked(bits) + sum(soft) + text.offset
        found[list(text.ends)] = end
        return found.astype(np.float32)

    def _allowed(self, text: _Text, left: int) -> tuple[NDArray[np.int32], list[NDArray[np.float32]]]:
        """Bits of the tokens that all readers allow, and the log weights that some give."""
        told = [reader.weights(state, left) for reader, state in zip(text.readers, text.states, strict=True)]
        hard = [weights for weights in told if weights.dtype == np.int32]
        text.hard = len(hard)
        every = packed_bits(np.full(self._vocabulary, text is not self._texts[DEAD]))
        return np.bitwise_and.reduce([every, *hard]), [weights for weights in told if weights.dtype != np.int32]

    def _living(self, number: int, bits: NDArray[np.int32], left: int) -> NDArray[np.int32]:
        """Bits without those of tokens behind which nothing may follow. Each of several readers may allow something
        there, and no two the same, as where a text is forced and another spelling of it is canonical. It is looked at
        where few tokens may follow."""
        on = set_bits(bits)
        if len(on) <= FEW:
            for token in on:
                if not self._lives(self._after(number, token), self._behind(number, left), AHEAD):
                    bits = without(bits, token)
        return bits

    def _lives(self, number: int, left: int, ahead: int) -> bool:
        """Whether a text may end there or go on, as far as is looked."""
        if number == DEAD:
            return False
        text = self._texts[number]
        left = min(left, text.horizon)
        if left not in text.lives:
            text.lives[left] = True  # until it is known
            on = set_bits(self._allowed(text, left)[0])
            text.lives[left] = (
                self._end(number) > -math.inf
                or ahead == 0
                or len(on) > FEW
                or any(self._lives(self._after(number, t), self._behind(number, left), ahead - 1) for t in on)
            )
        return text.lives[left]

    def _behind(self, number: int, left: int) -> int:
        """What is left behind a token: where a budget does not bind before it, none is looked at."""
        return left - 1 if left < self._texts[number].horizon else FAR

    def _unpacked(self, bits: NDArray[np.int32]) -> NDArray[np.float32]:
        on = np.unpackbits(bits.view(np.uint8), bitorder="little", count=self._vocabulary)
        return np.where(on > 0, 0.0, -np.inf).astype(np.float32)


def packed_bits(may: NDArray[np.bool_]) -> NDArray[np.int32]:
    """[V] bool -> [W] int32, bit i of which is bit i % 32 of word i // 32."""
    words = np.zeros(((len(may) + 31) // 32) * 4, dtype=np.uint8)
    packed = np.packbits(may, bitorder="little")
    words[: len(packed)] = packed
    return words.view(np.int32)


def set_bits(bits: NDArray[np.int32]) -> list[int]:
    found: list[int] = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist()
    return found


def having(bits: NDArray[np.int32], token: int) -> NDArray[np.int32]:
    """The same bits, and that of ``token`` set."""
    found = bits.copy()
    found.view(np.uint32)[token // 32] |= np.uint32(1 << (token % 32))
    return found


def without(bits: NDArray[np.int32], token: int) -> NDArray[np.int32]:
    """The same bits, and that of ``token`` not set."""
    found = bits.copy()
    found.view(np.uint32)[token // 32] &= np.uint32(~(1 << (token % 32)) & 0xFFFFFFFF)
    return found
