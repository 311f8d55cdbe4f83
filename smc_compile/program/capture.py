"""Capture the graph that Dynamo makes of a Python function, without running it."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dynamo.symbolic_convert import InstructionTranslator

from smc_compile.program.callables import own_code
from smc_compile.program.dynamo_limits import without_limit
from smc_compile.program.guards import model_state
from smc_compile.program.loop_finder import LoopFinder
from smc_compile.program.lru import LRU
from smc_compile.program.opaque_models import NotOpaque, learning
from smc_compile.program.reachable_models import reachable_models

KEPT = 16  # states of the models that a function reaches
_MISSING = object()


@dataclass(frozen=True)
class CapturedCall:
    """One call of a captured function.

    Attributes:
        finder: holds the graph that Dynamo made of the function. Calls whose graph is the same share it.
        arguments: what Dynamo hands to the graph in this call: tensors, and integers for sizes.
        writes: what Python objects from outside the function is left changed in, by Dynamo's names for them.
        states: of the models that are one node each in the graph, as a key; () where models are traced.
    """

    finder: LoopFinder
    arguments: Sequence[Any]
    writes: tuple[str, ...] = ()
    states: tuple[Hashable, ...] = ()


class Capture:
    """A function whose graph is captured by one call and whose result is made by a second one.

    Between the two its caller computes what the graph computes, outside of Dynamo. Dynamo's guards decide at every call
    whether an earlier graph still fits: they look at the closures, globals, attributes and constants that the function
    reads. A graph that fits is not traced again. What the guards leave out, hooks and a class whose methods change, is
    seen in the states of the models that the function reaches: each has traces of its own.
    """

    def __init__(self, function: types.FunctionType, tokens_only: bool = False, nodes: bool = False) -> None:
        """
        Args:
            tokens_only: the loop's outputs are not looked at: see ``LoopFinder``.
            nodes: the models that the function can reach become one node each: see ``opaque_models``.
        """
        self._function, self._tokens_only, self._nodes = function, tokens_only, nodes
        self._traced: LRU[Hashable, Callable[..., Any]] = LRU(KEPT)
        self._answer = _Answer()

    def captured(self, *args: Any, **kwargs: Any) -> CapturedCall | None:
        """The graph of a call and its arguments; None where there is nothing to compute.

        Code of the function behind the graph, which may write into objects of its caller, does not run.

        Raises:
            Exception: what Dynamo raises for code that it cannot trace, or the function itself while it is traced.
        """
        try:
            self._call(*args, **kwargs)
        except _Captured as found:
            return found.call
        return None

    def result(self, outputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """What the function returns for arguments that were captured before, with ``outputs`` as those of its graph."""
        with self._answering(outputs):
            return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        with without_limit():
            models = reachable_models(self._function, [*args, *kwargs.values()])
            key = tuple(model_state(model) for model in models)
            self._answer.states = key if self._nodes else ()
            traced = self._traced.get_or_make(key, self._compiled)
            return learning(models if self._nodes else (), lambda: traced(*args, **kwargs))

    def _compiled(self) -> Callable[..., Any]:
        return torch.compile(own_code(self._function), backend=self._backend, fullgraph=True, dynamic=False)

    @contextmanager
    def _answering(self, outputs: Sequence[Any]) -> Iterator[None]:
        self._answer.outputs = outputs
        try:
            yield
        finally:
            self._answer.outputs = None

    def _backend(self, gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        finder, writes = LoopFinder(gm, self._tokens_only), _writes_outside()
        if self._nodes and (changed := _changed_outside()):
            raise NotOpaque(f"the loop changes {changed[0]}, which a model may read")

        def stand_in(*arguments: Any) -> Sequence[Any]:
            if self._answer.outputs is None:
                raise _Captured(CapturedCall(finder, arguments, writes, self._answer.states))
            return self._answer.outputs

        return stand_in


class _Answer(threading.local):
    """What the graph returns to this thread: calls of other threads are captured meanwhile, or have answers of their
    own."""

    outputs: Sequence[Any] | None = None  # None: the call is captured
    states: tuple[Hashable, ...] = ()  # of its models


class _Captured(Exception):
    """Brings a call's arguments out of the code that Dynamo compiled.

    Returning from there would run the code behind the graph, which writes into attributes and containers of the caller:
    with outputs that nobody has computed yet.
    """

    def __init__(self, call: CapturedCall) -> None:
        super().__init__("captured")
        self.call = call


def _writes_outside() -> tuple[str, ...]:
    """The Python objects that existed before the trace at hand and are left changed by it, by Dynamo's names."""
    side_effects = InstructionTranslator.current_tx().output.side_effects
    found = []
    for variable in _changed():
        written = side_effects.store_attr_mutations.get(variable)
        if written is None or not all(_is_as_before(variable, name, value) for name, value in written.items()):
            found.append(str(variable.source.name))
    return tuple(found)


def _changed_outside() -> tuple[str, ...]:
    """Those that are changed meanwhile, even if they are left as they were."""
    return tuple(str(variable.source.name) for variable in _changed())


def _changed() -> list[Any]:
    side_effects = InstructionTranslator.current_tx().output.side_effects
    found = side_effects.id_to_variable.values()
    return [v for v in found if v.source is not None and side_effects.is_modified(v) and not v.is_tensor()]


def _is_as_before(variable: Any, name: str, value: Any) -> bool:
    """Whether an attribute is left with the value that it had: libraries set flags and put them back."""
    held = getattr(variable, "value", None)
    return value.is_python_constant() and getattr(held, name, _MISSING) == value.as_python_constant()
