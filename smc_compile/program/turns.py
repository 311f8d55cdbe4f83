"""Calls of several threads take turns: Dynamo and the exporter trace for one of them, and a session serves one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch._dynamo.convert_frame import compile_lock

Given = ParamSpec("Given")
Returned = TypeVar("Returned")


def in_turn(function: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """The function, run by one thread at a time.

    The lock is Dynamo's own. Two locks would be taken in either order, and threads would wait for each other.
    """

    @functools.wraps(function)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Returned:
        with compile_lock:
            return function(*args, **kwargs)

    return run
