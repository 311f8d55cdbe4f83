"""Callables that hold a decode loop, as a plain function and what is bound to it."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from smc_compile.errors import OptionError


@dataclass(frozen=True)
class BoundFunction:
    """A plain function with the arguments that a method, a partial or an object brings along."""

    function: types.FunctionType
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
        """All arguments of a call, defaults filled in.

        Raises:
            TypeError: they do not fit the function.
        """
        bound = inspect.signature(self.function).bind(*self.args, *args, **{**dict(self.kwargs), **kwargs})
        bound.apply_defaults()
        return bound


def bound_function(thing: Callable[..., Any]) -> BoundFunction:
    """The plain function behind a function, method, static method, class method, partial, module or callable object.

    Raises:
        OptionError: there is none, or it is a generator or a coroutine.
    """
    if isinstance(thing, functools.partial):
        inner = bound_function(thing.func)
        return BoundFunction(
            inner.function, (*inner.args, *thing.args), (*inner.kwargs, *thing.keywords.items())
        )  # fmt: skip
    if isinstance(thing, staticmethod):
        return bound_function(thing.__func__)
    if isinstance(thing, types.MethodType):
        inner = bound_function(thing.__func__)
        return BoundFunction(inner.function, (thing.__self__, *inner.args), inner.kwargs)
    if isinstance(thing, types.FunctionType):
        _refuse_suspended(thing)
        return BoundFunction(thing)
    if isinstance(thing, nn.Module):
        return bound_function(thing.forward)
    called = inspect.getattr_static(type(thing), "__call__", None)
    if isinstance(called, types.FunctionType) and not isinstance(thing, type):
        return bound_function(types.MethodType(called, thing))
    raise OptionError(
        "decode compiles a Python function",
        f"got {type(thing).__name__}, behind which there is none",
        "pass a function, a method, a functools.partial or an object whose class defines __call__",
    )


def _refuse_suspended(function: types.FunctionType) -> None:
    if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
        kind = "generator" if inspect.isgeneratorfunction(function) else "coroutine"
        raise OptionError(
            f"decode cannot compile a {kind} function",
            f"{function.__name__} hands out tokens while it runs",
            "collect the tokens and return them; generate(..., streamer=...) hands them out as they settle",
        )


# ---- decorators -----------------------------------------------------------------------------------------------------


def wrapped(function: types.FunctionType) -> types.FunctionType | None:
    """The function that a decorator has wrapped and calls: ``torch.no_grad()`` and all that keep ``__wrapped__``."""
    inner = getattr(function, "__wrapped__", None)
    held = any(cell.cell_contents is inner for cell in cells_of(function).values())
    return inner if isinstance(inner, types.FunctionType) and held else None


def innermost(function: types.FunctionType) -> types.FunctionType:
    """The function below all decorators."""
    inner = wrapped(function)
    return function if inner is None else innermost(inner)


def cells_of(function: types.FunctionType) -> dict[str, types.CellType]:
    """The free variables of a function that have values."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell for name, cell in cells if cell != types.CellType()}


def function_like(
    function: types.FunctionType, code: types.CodeType, closure: tuple[types.CellType, ...]
) -> types.FunctionType:
    """A function with another code and closure."""
    made = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    if hasattr(function, "__wrapped__"):
        held = [cell.cell_contents for cell in closure if cell != types.CellType()]
        made.__wrapped__ = next((f for f in held if isinstance(f, types.FunctionType)), function.__wrapped__)  # type: ignore[attr-defined]
    return made


def own_code(function: types.FunctionType) -> types.FunctionType:
    """A copy with code of its own: Dynamo counts recompilations by code, and the function itself is left alone."""
    inner, closure = wrapped(function), function.__closure__ or ()
    if inner is None:
        return function_like(function, function.__code__.replace(), closure)
    own = own_code(inner)
    closure = tuple(types.CellType(own) if cell.cell_contents is inner else cell for cell in closure)
    # All functions of torch's own files share one code when they are compiled.
    return function_like(function, function.__code__.replace(co_filename=own.__code__.co_filename), closure)
