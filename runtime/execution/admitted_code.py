"""Compiled code without Dynamo's guards in front of it: the one file that reads private names of Dynamo.

Documented ways to spare guards save less and risk more. Microseconds of a step of a tiny decoder, R = 4 rows
(examples/benchmarks/guard_costs.py: one core of an Intel Xeon, torch 2.13.0, Inductor, 2026-11-29):

                                         2 layers,  12 layers,  24 layers,  other shapes,
                                         one graph   one each    one each   strides, dtypes
    guards at every call                       238       2,077       3,977  compiled again
    set_stance(skip_guard_eval_unsafe),
      set at every call                        231       2,130       4,155  RuntimeError
      set once a run                           217       1,903       3,865  RuntimeError
    guard_filter_fn: no module guards          215       1,958       3,949  compiled again
      tensors' guards only                     199       1,781       3,560  compiled again
      no guards                                184       1,614       3,250  error or wrong result
    admitted code, as ``compile_function``     153       1,355       2,706  compiled again

A stance holds for the whole process, so for the calls of other threads too. A filter holds for good: a guard that it
drops is never checked. Admitted code is called only for tensors that are laid out as those for which all guards held.
tests/runtime/execution/test_admitted_code.py fails where torch changes what the private names mean.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch._dynamo import eval_frame


def admitted_code(function: types.FunctionType, args: Sequence[Any]) -> Callable[..., Any] | None:
    """Compiled code of ``function`` whose guards hold for ``args``, as a function that checks no guards.

    None where there is none, or where a stance of ``torch.compiler.set_stance`` decides what runs.
    """
    if eval_frame._stance.stance != "default":
        return None
    entries = eval_frame._debug_get_cache_entry_list(function.__code__)
    seen = _locals(function, args) if entries else {}
    code = next((entry.code for entry in entries if entry.guard_manager.check(seen)), None)
    if code is None:
        return None
    return types.FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)


def _locals(function: types.FunctionType, args: Sequence[Any]) -> dict[str, Any]:
    """Local variables of a call by name, which guards read: arguments and what the function closes over."""
    bound = inspect.signature(function).bind(*args)
    bound.apply_defaults()
    return {**inspect.getclosurevars(function).nonlocals, **bound.arguments}


def with_own_code(function: Callable[..., Any], name: str) -> types.FunctionType:
    """A copy whose code object is its own: Dynamo keeps compiled code by code object, and regions must not share it."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=f"smc_{name}")
    copy = types.FunctionType(code, function.__globals__, f"smc_{name}", function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
