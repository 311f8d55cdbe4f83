"""Models as one node each: what a loop does around them is traced, they are not.

Tracing iterations of a loop takes long because of the model in each. Inside of `opaque`, the call of a module becomes
one call of `call_opaque` in Dynamo's graph. The shapes of its results are learned from the module itself, run on
tensors without data at two lengths of the text. `with_models` puts the modules themselves in the place of the nodes.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from smc_compile.fingerprint import StateWalk, as_stand_in, is_stand_in
from smc_compile.passes.capture.untouched import untouched
from smc_compile.program.guards import model_state
from smc_compile.program.lru import LRU
from smc_compile.program.model_results import Build, taken_apart

TextShape = tuple[int, ...]  # a size or _TEXT
Sizes = tuple[Hashable, ...]  # names of arguments, sizes of those that are tensors, other arguments themselves
Length = int | torch.SymInt
Found = TypeVar("Found")
Described = tuple[tuple[TextShape, torch.dtype, torch.device], ...]  # the tensors that come back
KEPT = 16  # states of a module
_TEXT = -1  # stands for the length of the text among sizes


class Opaque:
    """What is known of one module in one state.

    Attributes:
        structures: how often the structure of a module's result was learned. A trace that fails meanwhile begins again.
        build: from the tensors of a result to the result; None before the first call.
        forward: what stands in for the module's own forward, which it runs outside of Dynamo.
    """

    structures: ClassVar[int] = 0

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)
        self._learned: dict[Sizes, Described] = {}
        self._form: Hashable = None  # of its result
        self.build: Build | None = None
        self.key = f"{type(module).__name__} {next(_numbers)}"
        self.forward = _forward_of(self.key, self.module, None)

    def shapes(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[tuple[Any, torch.dtype, torch.device], ...]:
        """The tensors that a call returns.

        Raises:
            RuntimeError: the structure of the result has just been learned.
            NotOpaque: the call does more than to compute tensors from tensors.
        """
        values = [*args, *kwargs.values()]
        for value in values:
            if not isinstance(value, Tensor | torch.SymInt | bool | int | float | str | torch.dtype | type(None)):
                raise NotOpaque(f"{self.key} is called with {type(value).__name__}")
        length = _text_length(values)
        sizes = _sizes(kwargs, values, length)
        if sizes not in self._learned:
            self._learn(sizes, args, kwargs, length)
        return tuple((_at(shape, length), dtype, device) for shape, dtype, device in self._learned[sizes])

    def check(self, args: Sequence[Any], kwargs: dict[str, Any], tensors: Sequence[Tensor], form: Hashable) -> None:
        """Make sure that a call with data gave tensors as `shapes` said, where it was asked about such a call.

        Raises:
            NotOpaque: it did not: the loop around it may have been traced for other ones.
        """
        values = [*args, *kwargs.values()]
        length = _text_length(values)
        told = self._learned.get(_sizes(kwargs, values, length))
        if told is None:
            return
        found = [(tuple(t.shape), t.dtype) for t in tensors]
        wanted = [(_at(shape, length), dtype) for shape, dtype, _ in told]
        if found != wanted or form != self._form:
            raise NotOpaque(f"of {length} tokens {self.key} returns {found}, and its trace {wanted}")

    def _learn(self, sizes: Sizes, args: Sequence[Any], kwargs: dict[str, Any], text: Length) -> None:
        length = _hint(text)
        build, found, form = self._run(args, kwargs, text, length)
        other, other_form = self._beside(args, kwargs, text, length) if length else (found, form)
        same = form == other_form and [one[1:] for one in found] == [two[1:] for two in other]
        if not same or (self.build is not None and form != self._form):
            raise NotOpaque(f"{self.key} gives results of several forms")
        self._form = form
        self._learned[sizes] = tuple(
            (tuple(_TEXT if a != b else a for a, b in zip(one[0], two[0], strict=True)), *one[1:])
            for one, two in zip(found, other, strict=True)
        )
        if self.build is None:
            self.build = build
            self.forward = _forward_of(self.key, self.module, build)
            Opaque.structures += 1
            raise RuntimeError("the structure of a model's result was not known yet")

    def _beside(
        self, args: Sequence[Any], kwargs: dict[str, Any], text: Length, length: int
    ) -> tuple[Described, Hashable]:
        """The result for a text of another length: one token more, or less where a model ends."""
        try:
            return self._run(args, kwargs, text, length + 1)[1:]
        except NotOpaque:
            raise
        except Exception:  # models fail in any way beyond their last position
            return self._run(args, kwargs, text, length - 1)[1:]

    def _run(
        self, args: Sequence[Any], kwargs: dict[str, Any], text: Length, wanted: int
    ) -> tuple[Build, Described, Hashable]:
        """The module's result for a text of ``wanted`` tokens, without data, and its form.

        Raises:
            NotOpaque: it changes something, or its result shares memory with what the loop may write to.
        """
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        given: list[Tensor] = []

        def empty(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return wanted + _plain(value, text)[1] if _is_symbol(value) else value
            shape = _at(_marked(value, text), wanted)
            given.append(torch.empty(shape, dtype=value.dtype, device=value.device))
            return given[-1]

        module = self.module()
        assert module is not None
        walk = StateWalk()
        walk.visit(module)
        with _disable_current_modes(), torch.no_grad(), mode, untouched(module) as changes:
            inputs = [empty(value) for value in args], {name: empty(value) for name, value in kwargs.items()}
            before = [tensor._version for tensor in given]
            result = own_forward(module)(*inputs[0], **inputs[1])
            weights = [*module.parameters(), *module.buffers()]
            owned = [*weights, *(mode.from_tensor(weight) for weight in weights)]
        for cached in walk.snapshot.caches:
            cached.cache_clear()  # it holds tensors without data
        if not walk.snapshot.holds():
            walk.snapshot.put_back()
            changes.append("an object that it reads")
        if before != [tensor._version for tensor in given]:
            changes.append("what it is called with")
        if changes:
            raise NotOpaque(f"{self.key} changes {', '.join(changes)}")
        tensors: list[Tensor] = []
        build, form = taken_apart(result, tensors)
        memory = [tensor.untyped_storage()._cdata for tensor in (*tensors, *given, *owned)]
        if len(set(memory[: len(tensors)])) < len(tensors) or set(memory[: len(tensors)]) & set(memory[len(tensors) :]):
            raise NotOpaque(f"{self.key} returns a part of what it is given or holds, or one thing twice")
        return build, tuple((tuple(t.shape), t.dtype, t.device) for t in tensors), form


class NotOpaque(Exception):
    """A call of a module cannot be one node."""


_numbers = itertools.count()
_replaced: weakref.WeakKeyDictionary[nn.Module, Callable[..., Any]] = weakref.WeakKeyDictionary()  # own forwards
_known: weakref.WeakKeyDictionary[nn.Module, LRU[Hashable, Opaque]] = weakref.WeakKeyDictionary()  # by states
_by_key: weakref.WeakValueDictionary[str, Opaque] = weakref.WeakValueDictionary()


@contextmanager
def opaque(models: Sequence[nn.Module], states: tuple[Hashable, ...]) -> Iterator[None]:
    """Inside, Dynamo sees one node where it meets a call of one of these modules, or of a module inside of them.

    Whatever runs outside of Dynamo, in this or another thread, finds the modules as they are. ``states`` are those of
    the models; what is known of a module is known in one of them.
    """
    modules = list(dict.fromkeys(module for model in models for module in model.modules()))
    before = [(module, module.__dict__.get("forward")) for module in modules]
    try:
        for module, own in before:
            if own is not None and not is_stand_in(own):
                _replaced[module] = own
            known = _known.setdefault(module, LRU(KEPT)).get_or_make(states, lambda: Opaque(module))  # noqa: B023
            _by_key[known.key] = known
            module.__dict__["forward"] = known.forward
        yield
    finally:
        for module, own in before:
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own
            if own is not None and not is_stand_in(own):
                _replaced.pop(module, None)


def learning(models: Sequence[nn.Module], trace: Callable[[], Found]) -> Found:
    """What ``trace`` gives inside of `opaque`: it begins again when the structure of a result has been learned."""
    states = tuple(model_state(model) for model in models)
    while True:
        learned = Opaque.structures
        try:
            with opaque(models, states):
                return trace()
        except Exception:
            if Opaque.structures == learned:
                raise


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of a module, whatever stands in for it."""
    forward = module.__dict__.get("forward")
    if forward is not None and is_stand_in(forward):
        forward = _replaced.get(module)
    return forward if forward is not None else module.__class__.forward.__get__(module)


