"""Drafts that are called with more than ids: ``model(ids, positions)`` or ``model(ids, cache)``.

They are traced in a greedy loop as their users write it, with a cache; the loop analysis finds the model without one.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smc_compile.errors import InputError
from smc_compile.options import Options, is_stateful
from smc_compile.passes.loop.recover import DecodeLoop
from smc_compile.passes.pipeline import trace_model
from smc_compile.program.capture import Capture
from smc_compile.program.model import Model, require_eval, with_cache
from smc_compile.runtime.algorithms.next_token import Mixture, NextTokenDistribution

_PROMPT = 3  # tokens of the prompt that a draft is traced with


def needs_more(model: Any) -> bool:
    """Whether a model is called with more than ids: its forward names a second argument without a default."""
    return isinstance(model, nn.Module) and not is_stateful(model) and len(_required(model)) == 2


def _required(model: nn.Module) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]


def compile_called(
    model: nn.Module, distribution: NextTokenDistribution | Mixture, options: Options, ids: Tensor, role: str
) -> Model:
    """The incremental form of a draft for which ``needs_more`` holds; its rows are raw logits.

    Raises:
        InputError: the draft cannot be called with positions, nor with None for an empty cache.
        CacheError, LoopError, ValidationError: as for a target.
    """
    require_eval(model, role)
    by_position = "pos" in _required(model)[1]
    written = _by_position if by_position else _by_cache
    assert isinstance(written, types.FunctionType)
    loop, arguments = _captured(written, model, ids.new_zeros(ids.shape[0], _PROMPT))
    loop.check(arguments)
    weights = [arguments[at] for at in loop.invariant_indices]
    traced = trace_model(loop.step, ids.new_zeros(ids.shape[0], 2), weights, options.validate)
    return with_cache(traced, lambda: [*traced.owned(), *weights], options, role, distribution)


def _by_position(model: Callable[..., Any], ids: Tensor) -> Tensor:
    length = ids.shape[1]
    token = model(ids, torch.arange(length, device=ids.device))[:, -1].argmax(-1, keepdim=True)
    other = model(token, torch.arange(length, length + 1, device=ids.device))[:, -1].argmax(-1, keepdim=True)
    return torch.cat([ids, token, other], 1)


def _by_cache(model: Callable[..., Any], ids: Tensor) -> Tensor:
    logits, cache = model(ids, None)
    token = logits[:, -1].argmax(-1, keepdim=True)
    logits, cache = model(token, cache)
    return torch.cat([ids, token, logits[:, -1].argmax(-1, keepdim=True)], 1)


def _captured(loop: types.FunctionType, model: nn.Module, ids: Tensor) -> tuple[DecodeLoop, Sequence[Any]]:
    """The loop that a draft makes of prompts ``ids`` [B, P], and the arguments of its graph."""
    torch._dynamo.maybe_mark_dynamic(ids, 1)
    second = _required(model)[1]
    try:
        call = Capture(loop).captured(model, ids)
    except (torch._dynamo.exc.TorchDynamoException, TypeError) as error:
        raise _uncallable(second, str(error).strip().splitlines()[0]) from error
    found = call.finder.loop_for(call.arguments) if call is not None else None
    if call is None or found is None:
        raise _uncallable(second, "called so, it draws no tokens one after the other")
    return found, call.arguments


def _uncallable(second: str, why: str) -> InputError:
    return InputError(
        "the draft cannot be called",
        f"its forward requires {second!r}; it was called with positions if the name holds 'pos', else with None for an "
        f"empty cache: {why}",
        "pass a draft that maps ids [B, S] to logits [B, S, V], or one that is called as model(ids, input_pos)",
    )
