"""Caches that a decode loop makes or is handed: found before the loop is traced, copied, and kept out of its result."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from smc_compile.errors import LoopError

_NAMES = frozenset(["past_key_values", "cache_params", "cache"])  # what models and their outputs call a cache
_DEPTH = 3  # functions that call functions


def names_a_cache(function: Callable[..., Any]) -> bool:
    """Whether a function, or one that it calls, names a model's cache: then the model must make one."""
    return any(_NAMES & set(_words(code)) for code in _codes(function, _DEPTH))


def _codes(function: Any, depth: int) -> Iterator[types.CodeType]:
    """The code of a function and of those that it calls, ``depth`` calls deep."""
    if not isinstance(function, types.FunctionType) or depth == 0:
        return
    yield function.__code__
    filled = [cell for cell in function.__closure__ or () if cell != types.CellType()]
    called = [function.__globals__.get(name) for name in function.__code__.co_names]
    for other in (*called, *(cell.cell_contents for cell in filled)):
        yield from _codes(other, depth - 1)


def _words(code: types.CodeType) -> Iterator[str]:
    """Attributes and keywords of a function's code, and of the code nested in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, tuple):
            yield from (word for word in constant if isinstance(word, str))
        elif isinstance(constant, types.CodeType):
            yield from _words(constant)


def own_copy(value: Any) -> Any:
    """A copy of a cache or container, which may be written to in the place of the user's; tensors are shared."""
    if isinstance(value, list | tuple | dict) or hasattr(value, "get_seq_length"):
        return _copied(value, {})
    return value


def _copied(value: Any, done: dict[int, Any]) -> Any:
    if id(value) in done:
        return done[id(value)]
    if type(value) in (list, tuple):
        return type(value)(_copied(item, done) for item in value)
    if type(value) is dict:
        return {key: _copied(item, done) for key, item in value.items()}
    if isinstance(value, Tensor | nn.Module | type) or callable(value) or not hasattr(value, "__dict__"):
        return value
    if type(value).__module__.startswith("torch"):
        return value
    done[id(value)] = twin = copy.copy(value)
    twin.__dict__.update({name: _copied(item, done) for name, item in vars(value).items()})
    return twin


def refuse_returned_cache(result: Any) -> None:
    """Only tokens leave a compiled loop: the keys behind the tokens that it draws are the compiler's own.

    Raises:
        LoopError: what the loop returns holds something else.
    """
    for leaf in torch.utils._pytree.tree_leaves(result):
        if not isinstance(leaf, Tensor | int | float | str):
            raise LoopError(
                "Only tokens can be returned from a decode loop.",
                "its own cache, or another value that is not made of tokens, is returned too",
                "return the token ids and nothing else; a cache that is handed in is left as it was",
            )
