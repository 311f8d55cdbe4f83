"""Sort logits processors by what they read.

Those that read the text become text processors and apply to target and draft. Tensor code on the scores alone becomes
warpers, which are compiled into the target's distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from smc_compile.errors import OptionError
from smc_compile.fingerprint import fingerprint
from smc_compile.inputs.processor_trials import CPU, compiles, reads_text
from smc_compile.inputs.wrapped_processors import as_text_processor, score_warper
from smc_compile.runtime.algorithms.next_token import SETTINGS, Warper
from smc_compile.runtime.execution.text_processors import name_of
from smc_compile.runtime.state.request import TextProcessor


@dataclass(frozen=True)
class Processors:
    """Logits processors in their order.

    Attributes:
        traced: the processors up to the last one that reads the text, if all of these compile.
        on_host: the same, if one of them does not compile. They belong to the request.
        warpers: the processors behind them, with the settings (temperature and truncation) in their place.
        key: equal for equal classes and settings of what compiles.
    """

    traced: tuple[TextProcessor, ...] = ()
    on_host: tuple[TextProcessor, ...] = ()
    warpers: tuple[Warper, ...] = ()
    key: tuple[Any, ...] = ()


def sort_processors(
    processors: Sequence[Any],
    settings: Sequence[str],
    vocab: int,
    after: Sequence[Any] = (),
    device: torch.device = CPU,
) -> Processors:
    """Sort ``processors``, which come before the ``settings``, and ``after``, which come behind.

    Args:
        settings: the names of the settings that the requests have.
        vocab: how many scores the processors are tried with.

    Raises:
        OptionError: one of ``after`` reads the text, where only warpers may stand.
    """
    if late := [name_of(processor) for processor in after if reads_text(processor, vocab, device)]:
        raise OptionError(
            f"{late[0]} reads the text, and comes after temperature or truncation",
            "processors of the text apply to target and draft, and a draft that truncates could not reach every token",
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
