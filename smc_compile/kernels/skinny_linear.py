"""``smc_compile::skinny_linear``: products of a few rows with a large weight on a CPU (skinny_linear.cpp).

Its twin is ``aten.linear``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smc_compile.kernels.cpp_kernel import cpp_kernel

SIGNATURE = ("const NUMBER*", "const NUMBER*", "const NUMBER*", "NUMBER*", *["int64_t"] * 5)

_library = torch.library.Library("smc_compile", "FRAGMENT")
_library.define("skinny_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def _skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., I], weight [O, I], bias [O] -> [..., O]. Sums are float32, rounded once."""
    kernel = cpp_kernel("skinny_linear", SIGNATURE, x.dtype)
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


_library.impl("skinny_linear", _skinny_linear, "CPU")
torch.library.register_fake("smc_compile::skinny_linear", _shape, lib=_library)

# The op in tensor code, for devices without a kernel.
IN_TENSOR_CODE = {torch.ops.smc_compile.skinny_linear.default: torch.ops.aten.linear.default}
