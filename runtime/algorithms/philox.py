"""Philox4x32-10, a counter-based random stream written in tensor arithmetic (Salmon, Moraes, Dror and Shaw, SC 2011).

A draw is a function of (request seed, particle, step, purpose) and of nothing else: no state, no global generator. A
seed therefore reproduces a result whatever else is in the batch, on every device and under graph replay.

Words are 32-bit values held in int64 tensors. No product exceeds 2^49, so nothing relies on integer wraparound.
"""

from __future__ import annotations

import torch
from torch import Tensor

Words4 = tuple[Tensor, Tensor, Tensor, Tensor]
Words2 = tuple[Tensor, Tensor]

# What a uniform is for. Draws with different purposes are independent even at the same particle and step.
PROPOSE = 0  # a token from the draft
TARGET = 1  # a token from the target: the first one, the bonus
RESAMPLE = 2  # ancestors
SELECT = 3  # the particle that becomes the answer
SETTLE = 4  # the ancestor of what may no longer change
ACCEPT = 5  # whether a drafted token is accepted
CHAIN = 6  # a token from the draft that may be rejected
REST = 7  # the target's token behind the accepted ones

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # PHILOX_M4x32_0 and _1
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # PHILOX_W32_0 and _1: golden ratio and sqrt(3) - 1
_WORD = 0xFFFFFFFF
_LIMB = 0xFFFF


def multiply_high_low(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of a * b, for a constant a and a tensor b in [0, 2^32)."""
    low = b * (a & _LIMB)  # < 2^48
    high = b * (a >> 16) + (low >> 16)  # a * b = high * 2^16 + low % 2^16; high < 2^49
    return high >> 16, ((high & _LIMB) << 16) | (low & _LIMB)


def philox(counter: Words4, key: Words2) -> Words4:
    """Four random words from a 128-bit counter and a 64-bit key. All int64 in [0, 2^32); shapes broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for r in range(_ROUNDS):
        if r > 0:
            k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
        high0, low0 = multiply_high_low(_MULTIPLIERS[0], c0)
        high1, low1 = multiply_high_low(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


def uniforms(seeds: Tensor, n_particles: int, steps: Tensor, purpose: int | Tensor) -> Tensor:
    """Uniforms in [0, 1), float64 [B, N, T], multiples of 2^-53.

    seeds: [B] int64, any value, negative ones too.  steps: [T] or [B, T] int64 in [0, 2^32).  purpose: one
    for all, or [B].

    Key: the two halves of the seed. Counter: (particle, step, purpose, 0). Hence the value at (seed, particle, step)
    does not depend on B, N or T.
    """
    seeds = seeds[:, None, None]  # [B, 1, 1]
    key = (seeds & _WORD, (seeds >> 32) & _WORD)  # the shift is arithmetic, the mask drops the copies of the sign
    particles = torch.arange(n_particles, device=seeds.device)[None, :, None]  # [1, N, 1]
    steps = (steps & _WORD).view(-1, 1, steps.shape[-1])  # [1 or B, 1, T]
    zero = torch.zeros_like(steps)
    purpose = purpose[:, None, None] if isinstance(purpose, Tensor) else purpose
    x0, x1, _, _ = philox((particles, steps, zero + purpose, zero), key)  # each [B, N, T]
    return ((x0 >> 5) * 2**26 + (x1 >> 6)).to(torch.float64) * 2.0**-53  # 27 + 26 bits
