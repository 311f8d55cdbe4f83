"""Where top-k and top-p cut the rows of a vocabulary, as ops: on a CPU without sorting (thresholds.cpp).

Their twins sort. Tokens exactly as likely as the last one kept are kept too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cpp_kernel import cpp_kernel

TYPES = (torch.float32, torch.float64)  # the kernel reads their bits
SIGNATURE = ("const NUMBER*", "const NUMBER*", "NUMBER*", *["int64_t"] * 4)

_library = torch.library.Library("smc_compile", "FRAGMENT")
_library.define("kth_largest(Tensor scores, Tensor k) -> Tensor")
_library.define("least_of_mass(Tensor probs, Tensor p) -> Tensor")


def kth_largest(scores: Tensor, k: Tensor) -> Tensor:
    """The k-th largest of each row, k clamped to 1 .. V: [R, V], [R, 1] -> [R, 1]."""
    return torch.ops.smc_compile.kth_largest(scores, k)


def least_of_mass(probs: Tensor, p: Tensor) -> Tensor:
    """The least probability among the fewest likeliest that hold ``p`` of the mass: [R, V], [R, 1] -> [R, 1]."""
    return torch.ops.smc_compile.least_of_mass(probs, p)


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


for _name, _mass, _twin in (("kth_largest", False, kth_by_sorting), ("least_of_mass", True, mass_by_sorting)):
    _library.impl(_name, lambda rows, at, mass=_mass: _on_cpu(rows, at, mass), "CPU")
    _library.impl(_name, _twin, "CUDA")
    torch.library.register_fake(f"smc_compile::{_name}", _shape, lib=_library)
