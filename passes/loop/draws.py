"""Which calls draw random numbers or pick a token."""

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
    """Whether a call draws random numbers. Dropout is not among them: see `refusals.refuse_other_randomness`."""
    return op_name(node) in _RANDOM


def is_draw(node: fx.Node) -> bool:
    """Whether a call may pick a token: it draws random numbers, or the largest of several values."""
    return is_random(node) or _is_argmax(node)


def _is_argmax(node: fx.Node) -> bool:
    if op_name(node) in ("argmax", "argmin"):
        return True
    if op_name(node) != "getitem" or not isinstance(node.args[0], fx.Node):
        return False
    return op_name(node.args[0]) in ("max", "topk", "sort") and bool(node.args[1] == 1)
