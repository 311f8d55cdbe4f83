"""An automaton over tokens inside the compiled regions: which tokens may follow, where they lead, what mass they hold.

An automaton conditions a model p on a language: the law of a text is p(text) over the mass of all texts of the language
(see ``smc_compile.control``). Drafted tokens are drawn from the draft restricted to what may follow, and the target is
scored as it is, so the weights carry what the restriction took away.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

FAR = 2**40  # tokens to an end that cannot be reached; also added to a budget that does not bind


class Automaton(NamedTuple):
    """Q states over V tokens. Tokens that lead to the same states from everywhere are one of C classes."""

    classes: Tensor  # [V] int64
    successor: Tensor  # [Q, C] int64
    distance: Tensor  # [Q] int64, the fewest tokens to a text that is whole, 0 where it is; 2 * FAR where none is left


class Steering(NamedTuple):
    """Where rows stand in an automaton."""

    automaton: Automaton
    state: Tensor  # [R], after the last token
    left: Tensor  # [R], tokens that the budget still allows behind it; FAR more where it does not bind


def allowed(automaton: Automaton, state: Tensor, left: Tensor) -> Tensor:
    """Which tokens may follow when ``left`` [...] tokens may come behind them: [...] -> [..., V] bool."""
    by_class = automaton.distance[automaton.successor[state]] <= left[..., None]  # [..., C]
    return by_class[..., automaton.classes]


def after_token(automaton: Automaton, state: Tensor, token: Tensor) -> Tensor:
    """The states that tokens lead to: [...], [...] -> [...]."""
    return automaton.successor[state, automaton.classes[token]]


def after_tokens(automaton: Automaton, state: Tensor, tokens: Tensor) -> Tensor:
    """The states [R, T+1] before, within and behind ``tokens`` [R, T], from ``state`` [R] on."""
    states = [state]
    for token in tokens.unbind(1):
        states.append(after_token(automaton, states[-1], token))
    return torch.stack(states, 1)


def restricted(log_p: Tensor, may: Tensor) -> tuple[Tensor, Tensor]:
    """The law of what may follow, and the log of the mass that it holds: [..., V], [..., V] -> [..., V], [...].

    Where that mass is zero, every token that may follow is as likely; where none may, the law stays as it is. Neither
    counts: such a text has weight zero.
    """
    inside = torch.where(may, log_p, -math.inf)
    mass = torch.logsumexp(inside, -1)
    none = mass[..., None] == -math.inf
    even = torch.where(may, 0.0, -math.inf) - may.sum(-1, keepdim=True).clamp_min(1).to(log_p.dtype).log()
    fallback = torch.where(may.any(-1, keepdim=True), even, log_p)
    return torch.where(none, fallback, inside - torch.where(none, 0.0, mass[..., None])), mass
