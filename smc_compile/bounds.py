"""What a machine allows: how fast it reads and multiplies, measured on the spot, and what a cycle costs at best.

A pass of a model reads its weights and its cache once and multiplies every row with every weight; it takes at least as
long as the slower of the two (the roofline model: Williams, Waterman and Patterson, 2009).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

READ = 2**28  # bytes read in one measurement: more than any cache holds
ROWS, SIDE = 512, 2048  # a product of so many rows with a square weight
ROUNDS = 5


@dataclass(frozen=True)
class Ceilings:
    """Rates of a device."""

    bytes_per_second: float
    operations_per_second: float

    def better(self, other: Ceilings) -> Ceilings:
        """The higher of each rate: what has been reached once is possible."""
        return Ceilings(
            max(self.bytes_per_second, other.bytes_per_second),
            max(self.operations_per_second, other.operations_per_second),
        )


@dataclass(frozen=True)
class Costs:
    """One model: numbers in its weights, bytes of one number, bytes of its cache for a token."""

    weights: int
    itemsize: int
    cache_bytes_per_token: int


def measure_ceilings(dtype: torch.dtype, device: torch.device) -> Ceilings:
    """The best of several rounds. A narrow type that the device multiplies more slowly than float32 can be widened."""
    values = torch.ones(READ // 4, device=device)
    product = min(product_seconds(kind, device) for kind in {dtype, torch.float32})
    return Ceilings(READ / best_seconds(values.sum, device), 2 * ROWS * SIDE * SIDE / product)


def product_seconds(dtype: torch.dtype, device: torch.device) -> float:
    rows, weight = (
        torch.ones(ROWS, SIDE, dtype=dtype, device=device),
        torch.ones(SIDE, SIDE, dtype=dtype, device=device),
    )
    return best_seconds(lambda: rows @ weight.t(), device)


def best_seconds(function: Callable[[], object], device: torch.device, rounds: int = ROUNDS) -> float:
    """Least wall-clock of a few calls after one that warms up."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def costs(model: nn.Module, cache_numbers_per_token: int) -> Costs:
    """Counted from the model's matrices; every row is multiplied with each, so an embedding must be the head too."""
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    itemsize = matrices[0].itemsize
    return Costs(sum(weight.numel() for weight in matrices), itemsize, cache_numbers_per_token * itemsize)


def pass_seconds(ceilings: Ceilings, model: Costs, rows: int, cached_tokens: float) -> float:
    """At best, for ``rows`` rows that read ``cached_tokens`` entries of the cache."""
    read = model.weights * model.itemsize + cached_tokens * model.cache_bytes_per_token
    return max(read / ceilings.bytes_per_second, 2 * model.weights * rows / ceilings.operations_per_second)


def loop_bound(ceilings: Ceilings, target: Costs, prompt: int, new_tokens: int) -> float:
    """Seconds a token of a one-token loop, at half of its length."""
    return pass_seconds(ceilings, target, 1, prompt + new_tokens / 2)


def cycle_bound(
    ceilings: Ceilings, target: Costs, draft: Costs, particles: int, lookahead: int, prompt: int, new_tokens: int
) -> float:
    """Seconds a cycle of N particles and K draft tokens, at half of its length: the prompt's cache is read once.

    The first draft pass has two rows a particle: the last drafted token and the bonus.
    """
    cached = prompt + particles * new_tokens / 2
    head = pass_seconds(ceilings, draft, 2 * particles, cached)
    steps = (lookahead - 1) * pass_seconds(ceilings, draft, particles, cached)
    return head + steps + pass_seconds(ceilings, target, particles * (lookahead + 1), cached)
