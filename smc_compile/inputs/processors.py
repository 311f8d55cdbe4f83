"""Sort logits processors: tensor code on the scores goes into the compiled distribution, what reads the text runs beside it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from smc_compile.errors import OptionError
from smc_compile.inputs.fingerprint import fingerprint, state_of
from smc_compile.runtime.algorithms.next_token import SETTINGS, Warper
from smc_compile.runtime.algorithms.tensors import mark_dynamic
from smc_compile.runtime.execution.region import Region
from smc_compile.runtime.execution.text_processors import name_of
from smc_compile.runtime.state.request import Rows, TextProcessor

log = logging.getLogger(__name__)


CPU = torch.device("cpu")


MOST_COMPILATIONS = 2  # of rules, for texts of all lengths


@dataclass(frozen=True)
class Processors:
    """Logits processors in their order: the rules first, then the stages, as far as the last one that reads the text.

    Attributes:
        traced: up to the last that reads the text, if all of these compile; they apply to target and draft.
        by_hand: the same, if one of them does not.
        stages: what follows, with the settings; the draft's distribution is mixed from these and from its temperature alone.
        key: equal for equal classes and settings of what compiles.
    """

    traced: tuple[TextProcessor, ...] = ()
    on_host: tuple[TextProcessor, ...] = ()
    warpers: tuple[Warper, ...] = ()
    key: tuple[Any, ...] = ()


class WrappedProcessor:
    """A processor ``(input_ids, scores) -> scores`` as a rule."""

    def __init__(self, processor: Any) -> None:
        self.processor, self.name = processor, name_of(processor)

    def __call__(self, text: Tensor, scores: Tensor, rows: Rows) -> Tensor:
        result: Tensor = self.processor(text, scores)
        return result


class UnseenPadding(WrappedProcessor):
    """A processor that a library tells, once for a batch, how much padding to overlook.

    Particles leave a batch while it runs, so padding is shown to it as a token that it drops: one past the vocabulary.
    """

    def __init__(self, processor: Any) -> None:
        super().__init__(copy.copy(processor))
        self.processor.prompt_ignore_length = None

    def __call__(self, text: Tensor, scores: Tensor, rows: Rows) -> Tensor:
        padding = torch.arange(text.shape[1], device=text.device) < rows.padding[:, None]
        return super().__call__(text.masked_fill(padding, scores.shape[-1]), scores, rows)


class AllowedTokens:
    """``allowed(request, text [L]) -> token ids`` for each row, as a rule: what is not allowed is removed."""

    def __init__(self, allowed: Any, name: str) -> None:
        self.allowed, self.name = allowed, name

    def __call__(self, text: Tensor, scores: Tensor, rows: Rows) -> Tensor:
        masked = torch.full_like(scores, -torch.inf)
        for row, (request, mine) in enumerate(zip(rows.request.tolist(), text, strict=True)):
            tokens = torch.as_tensor(self.allowed(request, mine), dtype=torch.int64, device=scores.device)
            masked[row, tokens] = scores[row, tokens]
        return masked


def score_warper(processor: Any) -> Warper:
    """A processor that reads the scores alone, as a stage of the distribution."""

    def apply(scores: Tensor, settings: Mapping[str, Tensor]) -> Tensor:
        result: Tensor = processor(torch.zeros(scores.shape[0], 1, dtype=torch.int64, device=scores.device), scores)
        return result

    apply.__name__ = name_of(processor)
    return apply


def sort_processors(
    processors: Sequence[Any],
    settings: Sequence[str],
    vocab: int,
    after: Sequence[Any] = (),
    device: torch.device = CPU,
) -> Processors:
    """Sort ``processors``, which come before the ``settings``, and ``after``, which come behind.

    Raises:
        OptionError: when one of ``after`` reads the text: rules come before temperature and truncation.
    """
    if late := [name_of(processor) for processor in after if reads_text(processor, vocab, device)]:
        raise OptionError(
            f"{late[0]} reads the text, and comes after temperature or truncation",
            "rules on the text apply to target and draft, and a draft that truncates could not reach every token",
            "put it before them, or leave temperature, top_k, top_p and min_p out",
        )
    reading = [reads_text(processor, vocab, device) for processor in processors]
    last = max((i for i, reads in enumerate(reading) if reads), default=-1)
    text_processors = tuple(as_text_processor(processor) for processor in processors[: last + 1])
    warpers = [score_warper(processor) for processor in processors[last + 1 :]]
    warpers += [SETTINGS[name][0] for name in SETTINGS if name in settings]
    warpers += [score_warper(processor) for processor in after]
    traced = bool(text_processors) and compiles(text_processors, vocab, device)
    compiled = [*processors[0 if traced else last + 1 :], None, *after]
    key = (bool(text_processors), traced, tuple(sorted(settings)), *(fingerprint(p) if p else None for p in compiled))
    return Processors(text_processors if traced else (), () if traced else text_processors, tuple(warpers), key)


def as_text_processor(processor: Any) -> TextProcessor:
    allowed = getattr(processor, "_prefix_allowed_tokens_fn", None)
    if callable(allowed):
        return AllowedTokens(allowed, name_of(processor))
    if isinstance(getattr(processor, "prompt_ignore_length", None), Tensor):
        return UnseenPadding(processor)
    return WrappedProcessor(processor)


def reads_text(processor: Any, vocab: int, device: torch.device = CPU) -> bool:
    """Whether a processor's answer can depend on the tokens or on their number.

    Its trace with a symbolic length says so, and trials with other texts and lengths. What cannot be traced, and what
    changes itself, is taken to depend on them.
    """
    if not isinstance(as_text_processor(processor), WrappedProcessor) or isinstance(
        as_text_processor(processor), UnseenPadding
    ):
        return True
    processor = untouched(processor)
    if keeps_state(processor, vocab, device) or answers_differ(processor, vocab, device):
        return True
    ids, scores = _sample(vocab, 7 if vocab != 7 else 11, device)  # sizes that are equal would share a symbol
    try:
        graph = make_fx(processor, tracing_mode="symbolic", _allow_non_fake_inputs=True)(ids, scores)
    except Exception as error:  # whatever a processor does that a tracer cannot follow
        log.debug("%s does not trace: %s", name_of(processor), error)
        return True
    placeholder = next(node for node in graph.graph.nodes if node.op == "placeholder")
    graph.graph.eliminate_dead_code()
    # The symbols that the trace began with: a length on which it branched may have been replaced by a number since.
    sizes = {dim.node._expr for dim in placeholder.meta["val"].shape[1:] if isinstance(dim, torch.SymInt)}
    environment = graph.shape_env
    branches = environment is None or any(sizes & guard.expr.free_symbols for guard in environment.guards)
    return bool(placeholder.users) or branches or not sizes


def answers_differ(processor: Any, vocab: int, device: torch.device) -> bool:
    """Whether equal scores get other answers after another text: tried at several lengths, one token included."""
    _, scores = _sample(vocab, 1, device)
    answers = []
    for seed, length in enumerate((1, 2, 3, 7, 8, 12)):
        ids, _ = _sample(vocab, length, device, seed)
        try:
            answers.append(processor(ids, scores.clone()))
        except Exception as error:
            log.debug("%s fails on random tokens: %s", name_of(processor), error)
            return True
    return not all(isinstance(a, Tensor) and torch.equal(a, answers[0]) for a in answers)


def compiles(text_processors: Sequence[TextProcessor], vocab: int, device: torch.device = CPU) -> bool:
    """Whether rules trace as tensor code for every length, leave their own state alone, and say the same untraced."""
    try:
        text_processors = [copy.deepcopy(text_processor) for text_processor in text_processors]
    except Exception as error:  # what cannot be copied would be changed by a trial
        log.debug("rules cannot be copied for a trial: %s", error)
        return False

    def apply(text: Tensor, scores: Tensor, rows: Rows) -> Tensor:
        for text_processor in text_processors:
            scores = text_processor(text, scores, rows)
        return scores

    before = [state_of(text_processor) for text_processor in text_processors]
    traced = Region("try_rules", apply, "eager")
    rows = Rows(*torch.zeros(2, 2, dtype=torch.int64, device=device))
    try:
        for seed, length in enumerate((7, 7, 9, 12, 12, 15, 18)):
            ids, scores = _sample(vocab, length, device, seed)
            actual = traced(mark_dynamic(ids.clone(), 1), scores.clone(), rows)
            if not torch.equal(actual, apply(ids, scores.clone(), rows)):
                return False
    except Exception as error:  # a graph break, or an error that a real text would not give: run them as they are
        log.debug("rules do not trace: %s", error)
        return False
    lengths = traced.compilations <= MOST_COMPILATIONS  # else each length compiles anew, up to Dynamo's limit
    return lengths and before == [state_of(text_processor) for text_processor in text_processors]


def untouched(processor: Any) -> Any:
    """A copy for a trial: some processors keep what they compute at their first call."""
    try:
        return copy.deepcopy(processor)
    except Exception as error:
        log.debug("%s cannot be copied for a trial: %s", name_of(processor), error)
        return copy.copy(processor)


def _sample(vocab: int, length: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids, scores = torch.randint(vocab, (2, length), generator=generator), torch.randn(2, vocab, generator=generator)
    return ids.to(device), scores.to(device)


def keeps_state(processor: Any, vocab: int, device: torch.device) -> bool:
    """Whether a call leaves a processor other than it was."""
    before = fingerprint(processor)
    try:
        processor(*_sample(vocab, 7, device))
    except Exception as error:
        log.debug("%s fails on random tokens: %s", name_of(processor), error)
        return True
    return before != fingerprint(processor)
