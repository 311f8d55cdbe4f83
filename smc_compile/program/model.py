"""One side of a program: a model compiled to its incremental form, or one that keeps a state of its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smc_compile.errors import InputError
from smc_compile.options import Options, is_stateful
from smc_compile.passes.pipeline import Traced, trace_model
from smc_compile.program.model_calls import logits_of, traceable
from smc_compile.runtime.algorithms.next_token import Mixture, NextTokenDistribution
from smc_compile.runtime.execution.incremental import CachedModel, RuntimeModel, StatefulModel

KEPT = 16  # analyses kept; the oldest goes first, and with it its hold on the model


_traced: OrderedDict[Any, Traced] = OrderedDict()


TRACE_BATCH = 2  # any batch > 1: the batch axis is told apart from axes of size one


@dataclass
class Model:
    """One side of a program: how it runs, what its vocabulary is, and what was found."""

    runtime: RuntimeModel
    vocab_size: int | None
    max_positions: int | None
    distribution: NextTokenDistribution | Mixture
    traced: Traced | None = None
    trained_positions: int | None = None  # what its configuration names; it may run beyond


def compile_model(
    model: nn.Module, distribution: NextTokenDistribution | Mixture, options: Options, ids: Tensor, name: str
) -> Model:
    """The incremental form of a model whose next token follows its last row of logits."""
    traced = trace_once(model, LastLogits(model), ids, options.validate, sampled=False)
    found = cached(traced, traced.owned, options, name, distribution)
    found.trained_positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return found


def trace_once(
    model: nn.Module, step: nn.Module, ids: Tensor, check: bool, sampled: bool, distribution: Any = ()
) -> Traced:
    """The analysis of ``step``, which asks ``model`` for its next token: kept, since methods and options share it.

    ``distribution`` is what else the step depends on. An analysis that was validated also serves where none is asked for.
    """
    place = next(((p.device, p.dtype) for p in model.parameters()), None)
    keys = [(id(model), place, sampled, distribution, checked) for checked in (True, check)]
    key = next((k for k in keys if k in _traced), keys[-1])
    if key not in _traced:
        _traced[key] = trace_model(step, ids.new_zeros(TRACE_BATCH, 2), (), check, sampled)
    _traced.move_to_end(key)
    while len(_traced) > KEPT:
        _traced.popitem(last=False)
    return _traced[key]


def cached(
    traced: Traced,
    weights: Callable[[], list[Tensor]],
    options: Options,
    name: str,
    distribution: NextTokenDistribution | Mixture,
) -> Model:
    graphs = traced.cached
    runtime = CachedModel(graphs, weights, options.compiler, name)
    return Model(runtime, graphs.vocab_size, graphs.max_positions, distribution, traced)


def stateful(model: Any, distribution: NextTokenDistribution | Mixture) -> Model:
    """A model that follows the explicit protocol carries its state itself; nothing is synthesized."""
    if isinstance(model, nn.Module):
        require_eval(model, "model")
    return Model(StatefulModel(model), None, getattr(model, "max_positions", None), distribution)


class LastLogits(nn.Module):
    """``ids [B, S] -> logits [B, V]`` of the last position."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        with traceable(self.model):
            return logits_of(self.model, ids)[:, -1]


def require_eval(model: nn.Module, name: str) -> None:
    """Refuse active dropout with the module's name."""
    for path, module in model.named_modules():
        if module.training and isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise InputError(
                f"the {name} is in training mode with dropout",
                f"module {path or type(module).__name__} drops {module.p:.0%} of its inputs",
                "call model.eval() first",
            )


def placement(model: Model) -> tuple[torch.device, torch.dtype] | None:
    """Device and dtype of a model's floating weights, None when it has none."""
    weights: Sequence[Tensor]
    if isinstance(model.runtime, CachedModel):
        weights = model.runtime.weights()
    else:
        source = model.runtime.model  # type: ignore[attr-defined]
        weights = list(source.parameters()) if isinstance(source, nn.Module) else []
    return next(((w.device, w.dtype) for w in weights if w.is_floating_point() and w.dim() > 1), None)


def method_for(target: Model, options: Options) -> str:
    """What runs. Particles have nothing to do in a greedy loop: a draft speeds it up by exact speculation."""
    if options.method != "smc" or target.distribution.kind != "greedy":
        return options.method
    return "speculative" if options.draft is not None and not with_states(target, options) else "autoregressive"


def with_states(target: Model, options: Options) -> list[str]:
    """Which of target and draft carry a state of their own: rejected tokens cannot be taken out of it."""
    found = [] if isinstance(target.runtime, CachedModel) else ["target"]
    return [*found, "draft"] if is_stateful(options.draft) else found
