"""What ops do, by name: which create, copy, look up, draw or write in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

TOKEN_DTYPES = (torch.int64, torch.int32)


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a node's tensor: its concrete shape, its dtype, and which storage it lives in."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: int

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


def tensor_info(node: fx.Node) -> TensorInfo | None:
    return node.meta.get("tensor")


def plain_tensor(value: Any) -> torch.Tensor | None:
    """A tensor that holds real data (neither fake nor meta), else None."""
    is_plain = isinstance(value, torch.Tensor) and type(value) in (torch.Tensor, torch.nn.Parameter)
    return value if is_plain and value.device.type != "meta" else None


def op_name(node: fx.Node) -> str:
    """``cat`` for torch.cat and Tensor.cat alike; '' for nodes that are not calls."""
    if node.op == "call_method":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[-1]
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", node.target))
    return ""


_INPLACE_OPERATORS = frozenset(
    ["setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ior", "iand", "ixor", "ipow", "imod", "imatmul"]
)


_INPLACE_FLAG = frozenset(["relu", "silu", "relu6", "leaky_relu", "elu", "mish", "dropout", "hardswish", "threshold"])


def mutated_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs that a call writes to."""
    if node.op not in ("call_function", "call_method"):
        return []
    written = []
    if isinstance(node.target, torch._ops.OpOverload):
        pairs = zip(node.target._schema.arguments, node.args, strict=False)
        return [arg for spec, arg in pairs if spec.is_write and isinstance(arg, fx.Node)]
    name = op_name(node)
    inplace = name in _INPLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
    flagged = node.kwargs.get("inplace") is True or (name in _INPLACE_FLAG and node.args[-1:] == (True,))
    if (inplace or flagged) and node.args and isinstance(node.args[0], fx.Node):
        written.append(node.args[0])
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        written.append(out)
    return written


# Operators that move cells. The set holds the positions (or names) of arguments that say *where*, which must be known.
_WHERE_NAMES = frozenset(["index", "indices", "mask", "condition", "dim", "start", "length"])


LOOKUPS = frozenset(["index_select", "gather", "take_along_dim", "getitem"])


_CASTS = frozenset(["to", "long", "int", "type", "type_as", "cuda", "cpu"])


_CREATES = frozenset(
    f"{prefix}{name}{suffix}"
    for name in ("zeros", "ones", "full", "empty", "arange", "tensor", "as_tensor", "scalar_tensor")
    for prefix, suffix in (("", ""), ("new_", ""), ("", "_like"))
)


_FILLED_IN_PLACE = ("bernoulli", "cauchy", "exponential", "geometric", "log_normal", "normal", "random", "uniform")


_RANDOM = frozenset(
    {"multinomial", "rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm"}
    | {"poisson", "gumbel_softmax", "bernoulli", "normal"}
    | {f"{name}_" for name in _FILLED_IN_PLACE}
)


def is_random(node: fx.Node) -> bool:
    """True for calls that draw random numbers (active dropout is told apart by the caller)."""
    return op_name(node) in _RANDOM


def is_draw(node: fx.Node) -> bool:
    """True for calls that may pick a token."""
    return is_random(node) or _is_argmax(node)


def _is_argmax(node: fx.Node) -> bool:
    if op_name(node) in ("argmax", "argmin"):
        return True
    if op_name(node) != "getitem" or not isinstance(node.args[0], fx.Node):
        return False
    return op_name(node.args[0]) in ("max", "topk", "sort") and bool(node.args[1] == 1)
