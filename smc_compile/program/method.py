"""Which method answers, given what target and draft are."""

from __future__ import annotations

from smc_compile.errors import OptionError
from smc_compile.options import Options, is_stateful
from smc_compile.program.model import Model


def method_for(target: Model, options: Options) -> str:
    """The method that runs under ``options``.

    In a greedy loop there is no randomness for particles to carry. A draft speeds it up by exact speculation, and
    without one the one-token loop runs.
    """
    if options.method != "smc" or target.distribution.kind != "greedy":
        return options.method
    return "speculative" if options.draft is not None and not with_states(target, options) else "autoregressive"


def with_states(target: Model, options: Options) -> list[str]:
    """Which of target and draft carry a state of their own: rejected tokens cannot be taken out of it."""
    found = [] if target.runtime.forgets else ["target"]
    return [*found, "draft"] if is_stateful(options.draft) else found


def refuse_states(target: Model, draft: Model) -> None:
    """Exact speculation hides rejected tokens in a cache by their position. A state has already taken them in.

    Raises:
        OptionError: target or draft carries a state of its own.
    """
    if name := _with_state(target, draft):
        raise OptionError(
            f'method "speculative" cannot use this {name}',
            "it carries a state of its own (step protocol), which cannot be rolled back when tokens are rejected",
            'use method="smc" or "autoregressive", or a model that the compiler can make a cache for',
        )


def refuse_cuts(target: Model, draft: Model) -> None:
    """A block that is cut leaves tokens behind that the models have read.

    Raises:
        OptionError: target or draft carries a state of its own.
    """
    if name := _with_state(target, draft):
        raise OptionError(
            f"max_divergence cannot be kept with this {name}",
            "it carries a state of its own (step protocol), which cannot forget the tokens behind a cut",
            "leave max_divergence=1, or use a model that the compiler can make a cache for",
        )


def _with_state(target: Model, draft: Model) -> str | None:
    """Which of the two cannot forget a token, if one cannot."""
    sides = {"target": target, "draft": draft}
    return next((name for name, model in sides.items() if not model.runtime.forgets), None)