@torch._dynamo.allow_in_graph
def call_opaque(key: str, grad: bool, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """The tensors that the module of a key returns, without data. ``grad`` says whether gradients are on: it may ask.

    Raises:
        NotOpaque: it is called with data.
    """
    if any(isinstance(value, Tensor) and not isinstance(value, FakeTensor) for value in (*args, *kwargs.values())):
        raise NotOpaque("what stands for a model in a trace was run")
    shapes = _by_key[key].shapes(args, kwargs)
    return tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in shapes)


def _forward_of(key: str, module: weakref.ref[nn.Module], build: Build | None) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            tensors = call_opaque(key, torch.is_grad_enabled(), *args, **kwargs)
            return tensors[0] if build is None else build(tensors)
        real = module()
        assert real is not None
        return own_forward(real)(*args, **kwargs)

    return as_stand_in(forward)


# ---- the models themselves -------------------------------------------------------------------------------------------


class _Tensors(nn.Module):
    """The forward of a model, hooks apart, as the tensors of its result: what `call_opaque` stands for.

    A call has gradients on or off as the loop has. A trace has none, and is compared with calls.
    """

    def __init__(self, model: nn.Module, known: Opaque, grad: bool) -> None:
        super().__init__()
        self.model, self.known, self.grad = model, known, grad

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        tensors: list[Tensor] = []
        if torch.compiler.is_compiling():
            taken_apart(own_forward(self.model)(*args, **kwargs), tensors)
            return tuple(tensors)
        with torch.set_grad_enabled(self.grad):
            _, form = taken_apart(own_forward(self.model)(*args, **kwargs), tensors)
        self.known.check(args, kwargs, tensors, form)
        return tuple(tensor.detach() for tensor in tensors)


