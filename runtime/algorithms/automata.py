"""An automaton over tokens inside the compiled regions: which tokens may follow, and where they lead."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

FAR = 2**40  # tokens to an end that cannot be reached; also added to a budget that does not bind


class Automaton(NamedTuple):
    """Q states over V tokens. Tokens that lead to the same states from everywhere are one of C classes."""

    classes: Tensor  # [V] int64
    successor: Tensor  # [Q, C] int64
    distance: Tensor  # [Q] int64, the fewest tokens to a text that is whole, 0 where it is; 2 * FAR where none is left


def allowed(automaton: Automaton, state: Tensor, left: Tensor) -> Tensor:
    """Which tokens may follow when ``left`` [...] tokens may come behind them: [...] -> [..., V] bool."""
    by_class = automaton.distance[automaton.successor[state]] <= left[..., None]  # [..., C]
    return by_class[..., automaton.classes]


def after_token(automaton: Automaton, state: Tensor, token: Tensor) -> Tensor:
    """The states that tokens lead to: [...], [...] -> [...]."""
    return automaton.successor[state, automaton.classes[token]]
