"""Calls of several threads take turns: Dynamo and the exporter trace for one of them, and a session serves one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch._dynamo.convert_frame import compile_lock

Given = ParamSpec("Given")
Returned = TypeVar("Returned")
turn = compile_lock  # Dynamo's own: two locks would be taken in either order, and threads would wait for each other


def in_turn(function: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """The function, run by one thread at a time."""

    @functools.wraps(function)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Returned:
        with turn:
            return function(*args, **kwargs)

    return run
