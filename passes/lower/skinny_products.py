"""Linear layers of a few rows go to a kernel of their own on a CPU.

A cycle multiplies N or N*(K+1) rows with every weight: too many for a matrix-vector kernel, too few for the libraries'
products, which reach half the speed of memory there. In bfloat16 on a processor without instructions for it, they
emulate, and are slower still.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters

import smc_compile.kernels.skinny_linear  # noqa: F401  (registers the op)
from smc_compile.passes.ir import CachedLM

# Where the kernel beats ATen, measured on AVX-512 without bf16 instructions and on AVX2, for which others are taken
# (smallest weights in numbers).
FEWEST = 2 if torch.cpu._is_avx512_supported() else 1
ROWS = {torch.float32: range(FEWEST, 97), torch.bfloat16: range(1, 513)}
SMALLEST = {torch.float32: 2**18, torch.bfloat16: 2**16}
EMULATED = not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def skinny_linear(cached: CachedLM) -> CachedLM:
    """The same model with its linear layers sent to :func:`linear`."""
    return replace(
        cached, prefill=_rewrite(cached.prefill), score=_rewrite(cached.score), advance=_rewrite(cached.advance)
    )


def _rewrite(module: fx.GraphModule) -> fx.GraphModule:
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            node.target = linear
            counters["smc_compile"]["few_row_products"] += 1
    module.recompile()
    return module


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I], weight [O, I], bias [O] -> [..., O]; rows, type and device are known when a region is compiled."""
    if suits(x, weight):
        return torch.ops.smc_compile.skinny_linear(x, weight, bias)
    return torch.ops.aten.linear.default(x, weight, bias)


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel is the faster one."""
    if x.device.type != "cpu" or x.dtype != weight.dtype or x.dtype not in ROWS:
        return False
    if weight.numel() < SMALLEST[x.dtype] or (x.dtype == torch.bfloat16 and not EMULATED):
        return False
    return x.numel() // x.shape[-1] in ROWS[x.dtype]
