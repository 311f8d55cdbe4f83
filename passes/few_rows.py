"""Products of a few rows with a large weight on a CPU, where the library that ATen picks is far from the fastest.

A cycle multiplies N or N*(K+1) rows with every weight: too many for a matrix-vector kernel, too few for ATen's float32
products, which oneDNN beats there. In bfloat16 on a processor without instructions for it, ATen emulates; widening a
block of the weight that fits in the cache and multiplying in float32 takes less than half the time.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters

from smc_compile.passes.ir import CachedLM

FEWEST, MOST = 4, 512  # rows; with fewer the weight is read once and reading it is all that counts
SMALLEST = 2**20  # numbers in a weight; the call costs about ten microseconds more than ATen's own
BLOCK = 256  # rows of a weight that are widened at once


def few_rows(cached: CachedLM) -> CachedLM:
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
    rows = x.numel() // x.shape[-1]
    if x.device.type == "cpu" and x.dtype == weight.dtype and weight.numel() >= SMALLEST and FEWEST <= rows <= MOST:
        if x.dtype == torch.float32 and ONEDNN:
            return torch.ops.smc_compile.few_rows(x, weight, bias)
        if x.dtype == torch.bfloat16 and EMULATED:
            return torch.ops.smc_compile.few_rows_widened(x, weight, bias)
    return torch.ops.aten.linear.default(x, weight, bias)


# Inductor has a lowering of the oneDNN op, but for constant weights only: ours are inputs. Hence two opaque ops.
ONEDNN = torch.backends.mkldnn.is_available()
EMULATED = not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
_library = torch.library.Library("smc_compile", "DEF")
_library.define("few_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.define("few_rows_widened(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _few_rows_widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Sums in float32, rounded once: closer to the exact product than ATen's, never further."""
    rows = x.reshape(-1, x.shape[-1]).float()  # [R, I]
    out = rows.new_empty(rows.shape[0], weight.shape[0])  # [R, O]
    wide = rows.new_empty(min(BLOCK, weight.shape[0]), weight.shape[1])
    for start in range(0, weight.shape[0], BLOCK):
        block = weight[start : start + BLOCK]
        torch.mm(rows, wide[: len(block)].copy_(block).t(), out=out[:, start : start + BLOCK])
    if bias is not None:
        out += bias
    return out.to(x.dtype).view(*x.shape[:-1], -1)


def _shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


for _name, _kernel in (("few_rows", _few_rows), ("few_rows_widened", _few_rows_widened)):
    _library.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"smc_compile::{_name}", _shape, lib=_library)
