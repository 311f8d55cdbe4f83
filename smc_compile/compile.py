"""Tie passes and runtime: from a traced step and options to a program that answers requests."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from smc_compile.choice import Choice, choose
from smc_compile.errors import InputError, OptionError
from smc_compile.logits import logits_of, traceable
from smc_compile.options import Options, is_stateful
from smc_compile.passes.pipeline import Traced, trace_model
from smc_compile.requests import build_request, check_prompt, request_seeds
from smc_compile.result import Generation
from smc_compile.runtime.compiled import Region
from smc_compile.runtime.law import Law, Mixture
from smc_compile.runtime.models import CachedModel, RuntimeModel, StatefulModel
from smc_compile.runtime.one_token import AutoregressiveSession
from smc_compile.runtime.replay import Record, cuda_graphs
from smc_compile.runtime.request import Request, Rule
from smc_compile.runtime.rules import Rules
from smc_compile.runtime.session import SMCSession
from smc_compile.runtime.speculative import SpeculativeSession

log = logging.getLogger(__name__)
Session: TypeAlias = SMCSession | AutoregressiveSession | SpeculativeSession
KEPT = 16  # analyses kept; the oldest goes first, and with it its hold on the model
_traced: OrderedDict[Any, Traced] = OrderedDict()
PADDED_SHARE = 0.01  # heads that differ by less are padded differently; more is another vocabulary
TRACE_BATCH = 2  # any batch > 1: the batch axis is told apart from axes of size one


@dataclass
class Model:
    """One side of a program: how it runs, what its vocabulary is, and what was found."""

    runtime: RuntimeModel
    vocab_size: int | None
    max_positions: int | None
    law: Law | Mixture
    traced: Traced | None = None
    trained_positions: int | None = None  # what its configuration names; it may run beyond


@dataclass
class Program:
    """A compiled target and draft. One session answers every batch: its regions compile for what they meet.

    Attributes:
        rules: logits processors that read the text and compile.
        by_hand: whether requests bring processors that do not.
        choice: how N and K were chosen, where the options leave it to us; ``options`` then hold what was chosen.
        record: what records cycles to be replayed; None runs all of them from the host.
    """

    target: Model
    draft: Model | None
    options: Options
    rules: tuple[Rule, ...] = ()
    by_hand: bool = False
    analysis_seconds: float = 0.0
    choice: Choice | None = None
    record: Record | None = None
    _session: Session | None = None

    @property
    def method(self) -> str:
        return method_for(self.target, self.options)

    @property
    def rows(self) -> int:
        """Rows of a request: particles or chains."""
        alone = self.method == "autoregressive" or self.target.law.kind == "greedy"
        return 1 if alone else int(self.options.n_particles)

    @property
    def lookahead(self) -> int:
        return 0 if self.method == "autoregressive" else int(self.options.lookahead)

    def run(self, ids: Tensor, new_tokens: int, seeds: Tensor | None = None) -> Generation:
        """Generate ``new_tokens`` after each prompt of ``ids [B, P]``.

        Raises:
            InputError: when the prompt or the length does not fit the model.
            GenerationError: when generation breaks in the middle; ``partial`` holds the result so far.
        """
        check_prompt(ids)
        seeds = request_seeds(self.options.seed, ids) if seeds is None else seeds
        return self.answer(build_request(ids, new_tokens, seeds, ends=self.options.eos_token_id))

    def answer(self, request: Request) -> Generation:
        """As ``run``, for requests that differ. The first one is what N and K are chosen for, where that is left open.

        Raises:
            OptionError: nothing that could be chosen keeps to the floors that the options set.
        """
        check_request(request, self.target, self.draft)
        if self.options.is_auto and self.method != "autoregressive":
            self.choice = choose(self, request)
            self.options = self.choice.applied(self.options)
        result = self.session.run(request)
        result.stats.n_particles, result.stats.lookahead = self.rows, self.lookahead
        result.stats.warnings += beyond_training(request, self.target, self.draft)
        for warning in result.stats.warnings:
            log.warning(warning)
        return result

    def like(self, options: Options) -> Program:
        """The same pair with other options, and a session of its own."""
        return replace(self, options=options, choice=None, _session=None)

    def room(self, request: Request, wanted: int) -> int:
        """How many new tokens, up to ``wanted``, the positions of both models leave."""
        prompt = int(request.lengths.max())
        models = [self.target] if self.draft is None else [self.target, self.draft]
        limits = (position_limit(model, prompt + wanted) for model in models)
        return min([wanted, *(limit - prompt for limit in limits if limit is not None)])

    @property
    def session(self) -> Session:
        if self._session is None:
            self._session = self._new_session()
        return self._session

    def _new_session(self) -> Session:
        o = self.options
        rules = Rules(self.rules, self.by_hand, o.compiler)
        if self.method == "autoregressive":
            return AutoregressiveSession(self.target.runtime, self.target.law, o.compiler, rules, self.record)
        assert self.draft is not None
        if self.method == "speculative":
            target, draft = self.target.runtime, self.draft.runtime
            assert isinstance(target, CachedModel)
            assert isinstance(draft, CachedModel)
            laws = self.target.law, self.draft.law
            return SpeculativeSession(target, draft, *laws, int(o.n_particles), self.lookahead, o.compiler, rules)
        return SMCSession(
            self.target.runtime,
            self.draft.runtime,
            self.target.law,
            self.draft.law,
            self.rows,
            self.lookahead,
            o.ess_threshold,
            o.resampling_method,
            o.compiler,
            rules,
            self.record,
        )

    @property
    def regions(self) -> list[Region]:
        return [] if self._session is None else self._session.regions


def recorder_for(options: Options, *models: Model) -> Record | None:
    """What records cycles to be replayed: on a GPU, where the caches are ours and stay where they are."""
    place = placement(models[0])
    ours = all(isinstance(model.runtime, CachedModel) for model in models)
    if not options.cuda_graph or not ours or place is None or place[0].type != "cuda":
        return None
    return cuda_graphs(place[0])


def build_program(
    target: Model,
    options: Options,
    draft_law: Law | Mixture,
    ids: Tensor,
    draft_model: Callable[[Any, Options, Law | Mixture, Tensor], Model] | None = None,
    **rules: Any,
) -> Program:
    """Add the draft that ``options`` name, which follows ``draft_law``.

    ``draft_model`` compiles a draft that is called in another way than with ids alone.

    Raises:
        OptionError: when the method needs a draft and there is none.
        InputError: when draft and target do not fit each other.
    """
    method = method_for(target, options)
    if method == "autoregressive":
        return Program(target, None, options, record=recorder_for(options, target), **rules)
    if options.draft is None:
        raise OptionError(
            "no draft model was given",
            f'method "{method}" needs a draft that proposes tokens',
            'pass draft=small_model, or method="autoregressive" for the exact one-token loop',
        )
    start = time.perf_counter()
    draft = (draft_model or compile_draft)(options.draft, options, draft_law, ids)
    if method == "speculative":
        refuse_states(target, draft)
    vocab = shared_vocabulary(target, draft)
    target.law, draft.law = target.law.cut(vocab), draft.law.cut(vocab)
    seconds, record = time.perf_counter() - start, recorder_for(options, target, draft)
    return Program(target, draft, options, analysis_seconds=seconds, record=record, **rules)


def method_for(target: Model, options: Options) -> str:
    """What runs. Particles have nothing to do in a greedy loop: a draft speeds it up by exact speculation."""
    if options.method != "smc" or target.law.kind != "greedy":
        return options.method
    return "speculative" if options.draft is not None and not with_states(target, options) else "autoregressive"


def with_states(target: Model, options: Options) -> list[str]:
    """Which of target and draft carry a state of their own: rejected tokens cannot be taken out of it."""
    found = [] if isinstance(target.runtime, CachedModel) else ["target"]
    return [*found, "draft"] if is_stateful(options.draft) else found


def refuse_states(target: Model, draft: Model) -> None:
    """Rejected tokens are hidden in a cache by their position; a state has taken them in."""
    for name, model in (("target", target), ("draft", draft)):
        if not isinstance(model.runtime, CachedModel):
            raise OptionError(
                f'method "speculative" cannot use this {name}',
                "it carries a state of its own (step protocol), which cannot be rolled back when tokens are rejected",
                'use method="smc" or "autoregressive", or a model that the compiler can make a cache for',
            )


def compile_draft(model: Any, options: Options, law: Law | Mixture, ids: Tensor) -> Model:
    """The draft's own incremental form; its rows are raw logits."""
    if is_stateful(model):
        return stateful(model, law)
    require_eval(model, "draft")
    return compile_model(model, law, options, ids, "draft")


