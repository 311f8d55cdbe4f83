"""Generate from a model and a draft, without writing a loop."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from smc_compile.compile import (
    LastLogits,
    Program,
    build_program,
    cached,
    check_prompt,
    request_seeds,
    require_eval,
    stateful,
    trace_once,
)
from smc_compile.errors import InputError, OptionError
from smc_compile.options import Options, is_stateful
from smc_compile.result import Generation
from smc_compile.runtime.session import Law

KEPT = 16  # programs kept; the oldest goes first, and with it its hold on the model
_programs: OrderedDict[Any, Program] = OrderedDict()


def generate(
    model: Any,
    draft: Any = None,
    ids: Tensor | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    **options: Any,
) -> Generation:
    """Sample ``max_new_tokens`` after each prompt from ``softmax(model(ids)[:, -1] / temperature)`` with SMC.

    Args:
        model: the target, ``ids [B, S] -> logits [B, S, V]``, or one that follows the step protocol.
        draft: the draft, of the same kind; not needed for ``method="autoregressive"``.
        ids: prompts [B, P] int64, all of one length.
        max_new_tokens: n, new tokens per request.
        temperature: divides the target's logits; 0 takes the most likely token (exact one-token loop).
        **options: see ``smc_compile.options.Options``.

    Returns:
        a ``Generation``: sequences [B, P+n], particles [B, N, P+n], log_weights [B, N], log_evidence [B], ess [B, C].

    Raises:
        OptionError, InputError: before any work, when an argument does not fit.
        CacheError, ValidationError: when no cache can be synthesized for a model.
        GenerationError: when generation breaks in the middle; ``error.partial`` holds the result so far.
    """
    parsed = Options.parse({"draft": draft, **options})
    _check_arguments(model, ids, temperature)
    assert ids is not None
    program = program_for(model, Sample(model, float(temperature)), parsed, ids)
    return program.run(ids, max_new_tokens, request_seeds(parsed.seed, ids))


def _check_arguments(model: Any, ids: Any, temperature: Any) -> None:
    if not isinstance(model, nn.Module) and not is_stateful(model):
        raise InputError("model must be an nn.Module or follow the step protocol", f"got {type(model).__name__}")
    if (
        isinstance(temperature, bool)
        or not isinstance(temperature, (int, float))
        or not 0 <= temperature < float("inf")
    ):
        raise OptionError(
            "temperature must be a number >= 0", f"got {temperature!r}", "0 means greedy, 1 the model's own law"
        )
    if not isinstance(ids, Tensor):
        raise InputError("prompts must be ids [B, P] int64", f"got {type(ids).__name__}", "pass a tensor of token ids")


def program_for(model: Any, step: Sample, options: Options, ids: Tensor) -> Program:
    """One program per (model, draft, law of the step, options without the seed).

    Raises:
        OptionError, InputError, CacheError, ValidationError: when the pair cannot be compiled.
    """
    chosen = tuple(value for name, value in vars(options).items() if name not in ("draft", "seed"))
    signature = (id(model), id(options.draft), step.law, chosen, _dtype(model))
    if signature not in _programs:
        _programs[signature] = _compile(model, step, options, ids)
    _programs.move_to_end(signature)
    while len(_programs) > KEPT:
        _programs.popitem(last=False)
    return _programs[signature]


def _dtype(model: Any) -> torch.dtype | None:
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((p.dtype for p in parameters), None)


def _compile(model: Any, step: Sample, options: Options, ids: Tensor) -> Program:
    check_prompt(ids)
    if is_stateful(model):
        target = stateful(model, step.temperature or 1.0)
        if step.temperature == 0:
            target.law = Law("greedy")
        return build_program(target, options, step.temperature or 1.0, ids)
    require_eval(model, "model")
    traced = trace_once(model, step, ids, options.validate, True, step.law)
    assert traced.sampler is not None
    target = cached(traced, traced.owned, options, "target", Law(traced.sampler.kind))
    return build_program(target, options, traced.sampler.temperature, ids)


class Sample(nn.Module):
    """The trip of a plain loop: ``ids [B, S] -> token [B, 1]``.

    Attributes:
        law: what a program depends on beside the model and the options.
    """

    def __init__(self, model: Any, temperature: float) -> None:
        super().__init__()
        self.last = LastLogits(model)
        self.temperature = temperature
        self.law: tuple[Any, ...] = (temperature,)

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.last(ids)
        if self.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        return torch.multinomial(torch.softmax(logits, -1), 1)
