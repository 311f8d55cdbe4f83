"""A ``torch.Generator`` that a decode loop draws with: its state is the seed of the generation.

The loop itself then draws with it as often as it would (see ``forced_run``), so that another call finds another state.
"""

from __future__ import annotations

import hashlib
import inspect
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from smc_compile.errors import LoopError
from smc_compile.options import Options


def with_generator(options: Options, function: Callable[..., Any], bound: inspect.BoundArguments) -> Options:
    """The options with a seed from the generator that the function is given, if it is given one and no seed.

    Raises:
        LoopError: it is given several.
    """
    if options.seed is not None:
        return options
    given = {id(value): value for value in _reachable(function, bound) if isinstance(value, torch.Generator)}
    if len(given) > 1:
        raise LoopError(
            "The decode loop is given several generators.",
            f"{len(given)} of them are arguments or names of the function, and which one draws is not read",
            "give it one, or pass seed=0 as an option",
        )
    return replace(options, seed=_seed(*given.values())) if given else options


def _reachable(function: Callable[..., Any], bound: inspect.BoundArguments) -> list[Any]:
    values = list(bound.arguments.values())
    if isinstance(function, types.FunctionType):
        cells = [cell for cell in function.__closure__ or () if cell != types.CellType()]
        values += [cell.cell_contents for cell in cells]
        values += [function.__globals__.get(name) for name in function.__code__.co_names]
    return values


def _seed(generator: torch.Generator) -> int:
    """64 bits from the generator's state."""
    state = bytes(generator.get_state().tolist())
    return int.from_bytes(hashlib.blake2b(state, digest_size=8).digest(), "little", signed=True)
