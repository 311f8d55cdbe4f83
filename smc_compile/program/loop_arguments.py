"""The arguments of a function that holds a decode loop: which are prompts, and the same with others in their place."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from smc_compile.program.caller_caches import own_copy


def prompts(bound: inspect.BoundArguments) -> list[str]:
    """The names of arguments that may be prompts: token ids [B, P] or [P]."""
    return [
        name
        for name, value in bound.arguments.items()
        if isinstance(value, Tensor) and value.dim() in (1, 2) and value.dtype == torch.int64
    ]


def prompt_length(bound: inspect.BoundArguments) -> int:
    """Tokens of the first prompt, 0 without one."""
    return next((bound.arguments[name].shape[-1] for name in prompts(bound)), 0)


def mark_lengths(bound: inspect.BoundArguments) -> None:
    """Tell Dynamo that prompts of other lengths will come. One token is a case of its own to Dynamo."""
    for name in prompts(bound):
        prompt = bound.arguments[name]
        if prompt.shape[-1] > 1:
            torch._dynamo.maybe_mark_dynamic(prompt, prompt.dim() - 1)


def with_value(bound: inspect.BoundArguments, name: str, value: int) -> inspect.BoundArguments:
    """The arguments with another value of one, and with copies of the caches among them."""
    own = {key: own_copy(argument) for key, argument in bound.arguments.items()}
    return _changed(bound, {**own, name: value})


def with_prompts(bound: inspect.BoundArguments, length: int, marked: bool = False) -> inspect.BoundArguments:
    """The arguments with prompts of another length; to Dynamo it is a number, unless ``marked``."""
    given = {name: bound.arguments[name] for name in prompts(bound)}
    other = {n: torch.cat([p] * -(-length // p.shape[-1]), -1)[..., :length].clone() for n, p in given.items()}
    arguments = _changed(bound, other)
    if marked:
        mark_lengths(arguments)
    return arguments


def with_longer_prompts(bound: inspect.BoundArguments) -> inspect.BoundArguments:
    """The arguments with prompts of one token more: those given are too short to show what longer ones do."""
    given = {name: bound.arguments[name] for name in prompts(bound)}
    return _changed(bound, {name: torch.cat([p, p[..., :1]], -1) for name, p in given.items()})


def _changed(bound: inspect.BoundArguments, values: dict[str, Any]) -> inspect.BoundArguments:
    return inspect.BoundArguments(bound.signature, OrderedDict({**bound.arguments, **values}))
