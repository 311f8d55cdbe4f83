"""CUDA's mathematical library for Triton's interpreter, which has none: the functions that Inductor uses, by NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

# Functions of floating numbers. A function that is missing raises by its name, which the table shows.
FLOATING: dict[str, Callable[..., Any]] = {
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "log2": np.log2,
    "log10": np.log10,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "tanh": np.tanh,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "atan": np.arctan,
    "erf": np.vectorize(math.erf, otypes=[np.float64]),
    "pow": np.power,
    "fmod": np.fmod,
    "floor": np.floor,
    "ceil": np.ceil,
    "trunc": np.trunc,
    "nearbyint": np.rint,
    "rint": np.rint,
    "abs": np.abs,
    "copysign": np.copysign,
    "hypot": np.hypot,
}
LOGICAL: dict[str, Callable[..., Any]] = {"isnan": np.isnan, "isinf": np.isinf, "signbit": np.signbit}


def install(libdevice: Any) -> None:
    """Put them in the place of the stubs of the module ``libdevice``, in a process that only interprets."""
    for name in [name for name, value in vars(libdevice).items() if callable(value)]:
        setattr(libdevice, name, _interpreted(name))


def _interpreted(name: str) -> Callable[..., Any]:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, interpreter_semantic

    function = FLOATING.get(name) or LOGICAL.get(name)

    def call(*arguments: Any) -> Any:
        if function is None:
            raise NotImplementedError(f"libdevice.{name} is not among the functions that are interpreted")
        tensors = [interpreter_semantic.to_tensor(a) for a in arguments]
        kind = tensors[0].type
        with np.errstate(all="ignore"):
            value = function(*(t.handle.data for t in tensors))
        if name in LOGICAL:
            kind = tl.block_type(tl.int32, list(kind.shape)) if kind.is_block() else tl.int32
            return tl.tensor(TensorHandle(value.astype(np.int32), tl.int32), kind)
        return tl.tensor(TensorHandle(value.astype(tensors[0].handle.data.dtype), kind.scalar), kind)

    return call