def compile_model(model: nn.Module, law: Law | Mixture, options: Options, ids: Tensor, name: str) -> Model:
    """The incremental form of a model whose next token follows its last row of logits."""
    traced = trace_once(model, LastLogits(model), ids, options.validate, sampled=False)
    found = cached(traced, traced.owned, options, name, law)
    found.trained_positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return found


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


def cached(
    traced: Traced, weights: Callable[[], list[Tensor]], options: Options, name: str, law: Law | Mixture
) -> Model:
    graphs = traced.cached
    runtime = CachedModel(graphs, weights, options.compiler, name)
    return Model(runtime, graphs.vocab_size, graphs.max_positions, law, traced)


def stateful(model: Any, law: Law | Mixture) -> Model:
    """A model that follows the explicit protocol carries its state itself; nothing is synthesized."""
    if isinstance(model, nn.Module):
        require_eval(model, "model")
    return Model(StatefulModel(model), None, getattr(model, "max_positions", None), law)


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


def shared_vocabulary(target: Model, draft: Model) -> int | None:
    """How many rows of the logits are tokens of both models; None when all are. They must agree in device and dtype.

    Heads are often padded to a round number of rows, differently in models of one tokenizer. A difference of less than
    a hundredth is taken for such padding and cut off; a larger one is another vocabulary.

    Raises:
        InputError: when the pair does not fit.
    """
    mine, theirs = placement(target), placement(draft)
    if mine and theirs and mine != theirs:
        raise InputError(
            "draft and target differ in device or dtype",
            f"the target is {mine[1]} on {mine[0]}, the draft {theirs[1]} on {theirs[0]}",
            f"move the draft: draft.to(device={str(mine[0])!r}, dtype={mine[1]})",
        )
    sizes = [model.vocab_size for model in (target, draft) if model.vocab_size is not None]
    if len(set(sizes)) < 2:
        return None
    if max(sizes) - min(sizes) >= PADDED_SHARE * max(sizes):
        raise InputError(
            "draft and target have different vocabularies",
            f"the target has {target.vocab_size} tokens, the draft {draft.vocab_size}",
            "use a draft trained with the target's tokenizer",
        )
    log.warning(
        "the target has %d rows of logits, the draft %d: rows from %d on are taken for padding and never drawn",
        target.vocab_size,
        draft.vocab_size,
        min(sizes),
    )
    return min(sizes)


