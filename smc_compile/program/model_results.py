"""What a model returns, as its tensors and as a form in which they are put together again."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor

Build = Callable[[Sequence[Tensor]], Any]  # from the tensors of a result to the result


def taken_apart(result: Any, tensors: list[Tensor]) -> tuple[Build, Hashable]:
    """How a result is put together from its tensors, which are collected, and its form: all else that it holds.

    Raises:
        TypeError: it may hold more than its parts.
    """
    if isinstance(result, Tensor):
        tensors.append(result)
        at = len(tensors) - 1
        return (lambda found: found[at]), ("tensor", at)
    kind: Any = type(result)
    if kind in (tuple, list):
        pairs = [taken_apart(part, tensors) for part in result]
        builds = [build for build, _ in pairs]
        return (lambda found: kind([build(found) for build in builds])), (kind, tuple(form for _, form in pairs))
    if kind is dict or _is_plain_record(kind):
        named = {name: taken_apart(value, tensors) for name, value in _fields(result).items()}
        parts = {name: build for name, (build, _) in named.items()}
        form = (kind, tuple((name, form) for name, (_, form) in named.items()))
        if kind is dict:
            return (lambda found: {name: build(found) for name, build in parts.items()}), form
        return (lambda found: kind(**{name: build(found) for name, build in parts.items()})), form
    if result is None or kind in (bool, int, float, str):
        return (lambda found: result), (kind, result)
    raise TypeError(f"a model returns {kind.__name__}")


def _is_plain_record(kind: type) -> bool:
    """Whether an object is what its fields are: a dataclass that computes nothing, or a result of transformers."""
    if not dataclasses.is_dataclass(kind) or not _is_made(vars(kind).get("__init__")):
        return False
    if issubclass(kind, dict):
        return any(base.__name__ == "ModelOutput" for base in kind.__mro__) and "__post_init__" not in vars(kind)
    computes = {name for base in kind.__mro__[:-1] for name in vars(base)}
    return not computes & {"__post_init__", "__new__"}


def _is_made(function: Any) -> bool:
    """Whether a function was made by ``dataclass``, or there is none."""
    own = inspect.unwrap(function) if function is not None else None
    return own is None or getattr(getattr(own, "__code__", None), "co_filename", "") == "<string>"


def _fields(result: Any) -> dict[str, Any]:
    return dict(result.items()) if isinstance(result, dict) else dict(vars(result))
