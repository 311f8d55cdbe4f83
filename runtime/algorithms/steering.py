"""What weighs the next tokens of rows: the law that they are drawn from, and the mass that it holds.

A text x is wanted with the weight Phi(x), so its law is p(x) Phi(x) over the sum of these (``smc_compile.control``).
Where Phi tells what weight it gives to each next token, drafted tokens are drawn from the draft times that weight, and
the target is scored with it but not normalised: the increments then carry the mass that the weights took away. Names
are those of Lew et al., "Sequential Monte Carlo Steering of Large Language Models using Probabilistic Programs", 2023.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from smc_compile.runtime.algorithms.automata import Automaton, after_token, allowed


class Steering(NamedTuple):
    """Weights of the next tokens, of rows [R] or of positions [R, T]. What is None changes nothing."""

    automaton: Automaton | None
    state: Tensor  # [...], of the automaton after the last token, or of a guide
    left: Tensor  # [...], tokens that the budget still allows behind the next one; FAR more where it does not bind
    weights: Tensor | None  # [..., V] log weights, or [..., W] int32 with a bit for each token that may follow
    power: Tensor | None  # [...], the exponent of the model's law


def log_weights(steering: Steering, log_p: Tensor) -> Tensor:
    """Log weights of the next tokens, which have the model's law ``log_p``: [..., V]."""
    found = torch.zeros_like(log_p)
    if steering.automaton is not None:
        found = torch.where(allowed(steering.automaton, steering.state, steering.left), 0.0, -math.inf).to(log_p.dtype)
    if steering.weights is not None:
        given = steering.weights
        found = found + (given if given.is_floating_point() else unpacked(given, log_p.shape[-1])).to(log_p.dtype)
    return found


def of_position(steering: Steering, at: Tensor) -> Steering:
    """That of one position ``at`` [R, 1] of each row: [R, T] -> [R]."""
    weights, power = steering.weights, steering.power
    if weights is not None:
        weights = weights.gather(1, at[:, :, None].expand(-1, -1, weights.shape[-1]))[:, 0]
    return Steering(
        steering.automaton,
        steering.state.gather(1, at)[:, 0],
        steering.left.gather(1, at)[:, 0],
        weights,
        None if power is None else power[:, 0],
    )


def unpacked(bits: Tensor, count: int) -> Tensor:
    """0 for bits that are set, else -inf: [..., W] int32 -> [..., count]. Bit i is bit i % 32 of word i // 32."""
    place = torch.arange(count, device=bits.device)
    return torch.where((bits[..., place // 32] >> (place % 32)) & 1 > 0, 0.0, -math.inf)


def tempered(log_p: Tensor, steering: Steering) -> Tensor:
    """The model's law to the power that is asked for, not normalised: [..., V] -> [..., V]."""
    return log_p if steering.power is None else log_p * steering.power[..., None].to(log_p.dtype)


def normalised(log_p: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor]:
    """The law of weighed tokens, and the log of the mass that it holds: [..., V], [..., V] -> [..., V], [...].

    Where that mass is zero, tokens are drawn by their weights alone; where all of these are zero, too, by ``log_p``,
    which does not count: such a text has weight zero.
    """
    inside = log_p + log_w
    mass = torch.logsumexp(inside, -1)
    none = mass[..., None] == -math.inf
    of_weights = torch.logsumexp(log_w, -1, keepdim=True)
    lost = of_weights == -math.inf
    fallback = torch.where(lost, log_p, log_w - torch.where(lost, 0.0, of_weights))
    return torch.where(none, fallback, inside - torch.where(none, 0.0, mass[..., None])), mass


def state_after(steering: Steering, token: Tensor) -> Tensor:
    """The states [R] that tokens [R] lead to; a guide's are the host's to find."""
    if steering.automaton is None:
        return steering.state
    return after_token(steering.automaton, steering.state, token)
