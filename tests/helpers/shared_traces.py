"""Models of one structure are traced once in a process: a draft is most often its target with other weights."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smc_compile.passes.pipeline import Traced, trace_model

KEPT = 32
PLAIN = (bool, int, float, str, type(None))
TENSORS_AND_CHILDREN = ("_parameters", "_buffers", "_modules")  # compared by shape, and one by one

_kept: OrderedDict[Any, tuple[nn.Module, Traced]] = OrderedDict()


def trace_structure_once(
    step: nn.Module, ids: Tensor, weights: Sequence[Tensor], check: bool, sampled: bool = True
) -> Traced:
    """As ``trace_model``: for a step whose structure was traced before, that trace with the weights of this one.

    What is validated, or reads weights from elsewhere, is always traced.
    """
    if check or weights:
        return trace_model(step, ids, weights, check, sampled)
    key = (structure(step), tuple(ids.shape), ids.device, sampled)
    if key not in _kept:
        _kept[key] = step, trace_model(step, ids, weights, check, sampled)
    _kept.move_to_end(key)
    while len(_kept) > KEPT:
        _kept.popitem(last=False)
    found = _kept[key][1]
    owned = copy.copy(found.owned)
    owned._step = step
    return Traced(found.lm, found.sampler, found.cached, owned, found.error, found.seconds)


def structure(step: nn.Module) -> tuple[Any, ...]:
    """What a trace depends on beside the values of weights: classes, attributes, shapes and types.

    An attribute that is no plain value counts by its identity; a step that is kept keeps its attributes alive.
    """
    modules = tuple((name, type(module), attributes(module)) for name, module in step.named_modules())
    tensors = (*step.named_parameters(remove_duplicate=False), *step.named_buffers(remove_duplicate=False))
    return modules, tuple((name, tuple(t.shape), t.dtype, t.device, type(t)) for name, t in tensors)


def attributes(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    found: list[tuple[str, Any]] = []
    for name, value in vars(module).items():
        if isinstance(value, PLAIN):
            found.append((name, value))
        elif name not in TENSORS_AND_CHILDREN and (isinstance(value, torch.Tensor) or value):
            found.append((name, id(value)))
    return tuple(sorted(found))
