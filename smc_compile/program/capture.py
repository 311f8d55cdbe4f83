"""Capture the graph that Dynamo makes of a Python function, without running it."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dynamo.symbolic_convert import InstructionTranslator

from smc_compile.errors import OptionError
from smc_compile.program.loop_finder import LoopFinder


@dataclass(frozen=True)
class CapturedCall:
    """One call of a captured function.

    Attributes:
        finder: holds the graph that Dynamo made of the function. Calls whose graph is the same share it.
        arguments: what Dynamo hands to the graph in this call: tensors, and integers for sizes.
        writes: what Python objects from outside the function is left changed in, by Dynamo's names for them.
    """

    finder: LoopFinder
    arguments: Sequence[Any]
    writes: tuple[str, ...] = ()


class Capture:
    """A function whose graph is captured by one call and whose result is made by a second one.

    Between the two its caller computes what the graph computes, outside of Dynamo. Dynamo's guards decide at every call
    whether an earlier graph still fits: they look at the closures, globals, attributes and constants that the function
    reads. A graph that fits is not traced again.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._traced = torch.compile(_own_code(function), backend=self._backend, fullgraph=True, dynamic=False)
        self._answer = _Answer()

    def captured(self, *args: Any, **kwargs: Any) -> CapturedCall | None:
        """The graph of a call and its arguments; None where there is nothing to compute.

        Code of the function behind the graph, which may write into objects of its caller, does not run.

        Raises:
            Exception: what Dynamo raises for code that it cannot trace, or the function itself while it is traced.
        """
        try:
            with _more_traces():
                self._traced(*args, **kwargs)
        except _Captured as found:
            return found.call
        return None

    def result(self, outputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """What the function returns for arguments that were captured before, with ``outputs`` as those of its graph."""
        with self._answering(outputs):
            return self._traced(*args, **kwargs)

    @contextmanager
    def _answering(self, outputs: Sequence[Any]) -> Iterator[None]:
        self._answer.outputs = outputs
        try:
            yield
        finally:
            self._answer.outputs = None

    def _backend(self, gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        finder, writes = LoopFinder(gm), _writes_outside()

        def stand_in(*arguments: Any) -> Sequence[Any]:
            if self._answer.outputs is None:
                raise _Captured(CapturedCall(finder, arguments, writes))
            return self._answer.outputs

        return stand_in


class _Answer(threading.local):
    """What the graph returns to this thread: calls of other threads are captured meanwhile, or have answers of their
    own."""

    outputs: Sequence[Any] | None = None  # None: the call is captured


class _Captured(Exception):
    """Brings a call's arguments out of the code that Dynamo compiled.

    Returning from there would run the code behind the graph, which writes into attributes and containers of the caller:
    with outputs that nobody has computed yet.
    """

    def __init__(self, call: CapturedCall) -> None:
        super().__init__("captured")
        self.call = call


def _more_traces() -> Any:
    """Inside, Dynamo traces one function for as many lengths and settings as it is asked to."""
    return torch._dynamo.config.patch(recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16)


def _writes_outside() -> tuple[str, ...]:
    """The Python objects that existed before the trace at hand and are left changed by it, by Dynamo's names."""
    found = []
    side_effects = InstructionTranslator.current_tx().output.side_effects
    for variable in side_effects.id_to_variable.values():
        if variable.source is None or not side_effects.is_modified(variable) or variable.is_tensor():
            continue
        written = side_effects.store_attr_mutations.get(variable)
        if written is None or not all(_is_as_before(variable, name, value) for name, value in written.items()):
            found.append(str(variable.source.name))
    return tuple(found)


def _is_as_before(variable: Any, name: str, value: Any) -> bool:
    """Whether an attribute is left with the value that it had: libraries set flags and put them back."""
    held = getattr(variable, "value", None)
    return value.is_python_constant() and getattr(held, name, _own_code) == value.as_python_constant()


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy with code of its own: Dynamo counts recompilations by code, and the function itself is left alone."""
    if not isinstance(function, types.FunctionType):
        raise OptionError("decode compiles a plain Python function", f"got {type(function).__name__}")
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
