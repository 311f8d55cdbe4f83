"""A region: one function, compiled once, timed apart from its compilation."""

from __future__ import annotations

import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.utils import counters


class Region:
    """Compiles ``function`` for static shapes (marked dimensions stay symbolic) and keeps two clocks.

    ``whole`` is False for a function that calls compiled pieces itself: only what is around them is compiled here.

    Attributes:
        seconds: time spent running.
        compile_seconds: time of the calls that compiled.
        compilations: how many times it was compiled.
    """

    def __init__(self, name: str, function: Callable[..., Any], compiler: str, whole: bool = True) -> None:
        self.name = name
        self.seconds = self.compile_seconds = 0.0
        self.compilations = 0
        self._function = compile_function(function, name, compiler, whole)

    def __call__(self, *args: Any) -> Any:
        before = counters["stats"]["unique_graphs"]
        start = time.perf_counter()
        result = self._function(*args)
        elapsed = time.perf_counter() - start
        if counters["stats"]["unique_graphs"] != before:
            self.compilations += 1
            self.compile_seconds += elapsed
        else:
            self.seconds += elapsed
        return result


def compile_function(function: Callable[..., Any], name: str, compiler: str, whole: bool = True) -> Callable[..., Any]:
    """``function`` compiled for static shapes, apart for each number of rows; ``whole`` forbids graph breaks.

    Rows are the first axes of its tensors. Each number has a Dynamo cache of its own, so that no count of batch sizes
    meets the limit of recompilations.
    """
    compiled: dict[tuple[int, ...], Callable[..., Any]] = {}

    def call(*args: Any) -> Any:
        rows = tuple(a.shape[0] for a in args if isinstance(a, torch.Tensor) and a.dim())
        if rows not in compiled:
            own = _own_code(function, name)
            compiled[rows] = torch.compile(own, backend=compiler, fullgraph=whole, dynamic=False)
        return compiled[rows](*args)

    return call


def _own_code(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A copy with a code object of its own: Dynamo caches by code object, and regions must not share a cache."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=f"smc_{name}")
    copy = types.FunctionType(code, function.__globals__, f"smc_{name}", function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def mark_dynamic(tensor: torch.Tensor, *dims: int) -> torch.Tensor:
    """Let these dimensions vary without recompilation."""
    for dim in dims:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return tensor
