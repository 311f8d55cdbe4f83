"""What a logits processor holds, as a key: equal for processors that do the same to scores."""

from __future__ import annotations

import functools
import hashlib
import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGE = 10_000  # entries of a container that is not taken apart


def state_of(text_processor: Any) -> Any:
    """The key of a text processor, or of the library's processor in it."""
    return fingerprint(getattr(text_processor, "processor", text_processor))


class Same:
    """A key that is equal to itself alone, for what has no parts to compare; it keeps the object alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def fingerprint(value: Any, inside: tuple[int, ...] = ()) -> Any:
    """A key for a processor or a part of it: equal for equal classes and settings.

    A library builds new but equal processors at every call. What cannot be taken apart is equal to itself alone.
    """
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return type(value), repr(value)
    if id(value) in inside or inspect.isroutine(value) or isinstance(value, type):
        return Same(value)
    inside = (*inside, id(value))
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return Tensor, tuple(value.shape), str(value.dtype), hashlib.sha256(flat.tobytes()).hexdigest()
    if isinstance(value, np.ndarray) and value.dtype != object:
        return np.ndarray, value.shape, str(value.dtype), hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, (dict, list, tuple)) and len(value) > LARGE:
        return Same(value)
    if isinstance(value, dict):
        return type(value), tuple((fingerprint(k, inside), fingerprint(v, inside)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(fingerprint(v, inside) for v in value)
    if isinstance(value, functools.partial):
        return functools.partial, fingerprint((value.func, value.args, value.keywords), inside)
    if isinstance(value, (set, frozenset)) or not hasattr(value, "__dict__") or hasattr(type(value), "__slots__"):
        return Same(value)
    return type(value), fingerprint(vars(value), inside)
