"""Try logits processors on random tokens and scores: whether they read the text, and whether they compile."""

from __future__ import annotations

import copy
import logging
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from smc_compile.fingerprint import fingerprint
from smc_compile.inputs.wrapped_processors import WrappedProcessor, as_text_processor
from smc_compile.runtime.algorithms.tensors import mark_dynamic
from smc_compile.runtime.execution.region import Region
from smc_compile.runtime.execution.text_processors import name_of
from smc_compile.runtime.state.request import Rows, TextProcessor

log = logging.getLogger(__name__)
CPU = torch.device("cpu")
MOST_COMPILATIONS = 2  # of text processors, for texts of all lengths


def reads_text(processor: Any, vocab: int, device: torch.device = CPU) -> bool:
    """Whether a processor's answer can depend on the tokens or on their number.

    Its trace with a symbolic length says so, and trials with other texts and lengths. What cannot be traced, and what
    changes itself, is taken to depend on them.
    """
    if type(as_text_processor(processor)) is not WrappedProcessor:
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
    """Whether text processors trace as tensor code for every length, keep no state, and answer the same untraced."""
    try:
        text_processors = [copy.deepcopy(text_processor) for text_processor in text_processors]
    except Exception as error:  # what cannot be copied would be changed by a trial
        log.debug("text processors cannot be copied for a trial: %s", error)
        return False

    def apply(text: Tensor, scores: Tensor, rows: Rows) -> Tensor:
        for text_processor in text_processors:
            scores = text_processor(text, scores, rows)
        return scores

    before = [state_of(text_processor) for text_processor in text_processors]
    traced = Region("try_processors", apply, "eager")
    rows = Rows(*torch.zeros(2, 2, dtype=torch.int64, device=device))
    try:
        for seed, length in enumerate((7, 7, 9, 12, 12, 15, 18)):
            ids, scores = _sample(vocab, length, device, seed)
            actual = traced(mark_dynamic(ids.clone(), 1), scores.clone(), rows)
            if not torch.equal(actual, apply(ids, scores.clone(), rows)):
                return False
    except Exception as error:  # a graph break, or an error that a real text would not give: run them as they are
        log.debug("text processors do not trace: %s", error)
        return False
    lengths = traced.compilations <= MOST_COMPILATIONS  # else each length compiles anew, up to Dynamo's limit
    return lengths and before == [state_of(text_processor) for text_processor in text_processors]


def untouched(processor: Any) -> Any:
    """A copy for a trial. Some processors keep what they compute at their first call."""
    try:
        return copy.deepcopy(processor)
    except Exception as error:
        log.debug("%s cannot be copied for a trial: %s", name_of(processor), error)
        return copy.copy(processor)


def _sample(vocab: int, length: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random tokens [2, length] and scores [2, vocab]."""
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


def state_of(text_processor: Any) -> Hashable:
    """The key of a text processor, or of the library's processor in it."""
    return fingerprint(getattr(text_processor, "processor", text_processor))
