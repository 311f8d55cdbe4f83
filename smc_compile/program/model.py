"""One side of a program: a model compiled to its incremental form, or one that keeps a state of its own."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smc_compile.errors import InputError, OptionError
from smc_compile.fingerprint import forget_traced
from smc_compile.options import Options, is_stateful
from smc_compile.passes.pipeline import Traced, trace_model
from smc_compile.program.guards import model_state
from smc_compile.program.lru import LRU
from smc_compile.program.model_calls import logits_of, traceable
from smc_compile.runtime.algorithms.next_token import Mixture, NextTokenDistribution
from smc_compile.runtime.execution.incremental import CachedModel, RuntimeModel, StatefulModel
from smc_compile.runtime.execution.window import WindowModel

KEPT = 16  # analyses; each holds its model
TRACE_BATCH = 2  # any batch > 1: the batch axis is told apart from axes of size one
analyses: LRU[Hashable, Traced] = LRU(KEPT)


@dataclass(frozen=True)
class Model:
    """One side of a program.

    Attributes:
        runtime: how a session runs it.
        vocab_size: rows of its logits; None where a model with a state of its own does not say.
        max_positions: the longest text it takes; None where nothing bounds it.
        distribution: of the next token, from its rows.
        traced: the analysis; None of a model with a state of its own.
        trained_positions: the longest text that its configuration names; it may run beyond.
        window: how many tokens it sees of each text, the last ones, if its loop crops the text.
    """

    runtime: RuntimeModel
    vocab_size: int | None
    max_positions: int | None
    distribution: NextTokenDistribution | Mixture
    traced: Traced | None = None
    trained_positions: int | None = None
    window: int | None = None

    @property
    def placement(self) -> tuple[torch.device, torch.dtype] | None:
        """Device and dtype of the floating weights, None where there are none."""
        weights: Sequence[Tensor]
        if isinstance(self.runtime, CachedModel | WindowModel):
            weights = self.runtime.weights()
        else:
            source = self.runtime.model  # type: ignore[attr-defined]
            weights = list(source.parameters()) if isinstance(source, nn.Module) else []
        return next(((w.device, w.dtype) for w in weights if w.is_floating_point() and w.dim() > 1), None)


def compile_model(
    model: Any, distribution: NextTokenDistribution | Mixture, options: Options, ids: Tensor, role: str
) -> Model:
    """A model that is called with ids [B, S] alone, in its incremental form; ``role`` is "target" or "draft".

    A model that follows the step protocol carries its state itself, and nothing is synthesized.

    Raises:
        InputError: the model drops out, or returns something else than logits.
        CacheError, ValidationError: no cache can be synthesized for it.
    """
    if isinstance(model, nn.Module):
        require_eval(model, "draft" if role == "draft" else "model")
    if is_stateful(model):
        return Model(StatefulModel(model), None, getattr(model, "max_positions", None), distribution)
    traced = trace_once(model, LastLogits(model), ids, options.validate, sampled=False)
    trained = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return with_cache(traced, traced.owned, options, role, distribution, trained)


def trace_once(
    model: nn.Module, step: nn.Module, ids: Tensor, check: bool, sampled: bool, distribution: Hashable = ()
) -> Traced:
    """The analysis of ``step``, which asks ``model`` for its next token. It is kept: methods and options share it.

    ``distribution`` is what else the step depends on. A validated analysis also serves where no check is asked for.
    """
    keys = [(model_state(model), sampled, distribution, checked) for checked in (True, check)]
    key = next((k for k in keys if k in analyses), keys[-1])

    def trace() -> Traced:
        try:
            return trace_model(step, ids.new_zeros(TRACE_BATCH, 2), (), check, sampled)
        finally:
            forget_traced(model)

    return analyses.get_or_make(key, trace)


def with_cache(
    traced: Traced,
    weights: Callable[[], list[Tensor]],
    options: Options,
    role: str,
    distribution: NextTokenDistribution | Mixture,
    trained_positions: int | None = None,
) -> Model:
    """A model whose cache was synthesized; ``weights`` gives its weights at each call."""
    graphs = traced.cached
    refuse_bytes_on_cpu(traced, options, role)
    runtime = CachedModel(graphs, weights, options.compiler, role)
    return Model(runtime, graphs.vocab_size, graphs.max_positions, distribution, traced, trained_positions)


def refuse_bytes_on_cpu(traced: Traced, options: Options, role: str) -> None:
    """Inductor's code for activations that are rounded to eight bits is wrong on a CPU (torch 2.13: some rows).

    Raises:
        OptionError: it would be generated.
    """
    products = traced.lm.graph.find_nodes(op="call_function", target=torch.ops.aten._int_mm.default)
    if products and options.compiler == "inductor" and products[0].meta["val"].device.type == "cpu":
        raise OptionError(
            f"the {role}'s activations are rounded to eight bits, and Inductor's code for that is wrong on a CPU",
            f"{len(products)} products of bytes, torch {torch.__version__}; torch.compile by itself is off too",
            'pass compiler="aot_eager", or quantise the weights alone',
        )


class LastLogits(nn.Module):
    """``ids [B, S] -> logits [B, V]`` of the last position."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        with traceable(self.model):
            return logits_of(self.model, ids)[:, -1]


def require_eval(model: nn.Module, name: str) -> None:
    """Refuse active dropout by the path of its module.

    Raises:
        InputError: a module drops out.
    """
    for path, module in model.named_modules():
        if module.training and isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise InputError(
                f"the {name} is in training mode with dropout",
                f"module {path or type(module).__name__} drops {module.p:.0%} of its inputs",
                "call model.eval() first",
            )
