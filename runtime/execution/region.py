"""A region: one function, compiled once, timed apart from its compilation."""

from __future__ import annotations

import threading
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo import eval_frame
from torch._dynamo.utils import counters


class Region:
    """Compiles ``function`` for static shapes (marked dimensions stay symbolic) and keeps two clocks.

    ``whole`` is False for a function that calls compiled pieces itself: it runs as it is.

    Attributes:
        seconds: time spent running.
        compile_seconds: time of the calls that compiled.
        compilations: how many times it was compiled.
    """

    def __init__(self, name: str, function: Callable[..., Any], compiler: str, whole: bool = True) -> None:
        self.name = name
        self.seconds = self.compile_seconds = 0.0
        self.compilations = 0
        self._function = compile_function(function, name, compiler) if whole else function

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


class _Run(threading.local):
    """What a thread is at: within it, arguments that go with tensors of equal layouts are alike too."""

    number: object = None


_run = _Run()


def begin_run() -> None:
    """What is compiled for this thread's calls is looked up anew: types, devices, caches and weights may be others."""
    _run.number = object()


def compile_function(function: Callable[..., Any], name: str, compiler: str) -> Callable[..., Any]:
    """``function`` compiled for static shapes in one graph, apart for each number of rows.

    Rows are the first axes of its tensors. Each number has a Dynamo cache of its own, so that no count of batch sizes
    meets the limit of recompilations. Dynamo's guards cost as much as a small layer: they are checked once a run for
    tensors of equal shapes and strides, after which the code that they admitted is called directly.
    """
    compiled: dict[tuple[int, ...], tuple[types.FunctionType, Callable[..., Any]]] = {}
    known = threading.local()

    def call(*args: Any) -> Any:
        layouts = tuple([(a.shape, a.stride()) for a in args if isinstance(a, torch.Tensor)])
        if getattr(known, "run", known) is not _run.number:  # ``known`` is nobody's run: a thread may begin none
            known.run, known.code = _run.number, {}
        if layouts in known.code:
            return known.code[layouts](*args)
        rows = tuple(shape[0] for shape, _ in layouts if shape)
        if rows not in compiled:
            own = _own_code(function, name)
            compiled[rows] = own, torch.compile(own, fullgraph=True, dynamic=False, **lowered_by(compiler))
        own, checked = compiled[rows]
        result = checked(*args)
        code = _admitted(own) if _run.number is not None else None
        if code is not None:
            known.code[layouts] = code
        return result

    return call


def compiled_apart(function: Callable[..., Any], name: str, compiler: str, whole: bool) -> Callable[..., Any]:
    """What follows a model in its region: it is compiled with the model, or by itself behind one that is not ``whole``:
    Dynamo would look at all weights and caches of the region only to come to the pieces."""
    return function if whole else compile_function(function, name, compiler)


def lowered_by(compiler: str) -> dict[str, Any]:
    """What torch.compile is told: a backend by name, or Inductor with products chosen by timing (sessions record
    graphs themselves)."""
    if compiler == "max-autotune":
        return {"backend": "inductor", "options": torch._inductor.list_mode_options("max-autotune-no-cudagraphs")}
    return {"backend": compiler}


def _admitted(function: types.FunctionType) -> Callable[..., Any] | None:
    """The code that Dynamo's guards chose at the last call of ``function``; None where it ran as it was written."""
    entries = eval_frame._debug_get_cache_entry_list(function.__code__)  # the last used stands first
    if not entries or eval_frame._stance.stance != "default":
        return None
    return types.FunctionType(entries[0].code, function.__globals__, function.__name__, None, function.__closure__)


def _own_code(function: Callable[..., Any], name: str) -> types.FunctionType:
    """A copy with a code object of its own: Dynamo caches by code object, and regions must not share a cache."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=f"smc_{name}")
    copy = types.FunctionType(code, function.__globals__, f"smc_{name}", function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
