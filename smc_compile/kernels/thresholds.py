"""The thresholds of top-k and top-p, without sorting: ops on a CPU (thresholds.cpp), else bisection in tensor code.

Their twins sort. Tokens exactly as likely as the last one kept are kept too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from smc_compile.kernels.cpp_kernel import cpp_kernel

TYPES = (torch.float32, torch.float64)  # the kernel reads their bits
SIGNATURE = ("const NUMBER*", "const NUMBER*", "NUMBER*", *["int64_t"] * 4)

_library = torch.library.Library("smc_compile", "FRAGMENT")
_library.define("kth_largest(Tensor scores, Tensor k) -> Tensor")
_library.define("least_of_mass(Tensor probs, Tensor p) -> Tensor")


def kth_largest(scores: Tensor, k: Tensor) -> Tensor:
    """The k-th largest of each row, k clamped to 1 .. V: [R, V], [R, 1] -> [R, 1]."""
    return (torch.ops.smc_compile.kth_largest if scores.is_cpu else kth_by_bisection)(scores, k)


def least_of_mass(probs: Tensor, p: Tensor) -> Tensor:
    """The least probability among the fewest likeliest that hold ``p`` of the mass: [R, V], [R, 1] -> [R, 1]."""
    return (torch.ops.smc_compile.least_of_mass if probs.is_cpu else mass_by_bisection)(probs, p)


def kth_by_bisection(scores: Tensor, k: Tensor) -> Tensor:
    """``kth_largest`` in tensor code, float32 or float64; exact."""
    k = k.to(torch.int64).clamp(1, scores.shape[-1])
    keys = _keys(scores)
    return _numbers(_bisect(keys, lambda key: (keys >= key).sum(-1, keepdim=True) >= k), scores.dtype)


def mass_by_bisection(probs: Tensor, p: Tensor) -> Tensor:
    """``least_of_mass`` in tensor code, float32 or float64; exact up to the rounding of the sum."""
    rest = (1 - p).to(probs.dtype)
    keys = _keys(probs)
    least = _bisect(keys, lambda key: torch.where(keys < key, probs, 0.0).sum(-1, keepdim=True) <= rest)
    return _numbers(torch.minimum(least, keys.amax(-1, keepdim=True)), probs.dtype)  # the likeliest stays


def _keys(numbers: Tensor) -> Tensor:
    """Integers of the same width, in the order of the numbers."""
    integer = torch.int32 if numbers.dtype == torch.float32 else torch.int64
    return _ordered(numbers.contiguous().view(integer))


def _numbers(keys: Tensor, dtype: torch.dtype) -> Tensor:
    return _ordered(keys).view(dtype)


def _ordered(bits: Tensor) -> Tensor:
    """Bit patterns with the order of negative numbers reversed. It is its own inverse."""
    return bits ^ ((bits >> (8 * bits.dtype.itemsize - 1)) & torch.iinfo(bits.dtype).max)


def _bisect(keys: Tensor, holds: Callable[[Tensor], Tensor]) -> Tensor:
    """The largest key [R, 1] that ``holds``, a condition that holds for all keys up to some one.

    Each pass over the row decides two bits of the key.
    """
    found = torch.full_like(keys[..., :1], torch.iinfo(keys.dtype).min)
    for low_bit in range(8 * keys.dtype.itemsize - 2, -1, -2):
        first = found + (1 << low_bit)
        second = first + (1 << low_bit)
        third = second + (1 << low_bit)
        lower = torch.where(holds(first), first, found)
        found = torch.where(holds(third), third, torch.where(holds(second), second, lower))
    return found


def kth_by_sorting(scores: Tensor, k: Tensor) -> Tensor:
    ordered = scores.sort(-1, descending=True).values
    return ordered.gather(-1, (k.to(torch.int64) - 1).clamp(0, scores.shape[-1] - 1))


def mass_by_sorting(probs: Tensor, p: Tensor) -> Tensor:
    ordered = probs.sort(-1).values
    cut = (ordered.cumsum(-1) <= (1 - p).to(probs.dtype)).sum(-1, keepdim=True)
    return ordered.gather(-1, cut.clamp(max=probs.shape[-1] - 1))  # the likeliest stays


def _on_cpu(rows: Tensor, at: Tensor, mass: bool) -> Tensor:
    kernel = cpp_kernel("thresholds", SIGNATURE, rows.dtype) if rows.dtype in TYPES else None
    if kernel is None:
        return (mass_by_sorting if mass else kth_by_sorting)(rows, at)
    rows, at = rows.contiguous(), at.to(rows.dtype).expand(*rows.shape[:-1], 1).contiguous()
    out = torch.empty_like(at)
    kernel(rows, at, out, at.numel(), rows.shape[-1], mass, torch.get_num_threads())
    return out


def _shape(rows: Tensor, at: Tensor) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], 1)


for _name, _mass in (("kth_largest", False), ("least_of_mass", True)):
    _library.impl(_name, lambda rows, at, mass=_mass: _on_cpu(rows, at, mass), "CPU")
    torch.library.register_fake(f"smc_compile::{_name}", _shape, lib=_library)

# Each op in tensor code, for devices without a kernel.
IN_TENSOR_CODE = {
    torch.ops.smc_compile.kth_largest.default: kth_by_bisection,
    torch.ops.smc_compile.least_of_mass.default: mass_by_bisection,
}
