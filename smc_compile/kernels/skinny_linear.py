"""``smc_compile::few_rows``: products of a few rows with a large weight on a CPU (few_rows.cpp), as an op.

Its twin is ``aten.linear``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smc_compile.kernels.cpp_kernel import cpp_kernel

SIGNATURE = ("const NUMBER*", "const NUMBER*", "const NUMBER*", "NUMBER*", *["int64_t"] * 5)

_library = torch.library.Library("smc_compile", "FRAGMENT")
_library.define("few_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., I], weight [O, I], bias [O] -> [..., O]; sums are float32, rounded once."""
    kernel = cpp_kernel("few_rows", SIGNATURE, x.dtype)
    if kernel is None:
        return torch.ops.aten.linear.default(x, weight, bias)
    x, weight = x.contiguous(), weight.contiguous()
    outputs, inputs = weight.shape
    out = x.new_empty(*x.shape[:-1], outputs)
    given = weight if bias is None else bias.contiguous()
    kernel(x, weight, given, out, x.numel() // inputs, inputs, outputs, bias is not None, torch.get_num_threads())
    return out


def _shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_library.impl("few_rows", _few_rows, "CPU")
torch.library.register_fake("smc_compile::few_rows", _shape, lib=_library)

# What the op is in tensor code, for a device that has no kernel for it.
IN_TENSOR_CODE = {torch.ops.smc_compile.few_rows.default: torch.ops.aten.linear.default}
