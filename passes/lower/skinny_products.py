"""Linear layers of a few rows go to a kernel of ours on a CPU.

A cycle multiplies N or N*(K+1) rows with every weight: too many for a matrix-vector kernel, too few for the libraries'
products, which reach half the speed of memory there. In bfloat16 on a processor without instructions for it, they
emulate, and are slower still.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

import smc_compile.kernels.skinny_linear  # noqa: F401  (registers the op)
from smc_compile.passes.rewrites import CACHED, new_node, rewrite

# Where the kernel beats ATen: numbers of rows, and the fewest numbers in a weight. Measured on AVX-512 without bf16
# instructions, and on AVX2, which stands for all other processors.
FEWEST = 2 if torch.cpu._is_avx512_supported() else 1
ROWS = {torch.float32: range(FEWEST, 97), torch.bfloat16: range(1, 513)}
SMALLEST = {torch.float32: 2**18, torch.bfloat16: 2**16}
EMULATED = not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@rewrite(torch.ops.aten.linear.default, stage=CACHED)
def skinny_products(node: fx.Node) -> fx.Node:
    return new_node(node, linear, *node.args, **node.kwargs)


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
