"""The models that a function can reach."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from smc_compile.program.callables import innermost

_PLAIN = (Tensor, nn.Module, type, types.ModuleType, types.FunctionType)


def reachable_models(function: types.FunctionType, arguments: Iterable[Any]) -> list[nn.Module]:
    """The modules that a function can reach: its arguments, its free variables, the globals that it names.

    Those in the attributes of an argument, such as ``self``, and in a list or a dictionary, are found too.
    """
    function = innermost(function)
    filled = [cell for cell in function.__closure__ or () if cell != types.CellType()]  # an empty one raises when read
    values = [*arguments, *(cell.cell_contents for cell in filled)]
    named = [function.__globals__.get(name) for name in function.__code__.co_names]
    inside = [item for value in [*values, *named] for item in _parts(value)]
    found = [value for value in [*values, *named, *inside] if isinstance(value, nn.Module)]
    return list({id(module): module for module in found}.values())


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, dict):
        return value.values()
    return () if isinstance(value, _PLAIN) else getattr(value, "__dict__", {}).values()