def placement(model: Model) -> tuple[torch.device, torch.dtype] | None:
    """Device and dtype of a model's floating weights, None when it has none."""
    weights: Sequence[Tensor]
    if isinstance(model.runtime, CachedModel):
        weights = model.runtime.weights()
    else:
        source = model.runtime.model  # type: ignore[attr-defined]
        weights = list(source.parameters()) if isinstance(source, nn.Module) else []
    return next(((w.device, w.dtype) for w in weights if w.is_floating_point() and w.dim() > 1), None)


def check_request(request: Request, target: Model, draft: Model | None) -> None:
    """Prompts, ends and lengths, against the models."""
    ids = request.ids
    place = placement(target)
    if place and place[0] != ids.device:
        raise InputError(
            "prompt and model are on different devices", f"{ids.device} and {place[0]}", "move one of them"
        )
    vocab = target.law.vocab or target.vocab_size
    padding = torch.arange(ids.shape[1], device=ids.device) < (ids.shape[1] - request.lengths)[:, None]
    given = ids.masked_fill(padding, 0)
    low, high = int(given.min()), int(given.max())
    if low < 0 or (vocab is not None and high >= vocab):
        bad = low if low < 0 else high
        raise InputError(
            "a prompt token is out of range", f"id {bad}, vocabulary {vocab}", "use the model's own tokenizer"
        )
    pad = [p for p in request.pad.tolist() if p < 0 or (vocab is not None and p >= vocab)]
    if pad:
        raise InputError(
            "pad_token_id is out of range", f"id {pad[0]}, vocabulary {vocab}", "use one of the vocabulary"
        )
    total = int((request.lengths + request.new_tokens).max())
    for name, model in (("target", target), ("draft", draft)):
        limit = position_limit(model, total) if model is not None else None
        if limit is not None and total > limit:
            row = int((request.lengths + request.new_tokens).argmax())
            length, n = int(request.lengths[row]), int(request.new_tokens[row])
            raise InputError(
                f"prompt plus new tokens exceed the {name}'s maximum positions",
                f"{length} + {n} > {limit}",
                f"ask for at most {max(limit - length, 0)} new tokens, or shorten the prompt",
            )


def beyond_training(request: Request, *models: Model | None) -> list[str]:
    """A warning for each model that ran past the positions its configuration names, though its tables go on."""
    total = int((request.lengths + request.new_tokens).max())
    limits = {name: model.trained_positions for name, model in zip(("target", "draft"), models, strict=True) if model}
    return [
        f"the {name} was asked for {total} positions, and its configuration names {limit}: beyond them it may do worse"
        for name, limit in limits.items()
        if isinstance(limit, int) and total > limit
    ]


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
