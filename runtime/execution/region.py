"""A region: one function, compiled once, timed apart from its compilation."""

from __future__ import annotations

import functools
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch._dynamo.utils import counters

from smc_compile.runtime.execution.admitted_code import admitted_code, with_own_code

P = ParamSpec("P")
T = TypeVar("T")


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
    """The run that this thread is in.

    Within a run, calls of one function whose tensors are laid out alike are alike in all that Dynamo guards.
    """

    id: object = None  # None: in no run


_run = _Run()


def begin_run() -> None:
    """Begin a run in this thread, in place of the one it is in: caches, prompts or rows are others from here on."""
    _run.id = object()


def with_own_run(steps: Callable[P, Iterator[T]]) -> Callable[P, Iterator[T]]:
    """A generator function whose steps share a run that they begin, and leave their caller's run as it was.

    Between two steps the caller may do anything, and a step may call a streamer that generates something else.
    """

    @functools.wraps(steps)
    def apart(*args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        iterator, own = steps(*args, **kwargs), None
        while True:
            outer, _run.id = _run.id, own
            try:
                value = next(iterator)
            except StopIteration:
                return
            finally:
                own, _run.id = _run.id, outer
            yield value

    return apart


def compile_function(function: Callable[..., Any], name: str, compiler: str) -> Callable[..., Any]:
    """``function`` compiled for static shapes in one graph, apart for each number of rows.

    Rows are the first axes of its tensors. Each number has compiled code of its own, so that no count of batch sizes
    meets Dynamo's limit of recompilations.

    Dynamo's guards cost as much as a small layer. Within a run they are checked at the first call with tensors of these
    shapes, strides and dtypes; later such calls run the code that was admitted then (see admitted_code.py). Outside a
    run they are checked at every call.
    """
    compiled: dict[tuple[int, ...], tuple[types.FunctionType, Callable[..., Any]]] = {}
    known = _Known()

    def call(*args: Any) -> Any:
        layouts = tuple([(a.shape, a.stride(), a.dtype) for a in args if isinstance(a, torch.Tensor)])
        if known.run is not _run.id:
            known.run, known.code = _run.id, {}
        if layouts in known.code:
            return known.code[layouts](*args)
        rows = tuple(shape[0] for shape, *_ in layouts if shape)
        if rows not in compiled:
            own = with_own_code(function, name)
            compiled[rows] = own, torch.compile(own, fullgraph=True, dynamic=False, **lowered_by(compiler))
        own, checked = compiled[rows]
        result = checked(*args)
        code = None if _run.id is None else admitted_code(own, args)
        if code is not None:
            known.code[layouts] = code
        return result

    return call


class _Known(threading.local):
    """Code of one function that this thread may call directly, by the layouts of its tensors."""

    def __init__(self) -> None:
        self.run: object = None  # of which run
        self.code: dict[tuple[Any, ...], Callable[..., Any]] = {}


def compiled_apart(function: Callable[..., Any], name: str, compiler: str, whole: bool) -> Callable[..., Any]:
    """What follows a model in its region: left as it is behind a ``whole`` one, with which it is compiled.

    Behind a model that calls compiled pieces it is compiled by itself: around the pieces, Dynamo would look at all
    weights and caches of the region only to come to them.
    """
    return function if whole else compile_function(function, name, compiler)


def lowered_by(compiler: str) -> dict[str, Any]:
    """Arguments of torch.compile: a backend by name, or for "max-autotune" Inductor with products chosen by timing.

    Inductor records no CUDA graphs: sessions record whole cycles themselves.
    """
    if compiler == "max-autotune":
        return {"backend": "inductor", "options": torch._inductor.list_mode_options("max-autotune-no-cudagraphs")}
    return {"backend": compiler}
