"""Tie passes and runtime: from a traced step and options to a program that answers requests."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from smc_compile.errors import InputError, OptionError
from smc_compile.logits import logits_of, traceable
from smc_compile.options import Options, is_stateful
from smc_compile.passes.pipeline import Traced, trace_model
from smc_compile.result import Generation
from smc_compile.runtime.compiled import Region
from smc_compile.runtime.models import CachedModel, RuntimeModel, StatefulModel
from smc_compile.runtime.session import AutoregressiveSession, Law, Request, SMCSession

log = logging.getLogger(__name__)
KEPT = 16  # analyses kept; the oldest goes first, and with it its hold on the model
_traced: OrderedDict[Any, Traced] = OrderedDict()
TRACE_BATCH = 2  # any batch > 1: the batch axis is told apart from axes of size one


@dataclass
class Model:
    """One side of a program: how it runs, what its vocabulary is, and what was found."""

    runtime: RuntimeModel
    vocab_size: int | None
    max_positions: int | None
    law: Law
    traced: Traced | None = None


@dataclass
class Program:
    """A compiled target and draft; sessions for each batch size are made on demand and kept."""

    target: Model
    draft: Model | None
    options: Options
    sessions: dict[int, SMCSession | AutoregressiveSession] = field(default_factory=dict)
    analysis_seconds: float = 0.0

    @property
    def method(self) -> str:
        return "autoregressive" if self.target.law.kind == "greedy" else self.options.method

    def run(self, ids: Tensor, new_tokens: int, seeds: Tensor | None = None) -> Generation:
        """Generate ``new_tokens`` after each prompt of ``ids [B, P]``.

        Raises:
            InputError: when the prompt or the length does not fit the model.
            GenerationError: when generation breaks in the middle; ``partial`` holds the result so far.
        """
        check_request(ids, new_tokens, self.target, self.draft)
        seeds = request_seeds(self.options.seed, ids) if seeds is None else seeds
        session = self._session(ids.shape[0])
        eos = -1 if self.options.eos_token_id is None else self.options.eos_token_id
        result = session.run(Request(ids.detach(), new_tokens, seeds, eos))
        for warning in result.stats.warnings:
            log.warning(warning)
        return result

    def _session(self, batch: int) -> SMCSession | AutoregressiveSession:
        if batch not in self.sessions:
            self.sessions[batch] = self._new_session()
        return self.sessions[batch]

    def _new_session(self) -> SMCSession | AutoregressiveSession:
        o = self.options
        if self.method == "autoregressive":
            return AutoregressiveSession(self.target.runtime, self.target.law, o.compiler)
        assert self.draft is not None
        temperature = o.draft_temperature or self.draft.law.temperature
        return SMCSession(
            self.target.runtime,
            self.draft.runtime,
            self.target.law,
            temperature,
            o.n_particles,
            o.lookahead,
            o.ess_threshold,
            o.resampling_method,
            o.compiler,
        )

    @property
    def regions(self) -> list[Region]:
        found = {id(r): r for session in self.sessions.values() for r in session.regions}
        return list(found.values())


def build_program(target: Model, options: Options, temperature: float, ids: Tensor) -> Program:
    """Add the draft that ``options`` name; ``temperature`` is the loop's own, used for the draft unless overridden.

    Raises:
        OptionError: when the method needs a draft and there is none.
        InputError: when draft and target do not fit each other.
    """
    needs_draft = options.method == "smc" and target.law.kind != "greedy"
    if not needs_draft:
        return Program(target, None, options)
    if options.draft is None:
        raise OptionError(
            "no draft model was given",
            'method "smc" needs a draft that proposes tokens',
            'pass draft=small_model, or method="autoregressive" for the exact one-token loop',
        )
    start = time.perf_counter()
    draft = compile_draft(options.draft, options, temperature, ids)
    check_pair(target, draft)
    return Program(target, draft, options, analysis_seconds=time.perf_counter() - start)


def compile_draft(model: Any, options: Options, temperature: float, ids: Tensor) -> Model:
    """The draft's own incremental form; its rows are raw logits."""
    if is_stateful(model):
        return stateful(model, temperature)
    require_eval(model, "draft")
    traced = trace_once(model, LastLogits(model), ids, options.validate, sampled=False)
    return cached(traced, traced.owned, options, "draft", Law("logits", temperature))


