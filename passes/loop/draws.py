"""TODO."""

from __future__ import annotations

from torch import fx

from smc_compile.passes.fx_tools import op_name

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
