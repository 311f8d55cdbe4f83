"""Languages as deterministic automata over bytes."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smc_compile.errors import OptionError

Table = NDArray[np.int32]


@dataclass(frozen=True)
class ByteAutomaton:
    """Q states, of which 0 is the first and the last is the sink, which nothing leaves and no text ends in.

    Attributes:
        successor: [Q, 256], the state after a byte.
        accepting: [Q] bool, whether a text may end there.
    """

    successor: Table
    accepting: NDArray[np.bool_]

    @property
    def sink(self) -> int:
        return len(self.successor) - 1

    def after(self, text: bytes) -> int:
        """The state behind a text."""
        state = 0
        for byte in text:
            state = int(self.successor[state, byte])
        return state


def from_transitions(start: int, steps: dict[int, dict[int, int]], ends: Iterable[int]) -> ByteAutomaton:
    """From states by any number and their steps by byte. Texts of dead ends lead to the sink."""
    states = list(dict.fromkeys([start, *steps, *(to for step in steps.values() for to in step.values())]))
    number = {state: i for i, state in enumerate(states)}
    sink = len(states)
    successor = np.full((sink + 1, 256), sink, dtype=np.int32)
    for state, step in steps.items():
        for byte, to in step.items():
            successor[number[state], byte] = number[to]
    accepting = np.zeros(sink + 1, dtype=bool)
    accepting[[number[state] for state in ends if state in number]] = True
    return minimal(successor, accepting)


def from_regex(pattern: str) -> ByteAutomaton:
    r"""The texts, in UTF-8, that a regular expression matches as a whole.

    The syntax is Python's, as the package interegular knows it; \\w, \\d and \\s are those of ASCII.

    Raises:
        OptionError: the pattern is no regular expression of an automaton, or interegular is not installed.
    """
    try:
        import interegular
        from interegular.fsm import anything_else
    except ImportError as error:
        why, way = str(error), 'pip install "smc_compile[control]"'
        raise OptionError("a regular expression needs the package interegular", why, way) from error
    try:
        re.compile(pattern)
        _refuse(pattern)
        characters = interegular.parse_pattern(pattern).to_fsm()
    except OptionError:
        raise
    except Exception as error:  # interegular raises whatever comes where it does not know a form
        said = str(error).strip().splitlines() or ["interegular does not know its syntax"]
        raise OptionError(f"the pattern {pattern!r} cannot be compiled", said[-1]) from error
    classes = characters.alphabet
    named = sorted((ord(c), number) for c, number in classes._symbol_mapping.items() if isinstance(c, str))
    rest = classes[anything_else]
    states = list(characters.states)
    number = {state: i for i, state in enumerate(states)}
    utf8 = Utf8(named, rest, len(states))
    for state in states:
        utf8.add(number[state], {c: number[to] for c, to in characters.map.get(state, {}).items()})
    return from_transitions(number[characters.initial], utf8.steps, [number[state] for state in characters.finals])


class Utf8:
    """From steps by character to steps by byte, with states in between that several bytes of a character need.

    Args:
        named: code points and their classes, in order; all others are of class ``rest``.
        states: how many there are; states in between have the numbers behind.
    """

    LEADS = (  # of the bytes that begin a character: first byte, last byte, bytes that follow, first code point
        (0x00, 0x7F, 0, 0x0),
        (0xC2, 0xDF, 1, 0x80),
        (0xE0, 0xEF, 2, 0x0),
        (0xF0, 0xF4, 3, 0x0),
    )
    HOLES = ((0x0, 0x800, 2), (0xD800, 0xE000, 2), (0x0, 0x10000, 3), (0x110000, 0x140000, 3))  # not written so

    def __init__(self, named: Sequence[tuple[int, int]], rest: int, states: int) -> None:
        self._points, self._classes, self._rest = [p for p, _ in named], [c for _, c in named], rest
        self._between: dict[tuple[int, ...], int] = {}
        self._count = states
        self.steps: dict[int, dict[int, int]] = {}

    def add(self, state: int, by_class: Mapping[int, int]) -> None:
        """The steps of a state: where a character of each class leads."""
        found = self.steps.setdefault(state, {})
        for first, last, follow, point in self.LEADS:
            size = 64**follow
            for byte in range(first, last + 1):
                to = self._node(state, by_class, point + (byte - first) * size, size, follow, follow)
                if to is not None:
                    found[byte] = to

    def _node(self, state: int, by_class: Mapping[int, int], low: int, size: int, follow: int, of: int) -> int | None:
        """The state behind bytes that ``follow`` more must come after, for code points from ``low`` on, in a character
        of ``of`` following bytes; None where none leads anywhere."""
        if any(a <= low and low + size <= b for a, b, n in self.HOLES if n == of):
            return None
        begin, end = bisect_left(self._points, low), bisect_left(self._points, low + size)
        if follow == 0:
            return by_class.get(self._classes[begin] if begin < end else self._rest)
        broken = any(a < low + size and low < b for a, b, n in self.HOLES if n == of)
        to = by_class.get(self._rest)
        even = begin == end and not broken
        if even and to is None:
            return None
        key = (follow, -1 if to is None else to, *(() if even else (low, of, state)))
        if key in self._between:
            return self._between[key]
        step, part = {}, size // 64
        for byte in range(64):
            after = self._node(state, by_class, low + byte * part, part, follow - 1, of)
            if after is not None:
                step[0x80 + byte] = after
        if not step:
            return None
        self._between[key] = self._count
        self.steps[self._count] = step
        self._count += 1
        return self._between[key]


FOLDING = r"\(\?[a-z]*i"
CLASS_FROM_BRACKET = r"\[\^?\]"
NO_AUTOMATON = (  # in patterns without escaped characters and classes
    (CLASS_FROM_BRACKET, "a class in it begins with ]", r"write \] there"),
    (r"\{\}", "a pair of braces is empty", r"write \{\} for the text"),
    (
        r"[$^]|\\[AbBZ]",
        "it has an anchor or a word boundary",
        "leave it out: the whole text is matched",
    ),
    (r"\(\?<?[=!]", "it looks ahead or behind", "write out what may stand there"),
    (r"\\[1-9]|\(\?P=|\(\?\(", "it refers back to a group", "write out what may stand there"),
    (FOLDING, "it ignores the case of letters, and has some that are not ASCII", "write out both cases of each"),
    (r"\(\?>|[*+?}]\+", "it has an atomic group", "leave it out: what matches is the same, or nothing"),
)


def _refuse(pattern: str) -> None:
    """Refuse what is no matter of an automaton, or what interegular reads otherwise than Python, by name."""
    escaped = re.sub(r"\\[^AbBZ1-9]", ".", pattern)
    bare = re.sub(r"\[\^?[^]]+\]", ".", escaped) if not re.search(CLASS_FROM_BRACKET, escaped) else escaped
    for sign, why, way in NO_AUTOMATON:
        if re.search(sign, bare) and (sign != FOLDING or not pattern.isascii()):
            raise OptionError(f"the pattern {pattern!r} cannot be compiled", why, way)


def from_texts(texts: Iterable[bytes]) -> ByteAutomaton:
    """A finite language."""
    steps: dict[int, dict[int, int]] = {0: {}}
    ends = []
    for text in texts:
        state = 0
        for byte in text:
            state = steps[state].setdefault(byte, len(steps))
            steps.setdefault(state, {})
        ends.append(state)
    return from_transitions(0, steps, ends)


def product(a: ByteAutomaton, b: ByteAutomaton) -> ByteAutomaton:
    """The texts of both languages."""
    pairs, number = [(0, 0)], {(0, 0): 0}
    steps: dict[int, dict[int, int]] = {}
    for state, (of_a, of_b) in enumerate(pairs):  # grows
        found = {}
        for byte, to in enumerate(zip(a.successor[of_a].tolist(), b.successor[of_b].tolist(), strict=True)):
            if to[0] == a.sink or to[1] == b.sink:
                continue
            if to not in number:
                number[to] = len(pairs)
                pairs.append(to)
            found[byte] = number[to]
        steps[state] = found
    ends = [state for state, (of_a, of_b) in enumerate(pairs) if a.accepting[of_a] and b.accepting[of_b]]
    return from_transitions(0, steps, ends)


def minimal(successor: Table, accepting: NDArray[np.bool_]) -> ByteAutomaton:
    """The least automaton of the same language (Moore, 1956): states are told apart by where they lead.

    The last state is the sink, and 0 the first, before and after. States begin apart where their longest text is not
    as long, which spares a step for each character of a long repetition.
    """
    columns = np.unique(successor, axis=1)  # bytes that lead to the same states tell no more apart
    live = _live(columns, accepting)
    columns = np.where(live[columns], columns, len(successor) - 1)
    block = _numbered(np.stack([accepting, live, _longest(columns, live)], 1))
    while True:
        finer = _numbered(np.concatenate([block[:, None], block[columns]], 1))
        if finer.max() == block.max():
            break
        block = finer
    sink = block[-1]
    kept = [b for b in dict.fromkeys(block.tolist()) if b != sink]  # the first state's is the first, if it is live
    if block[0] == sink:
        kept = [int(sink)]
    number = np.full(block.max() + 1, len(kept), dtype=np.int32)
    number[[b for b in kept if b != sink]] = np.arange(len(kept) - (block[0] == sink), dtype=np.int32)
    first = [int(np.argmax(block == b)) for b in kept]
    table = np.full((len(kept) + 1, 256), len(kept), dtype=np.int32)
    table[:-1] = number[block[np.where(live[successor[first]], successor[first], len(successor) - 1)]]
    return ByteAutomaton(table, np.append(accepting[first], False))


def _numbered(rows: NDArray[Any]) -> NDArray[np.int64]:
    """Equal rows have equal numbers, from 0 on."""
    rows = np.ascontiguousarray(rows.astype(np.int64))
    _, numbers = np.unique(rows.view([("", np.int64)] * rows.shape[1]), return_inverse=True)
    return numbers.reshape(-1)


def _live(columns: Table, accepting: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """From which states [Q] a text can still end."""
    live = accepting.copy()
    while True:
        more = live | live[columns].any(1)
        if (more == live).all():
            return live
        live = more


def _longest(columns: Table, live: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The bytes of the longest text from each state [Q] on, -1 where there is none."""
    longest, known, length = np.full(len(live), -1), ~live, 0
    while (ready := ~known & known[columns].all(1)).any():
        longest[ready], known, length = length, known | ready, length + 1
    return longest