def trace_once(model: nn.Module, step: nn.Module, ids: Tensor, check: bool, sampled: bool, law: Any = ()) -> Traced:
    """The analysis of ``step``, which asks ``model`` for its next token: kept, since methods and options share it.

    ``law`` is what else the step depends on. An analysis that was validated also serves where none is asked for.
    """
    place = next(((p.device, p.dtype) for p in model.parameters()), None)
    keys = [(id(model), place, sampled, law, checked) for checked in (True, check)]
    key = next((k for k in keys if k in _traced), keys[-1])
    if key not in _traced:
        _traced[key] = trace_model(step, ids.new_zeros(TRACE_BATCH, 2), (), check, sampled)
    _traced.move_to_end(key)
    while len(_traced) > KEPT:
        _traced.popitem(last=False)
    return _traced[key]


def cached(traced: Traced, weights: Callable[[], list[Tensor]], options: Options, name: str, law: Law) -> Model:
    graphs = traced.cached
    runtime = CachedModel(graphs, weights, options.compiler, name)
    return Model(runtime, graphs.vocab_size, graphs.max_positions, law, traced)


def stateful(model: Any, temperature: float) -> Model:
    """A model that follows the explicit protocol carries its state itself; nothing is synthesized."""
    if isinstance(model, nn.Module):
        require_eval(model, "model")
    return Model(StatefulModel(model), None, getattr(model, "max_positions", None), Law("logits", temperature))


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


def check_pair(target: Model, draft: Model) -> None:
    """Vocabulary, device and dtype of target and draft must agree."""
    if target.vocab_size is not None and draft.vocab_size is not None and target.vocab_size != draft.vocab_size:
        raise InputError(
            "draft and target have different vocabularies",
            f"the target has {target.vocab_size} tokens, the draft {draft.vocab_size}",
            "use a draft trained with the target's tokenizer",
        )
    mine, theirs = placement(target), placement(draft)
    if mine and theirs and mine != theirs:
        raise InputError(
            "draft and target differ in device or dtype",
            f"the target is {mine[1]} on {mine[0]}, the draft {theirs[1]} on {theirs[0]}",
            f"move the draft: draft.to(device={str(mine[0])!r}, dtype={mine[1]})",
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


def check_prompt(ids: Any) -> None:
    """A prompt by itself: ids [B, P] int64, not empty."""
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        found = f"a tensor of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError("prompts must be ids [B, P]", f"got {found}", "pass tokens[None] for one prompt")
    if ids.dtype != torch.int64:
        raise InputError("prompts must be int64 token ids", f"got {ids.dtype}", "convert with ids.long()")
    if ids.shape[0] < 1 or ids.shape[1] < 1:
        raise InputError(
            "the prompt is empty", f"ids has shape {tuple(ids.shape)}", "pass at least one token (such as BOS)"
        )


def check_request(ids: Tensor, new_tokens: Any, target: Model, draft: Model | None) -> None:
    """Prompt and length, against the models."""
    check_prompt(ids)
    if isinstance(new_tokens, bool) or not isinstance(new_tokens, int) or new_tokens < 1:
        raise InputError("the number of new tokens must be a positive integer", f"got {new_tokens!r}", "pass n >= 1")
    place = placement(target)
    if place and place[0] != ids.device:
        raise InputError(
            "prompt and model are on different devices", f"{ids.device} and {place[0]}", "move one of them"
        )
    low, high = int(ids.min()), int(ids.max())
    vocab = target.vocab_size
    if low < 0 or (vocab is not None and high >= vocab):
        bad = low if low < 0 else high
        raise InputError(
            "a prompt token is out of range", f"id {bad}, vocabulary {vocab}", "use the model's own tokenizer"
        )
    for name, model in (("target", target), ("draft", draft)):
        limit = position_limit(model, ids.shape[1] + new_tokens) if model is not None else None
        if limit is not None and ids.shape[1] + new_tokens > limit:
            raise InputError(
                f"prompt plus new tokens exceed the {name}'s maximum positions",
                f"{ids.shape[1]} + {new_tokens} > {limit}",
                f"ask for at most {max(limit - ids.shape[1], 0)} new tokens, or shorten the prompt",
            )


def position_limit(model: Model, length: int) -> int | None:
    """The longest sequence a model takes, if it is below ``length``: what the trace says, or where its tables end."""
    if model.max_positions is not None and model.max_positions < length:
        return model.max_positions
    if not isinstance(model.runtime, CachedModel) or model.runtime.has_tables(length):
        return model.max_positions
    low, high = 0, length  # tables exist at ``low`` and not at ``high``
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if model.runtime.has_tables(middle) else (low, middle)
    return low


def request_seeds(seed: int | None, ids: Tensor) -> Tensor:
    """Request b uses seed + b, so that it draws the same tokens whatever else is in the batch."""
    base = int(torch.randint(2**62, ())) if seed is None else seed
    wrapped = [(base + b + 2**63) % 2**64 - 2**63 for b in range(ids.shape[0])]
    return torch.tensor(wrapped, dtype=torch.int64, device=ids.device)