def with_models(step: fx.GraphModule) -> fx.GraphModule:
    """A step that was traced with models as one node each, with the models themselves."""
    nodes = step.graph.find_nodes(op="call_function", target=call_opaque)
    if not nodes:
        return step
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(step.graph, copies))
    module = fx.GraphModule(step, graph, class_name="Step")
    for number, (key, grad) in enumerate(dict.fromkeys(node.args[:2] for node in nodes)):
        known = _by_key.get(str(key))
        model = known.module() if known is not None else None
        if known is None or model is None:
            raise NotOpaque(f"{key} is forgotten")
        module.add_submodule(f"model_{number}", _Tensors(model, known, bool(grad)))
        for node in [copies[node] for node in nodes if node.args[:2] == (key, grad)]:
            with graph.inserting_before(node):
                called = graph.call_module(f"model_{number}", node.args[2:], node.kwargs)
            called.meta = dict(node.meta)
            node.replace_all_uses_with(called)
            graph.erase_node(node)
    module.recompile()
    return module


# ---- sizes -----------------------------------------------------------------------------------------------------------


def _text_length(values: Sequence[Any]) -> Length:
    """The one size that is a symbol. Without one the last size of the first integer tensor, or 0.

    Raises:
        NotOpaque: sizes are several symbols.
    """
    tensors = [value for value in values if isinstance(value, Tensor)]
    sizes: list[Any] = [size for tensor in tensors for size in tensor.shape]
    symbols = {size.node.expr: size for size in sizes if _is_symbol(size)}
    if len(symbols) > 1:
        raise NotOpaque(f"sizes of one call are {' and '.join(map(str, symbols))}")
    numbers = (int(t.shape[-1]) for t in tensors if t.dim() and not t.dtype.is_floating_point)
    return next(iter(symbols.values())) if symbols else next(numbers, 0)


def _sizes(names: Iterable[str], values: Sequence[Any], length: Length) -> Sizes:
    """What tells calls apart whose results have other sizes; ``names`` are those of the last values."""
    return (*names, *(_marked(v, length) if isinstance(v, Tensor) else _plain(v, length) for v in values))


def _plain(value: Any, length: Length) -> tuple[Any, Any]:
    """An argument that is no tensor: its type and itself. A symbol as what it is more than the length of the text.

    Raises:
        NotOpaque: that is no number.
    """
    if not _is_symbol(value):
        return type(value), value
    more = value.node.expr - (length.node.expr if isinstance(length, torch.SymInt) else length)
    if not more.is_Integer:
        raise NotOpaque(f"an argument is {value.node.expr}")
    return torch.SymInt, int(more)


def _marked(value: Tensor, length: Length) -> TextShape:
    """The sizes of a tensor, those equal to the length of the text marked; of numbers, the first one counts rows."""
    if _is_symbol(length):
        return tuple(_TEXT if _is_symbol(size) else int(size) for size in value.shape)
    sizes = [int(size) for size in value.shape]
    first = 1 if len(sizes) > 1 else 0
    return (*sizes[:first], *(_TEXT if length and size == length else size for size in sizes[first:]))


def _at(shape: TextShape, length: Length) -> tuple[Length, ...]:
    return tuple(length if size == _TEXT else size for size in shape)


def _is_symbol(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols)


def _hint(size: Length) -> int:
    """A size in the trace at hand, as a number; nothing is guarded."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size
