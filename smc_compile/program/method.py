"""Which method answers, given what target and draft are."""

from __future__ import annotations

from dataclasses import replace

from smc_compile.errors import OptionError
from smc_compile.options import AUTO, Options, is_stateful
from smc_compile.program.model import Model


def method_for(target: Model, options: Options) -> str:
    """The method that runs under ``options``.

    In a greedy loop there is no randomness for particles to carry. A draft speeds it up by exact speculation, and
    without one the one-token loop runs.
    """
    method = options.method or AUTO
    if method not in ("smc", AUTO) or target.distribution.kind != "greedy":
        return method
    return "speculative" if options.draft is not None and not with_states(target, options) else "autoregressive"


def with_method(options: Options, *models: Model) -> Options:
    """The options with a method where none was asked for: "auto", which needs models that can forget tokens, else
    "smc", which any pair can follow."""
    if options.method is not None:
        return options
    alone = options.max_kl_per_token is None and _forgets_nothing(*models) is not None
    return replace(options, method="smc" if alone else AUTO)


def with_states(target: Model, options: Options) -> list[str]:
    """Which of target and draft carry a state of their own: rejected tokens cannot be taken out of it."""
    found = [] if target.runtime.forgets else ["target"]
    return [*found, "draft"] if is_stateful(options.draft) else found


def refuse_states(method: str, target: Model, draft: Model) -> None:
    """Exact speculation, which is "speculative" and a part of "auto", writes over rejected tokens in a cache. A state
    has already taken them in.

    Raises:
        OptionError: target or draft carries a state of its own.
    """
    if found := _forgets_nothing(target, draft):
        name, why = found
        raise OptionError(
            f'method "{method}" cannot use this {name}',
            f"{why}, and cannot be rolled back when tokens are rejected",
            'use method="smc" or "autoregressive", or a model and a loop that the compiler can make a cache for',
        )


def refuse_cuts(target: Model, draft: Model) -> None:
    """A block that is cut leaves tokens behind that the models have read.

    Raises:
        OptionError: target or draft carries a state of its own.
    """
    if found := _forgets_nothing(target, draft):
        name, why = found
        raise OptionError(
            f"max_divergence cannot be kept with this {name}",
            f"{why}, and cannot forget the tokens behind a cut",
            "leave max_divergence=1, or use a model and a loop that the compiler can make a cache for",
        )


def _forgets_nothing(*models: Model) -> tuple[str, str] | None:
    """Which of target and draft cannot forget a token, if one cannot, and why."""
    for name, model in zip(("target", "draft"), models, strict=False):
        if model.runtime.forgets:
            continue
        if model.window is not None:
            return name, f"it reads the last {model.window} tokens of the text anew for each token"
        return name, "it carries a state of its own (step protocol)"
    return None
