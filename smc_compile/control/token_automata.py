"""A language over bytes and the tokens of a vocabulary: tables for the compiled cycle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from smc_compile.control.byte_automata import ByteAutomaton
from smc_compile.runtime.algorithms.automata import FAR, Automaton
from smc_compile.runtime.algorithms.tensors import mark_dynamic

AT_ONCE = 2**25  # entries of a table that are computed together


@dataclass(frozen=True)
class TokenAutomaton:
    """As ``Automaton``, in numpy. The last state is the sink, the one before it stands behind an end token.

    Attributes:
        classes: [V]; class 0 leads to the sink from everywhere.
        successor: [Q, C].
        distance: [Q].
    """

    classes: NDArray[np.int64]
    successor: NDArray[np.int64]
    distance: NDArray[np.int64]


def cross(language: ByteAutomaton, tokens: Sequence[bytes | None], ends: Sequence[int]) -> TokenAutomaton:
    """How ``tokens`` lead through a language, state 0 being the first; None are no text.

    Args:
        ends: tokens that end a text, where it is whole. They are no text themselves.
    """
    states = len(language.successor)  # with its sink, which becomes the last state
    _, byte_class = np.unique(language.successor, axis=1, return_inverse=True)
    byte_class = byte_class.reshape(-1)
    representative = np.array([np.argmax(byte_class == c) for c in range(byte_class.max() + 1)])
    step = language.successor[:, representative]  # [Q, byte classes]
    spelled = _spelled(tokens, byte_class.astype(np.uint8).tobytes(), set(ends))
    columns: dict[bytes, int] = {np.full(states, language.sink, dtype=np.int32).tobytes(): 0}
    class_of: dict[bytes, int] = {}
    strings = list(spelled)
    for some in _parts(strings, max(1, AT_ONCE // states)):
        for string, column in zip(some, _run(step, some), strict=True):
            class_of[string] = columns.setdefault(column.tobytes(), len(columns))

    classes = np.zeros(len(tokens), dtype=np.int64)
    for string, ids in spelled.items():
        classes[ids] = class_of[string]
    end_class, behind = len(columns), states - 1
    classes[list(ends)] = end_class
    table = np.stack([np.frombuffer(column, dtype=np.int32) for column in columns], 1).astype(np.int64)  # [Q, C - 1]
    table[table == language.sink] = states  # one state more, behind an end, moves the sink
    successor = np.full((states + 1, end_class + 1), states, dtype=np.int64)
    successor[: states - 1, :end_class] = table[:-1]
    successor[: states - 1, end_class][language.accepting[:-1]] = behind
    accepting = np.append(language.accepting[:-1], [True, False])
    return TokenAutomaton(classes, successor, distances(successor[:, :end_class], accepting))


def _spelled(tokens: Sequence[bytes | None], byte_class: bytes, ends: set[int]) -> dict[bytes, list[int]]:
    """Tokens by the classes of their bytes."""
    found: dict[bytes, list[int]] = {}
    for token, text in enumerate(tokens):
        if text and token not in ends:
            found.setdefault(text.translate(byte_class), []).append(token)
    return found


def _parts(strings: Sequence[bytes], size: int) -> list[Sequence[bytes]]:
    return [strings[at : at + size] for at in range(0, len(strings), size)]


def _run(step: NDArray[np.int32], strings: Sequence[bytes]) -> NDArray[np.int32]:
    """Where strings lead from every state: [strings, Q]."""
    lengths = np.array([len(s) for s in strings])
    order = np.argsort(-lengths)  # the longest first: at each place some leading rows go on
    width = int(lengths.max(initial=0))
    spelled = np.zeros((len(strings), width), dtype=np.uint8)
    for row, string in enumerate(strings):
        spelled[row, : len(string)] = np.frombuffer(string, dtype=np.uint8)
    spelled = spelled[order]
    state = np.tile(np.arange(len(step), dtype=np.int32), (len(strings), 1))
    for place in range(width):
        on = int((lengths > place).sum())
        state[:on] = step[state[:on], spelled[:on, place, None]]
    back = np.empty_like(state)
    back[order] = state
    return back


def distances(successor: NDArray[np.int64], accepting: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The fewest tokens from each state to one where a text is whole; 2 * FAR where there is none."""
    distance = np.where(accepting, 0, 2 * FAR)
    columns = np.unique(successor, axis=1)
    while True:
        nearer = np.minimum(distance, 1 + distance[columns].min(1, initial=2 * FAR))
        if (nearer == distance).all():
            return distance
        distance = nearer


def joined(automata: Sequence[TokenAutomaton], device: torch.device) -> tuple[Automaton, list[int]]:
    """Several automata over one vocabulary as one, and where each begins."""
    together = np.stack([a.classes for a in automata], 1)  # [V, automata]
    unique, classes = np.unique(together, axis=0, return_inverse=True)
    offsets = np.cumsum([0, *(len(a.distance) for a in automata)])
    rows = [a.successor[:, unique[:, i]] + offsets[i] for i, a in enumerate(automata)]
    tables = [classes.reshape(-1), np.concatenate(rows), np.concatenate([a.distance for a in automata])]
    found = Automaton(*(torch.from_numpy(np.ascontiguousarray(table)).to(device) for table in tables))
    mark_dynamic(found.successor, 0, 1)  # one compilation for automata of all sizes
    mark_dynamic(found.distance, 0)
    return found, offsets[:-1].tolist()
