"""What a machine allows: how fast it reads and multiplies, measured on the spot, and what a cycle costs at best.

A pass of a model reads its weights and its cache once and multiplies every row with every weight; it takes at least as
long as the slower of the two (the roofline model: Williams, Waterman and Patterson, 2009).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from smc_compile.auto.timers import best_seconds
from smc_compile.passes.lower.skinny_products import linear

READ = {"cpu": 2**28, "cuda": 2**31}  # bytes read in one measurement: more than any cache holds
# A product of so many rows with a square weight of such a side: long beside its launch.
PRODUCT = {"cpu": (512, 2048), "cuda": (4096, 8192)}


@dataclass(frozen=True)
class Ceilings:
    """Rates of a device."""

    bytes_per_second: float
    operations_per_second: float

    def better(self, other: Ceilings) -> Ceilings:
        """The higher of each rate: a rate that was reached once is possible."""
        return Ceilings(
            max(self.bytes_per_second, other.bytes_per_second),
            max(self.operations_per_second, other.operations_per_second),
        )


@dataclass(frozen=True)
class ModelSize:
    """The size of a model: numbers in its weights, bytes of a number, bytes that a token takes in its cache."""

    weights: int
    itemsize: int
    cache_bytes_per_token: int


def measure_ceilings(dtype: torch.dtype, device: torch.device) -> Ceilings:
    """The best of several rounds. A narrow type that the device multiplies more slowly than float32 can be widened."""
    product = min(product_seconds(kind, device) for kind in {dtype, torch.float32})
    height, side = PRODUCT[device.type]
    return Ceilings(READ[device.type] / reading_seconds(device), 2 * height * side * side / product)


def reading_seconds(device: torch.device) -> float:
    """Seconds to read READ bytes once: the fastest of a sum, a product with one row, and a product with two."""
    side = PRODUCT[device.type][1]
    values = torch.ones(READ[device.type] // (4 * side), side, device=device)
    row, rows = torch.ones(1, side, device=device), torch.ones(2, side, device=device)
    ways = (values.sum, lambda: nn.functional.linear(row, values), lambda: linear(rows, values))
    return min(best_seconds(way, device) for way in ways)


def product_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of a product of PRODUCT's size in ``dtype``."""
    height, side = PRODUCT[device.type]
    rows, weight = (
        torch.ones(height, side, dtype=dtype, device=device),
        torch.ones(side, side, dtype=dtype, device=device),
    )
    return best_seconds(lambda: rows @ weight.t(), device)


def costs(model: nn.Module, cache_numbers_per_token: int) -> ModelSize:
    """Counted from the model's matrices; every row is multiplied with each, so an embedding must be the head too."""
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    itemsize = matrices[0].itemsize
    return ModelSize(sum(weight.numel() for weight in matrices), itemsize, cache_numbers_per_token * itemsize)


@dataclass(frozen=True)
class PassCost:
    """What one pass of a model reads and multiplies."""

    bytes: float
    operations: float


def model_pass(model: ModelSize, rows: int, cached_tokens: float) -> PassCost:
    """``rows`` rows through the weights, which read ``cached_tokens`` entries of the cache."""
    read = model.weights * model.itemsize + cached_tokens * model.cache_bytes_per_token
    return PassCost(read, 2 * model.weights * rows)


def least_seconds(ceilings: Ceilings, passes: Sequence[PassCost]) -> float:
    """Each pass takes at least the longer of its reading and its multiplying."""
    return sum(
        max(one.bytes / ceilings.bytes_per_second, one.operations / ceilings.operations_per_second) for one in passes
    )


def bandwidth_share(ceilings: Ceilings, passes: Sequence[PassCost], seconds: float) -> float:
    """Bytes read in ``seconds`` beside what the device could have read."""
    return sum(one.bytes for one in passes) / (seconds * ceilings.bytes_per_second)


def arithmetic_share(ceilings: Ceilings, passes: Sequence[PassCost], seconds: float) -> float:
    """Operations done in ``seconds`` beside what the device could have done."""
    return sum(one.operations for one in passes) / (seconds * ceilings.operations_per_second)


def loop_passes(target: ModelSize, prompt: int, new_tokens: int) -> list[PassCost]:
    """A token of a one-token loop, at half of its length."""
    return [model_pass(target, 1, prompt + new_tokens / 2)]


def cycle_passes(
    target: ModelSize, draft: ModelSize, particles: int, lookahead: int, prompt: int, new_tokens: int
) -> list[PassCost]:
    """A cycle of N particles and K draft tokens, at half of its length: the prompt's cache is read once.

    The first draft pass has two rows a particle: the last drafted token and the bonus.
    """
    cached = prompt + particles * new_tokens / 2
    head = model_pass(draft, 2 * particles, cached)
    steps = [model_pass(draft, particles, cached)] * (lookahead - 1)
    return [head, *steps, model_pass(target, particles * (lookahead + 1), cached)]
