"""Models as one node each: what a loop does around them is traced, they are not.

Tracing many iterations of a loop takes long because of the model in each. Inside of `opaque`, the call of a module
becomes one call of `call_opaque` in Dynamo's graph. The shapes of its results are learned from the module itself, run
on tensors without data at two lengths of the text.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

TextShape = tuple[int, ...]
Sizes = tuple[TextShape | None, ...]  # of the arguments of a call; None for what is no tensor
Described = tuple[tuple[TextShape, torch.dtype, torch.device], ...]  # the tensors that come back
Build = Callable[[Sequence[Tensor]], Any]  # from the tensors that come back to the module's result
_TEXT = -1  # stands for the length of the text among sizes


class Opaque:
    """What is known of one module.

    Attributes:
        structures: how often the structure of a module's result was learned. A trace that fails meanwhile begins again.
        build: from the tensors of a result to the result; None before the first call.
        forward: what stands in for the module's own forward, which it runs outside of Dynamo.
    """

    structures: ClassVar[int] = 0

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._learned: dict[Sizes, Described] = {}
        self.build: Build | None = None
        self.key = f"{type(module).__name__} {id(module)}"
        self.forward = _forward_of(self.key, self._module, None)

    def shapes(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Described:
        """The tensors that a call returns.

        Raises:
            RuntimeError: the structure of the result has just been learned.
        """
        length = _text_length([*args, *kwargs.values()])
        sizes = tuple(_marked(value, length) for value in (*args, *kwargs.values()))
        if sizes not in self._learned:
            self._learn(sizes, args, kwargs, length)
        return tuple((_at(shape, length), dtype, device) for shape, dtype, device in self._learned[sizes])

    def _learn(self, sizes: Sizes, args: Sequence[Any], kwargs: dict[str, Any], length: int) -> None:
        build, found = self._run(args, kwargs, length, length)
        other = found
        if length:
            for longer in (length + 1, length - 1):  # a model may end at this length
                try:
                    _, other = self._run(args, kwargs, length, longer)
                    break
                except Exception:  # models fail in any way beyond their last position
                    continue
        self._learned[sizes] = tuple(
            (tuple(_TEXT if a != b else a for a, b in zip(one[0], two[0], strict=True)), *one[1:])
            for one, two in zip(found, other, strict=True)
        )
        if self.build is None:
            self.build = build
            self.forward = _forward_of(self.key, self._module, build)
            Opaque.structures += 1
            raise RuntimeError("the structure of a model's result was not known yet")

    def _run(self, args: Sequence[Any], kwargs: dict[str, Any], length: int, wanted: int) -> tuple[Build, Described]:
        """The module's result for a text of ``wanted`` tokens in place of ``length``, without data."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)

        def empty(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            shape = _at(_marked(value, length), wanted)  # type: ignore[arg-type]
            return torch.empty(shape, dtype=value.dtype, device=value.device)

        module = self._module()
        assert module is not None
        with _disable_current_modes(), torch.no_grad(), mode:
            result = module(*map(empty, args), **{name: empty(value) for name, value in kwargs.items()})
        tensors: list[Tensor] = []
        build = _structure(result, tensors)
        return build, tuple((tuple(t.shape), t.dtype, t.device) for t in tensors)


_known: weakref.WeakKeyDictionary[nn.Module, Opaque] = weakref.WeakKeyDictionary()
_by_key: weakref.WeakValueDictionary[str, Opaque] = weakref.WeakValueDictionary()


@contextmanager
def opaque(models: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, Dynamo sees one node where it meets a call of one of these modules, or of a module inside of them.

    Whatever runs outside of Dynamo, in this or another thread, finds the modules as they are.
    """
    modules = list(dict.fromkeys(module for model in models for module in model.modules()))
    before = [(module, module.__dict__.get("forward")) for module in modules]
    try:
        for module in modules:
            if module not in _known:
                _known[module] = known = Opaque(module)
                _by_key[known.key] = known
            module.__dict__["forward"] = _known[module].forward
        yield
    finally:
        for module, own in before:
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


@torch._dynamo.allow_in_graph
def call_opaque(key: str, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """The tensors that the module of a key returns, without data."""
    shapes = _by_key[key].shapes(args, kwargs)
    return tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in shapes)


def _forward_of(key: str, module: weakref.ref[nn.Module], build: Build | None) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            tensors = call_opaque(key, *args, **kwargs)
            return tensors[0] if build is None else build(tensors)
        real = module()
        assert real is not None
        return type(real).forward(real, *args, **kwargs)

    return forward


# ---- sizes -----------------------------------------------------------------------------------------------------------


def _text_length(values: Sequence[Any]) -> int:
    """The last size of the first integer tensor among the arguments: the length of a text; 0 without one."""
    found = (v.shape[-1] for v in values if isinstance(v, Tensor) and v.dim() and not v.dtype.is_floating_point)
    return int(next(found, 0))


def _marked(value: Any, length: int) -> TextShape | None:
    """The sizes of a tensor, those equal to the length of the text marked; the first one counts rows."""
    if not isinstance(value, Tensor):
        return None
    sizes = [int(size) for size in value.shape]
    first = 1 if len(sizes) > 1 else 0
    return (*sizes[:first], *(_TEXT if length and size == length else size for size in sizes[first:]))


def _at(shape: TextShape, length: int) -> TextShape:
    return tuple(length if size == _TEXT else size for size in shape)


# ---- results ---------------------------------------------------------------------------------------------------------


def _structure(result: Any, tensors: list[Tensor]) -> Build:
    """How a result is put together from its tensors, which are collected."""
    if isinstance(result, Tensor):
        tensors.append(result)
        at = len(tensors) - 1
        return lambda found: found[at]
    if type(result) in (tuple, list):
        parts = [_structure(part, tensors) for part in result]
        kind = type(result)
        return lambda found: kind([part(found) for part in parts])
    if dataclasses.is_dataclass(result) or isinstance(result, dict):
        cls: Any = type(result)
        fields = result if isinstance(result, dict) else vars(result)
        named = {name: _structure(value, tensors) for name, value in fields.items() if value is not None}
        return lambda found: cls(**{name: part(found) for name, part in named.items()})
    if result is None or isinstance(result, bool | int | float | str):
        return lambda found: result
    raise TypeError(f"a model returns {type(result).__name__}")
