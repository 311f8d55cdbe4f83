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

from smc_compile.program.callables import own_code
from smc_compile.program.forced_run import models_as_they_are
from smc_compile.program.loop_finder import LoopFinder


@dataclass(frozen=True)
class CapturedCall:
    """One call of a captured function.

    Attributes:
        finder: holds the graph that Dynamo made of the function. Calls whose graph is the same share it.
        arguments: what Dynamo hands to the graph in this call: tensors, and integers for sizes.
    """

    finder: LoopFinder
    arguments: Sequence[Any]


class Capture:
    """A function whose graph is captured by one call and whose result is made by a second one.

    Between the two its caller computes what the graph computes, outside of Dynamo. Dynamo's guards decide at every call
    whether an earlier graph still fits: they look at the closures, globals, attributes and constants that the function
    reads. A graph that fits is not traced again.
    """

    def __init__(self, function: types.FunctionType, tokens_only: bool = False) -> None:
        """With ``tokens_only`` the loop's outputs are not looked at: see ``LoopFinder``."""
        self._tokens_only = tokens_only
        self._traced = torch.compile(own_code(function), backend=self._backend, fullgraph=True, dynamic=False)
        self._answer = _Answer()

    def captured(self, *args: Any, **kwargs: Any) -> CapturedCall | None:
        """The graph of a call and its arguments; None where there is nothing to compute.

        Code of the function behind the graph, which may write into objects of its caller, does not run.

        Raises:
            Exception: what Dynamo raises for code that it cannot trace, or the function itself while it is traced.
        """
        try:
            with models_as_they_are():
                self._traced(*args, **kwargs)
        except _Captured as found:
            return found.call
        return None

    def result(self, outputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """What the function returns for arguments that were captured before, with ``outputs`` as those of its graph."""
        with self._answering(outputs), models_as_they_are():
            return self._traced(*args, **kwargs)

    @contextmanager
    def _answering(self, outputs: Sequence[Any]) -> Iterator[None]:
        self._answer.outputs = outputs
        try:
            yield
        finally:
            self._answer.outputs = None

    def _backend(self, gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        finder = LoopFinder(gm, self._tokens_only)

        def stand_in(*arguments: Any) -> Sequence[Any]:
            if self._answer.outputs is None:
                raise _Captured(CapturedCall(finder, arguments))
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
