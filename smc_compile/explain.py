"""A report on a decode loop: what was found in it and built from it, or why it cannot be compiled."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from smc_compile.auto.choice import choice_of
from smc_compile.decode import CompiledLoop
from smc_compile.decode import decode as compile_loop
from smc_compile.errors import OptionError, SMCError
from smc_compile.generate import generate
from smc_compile.options import Options
from smc_compile.passes.pipeline import Traced
from smc_compile.program.checks import position_limit
from smc_compile.program.method import with_states
from smc_compile.program.model import Model
from smc_compile.program.program import Program
from smc_compile.program.turns import in_turn
from smc_compile.result import Generation
from smc_compile.runtime.algorithms.next_token import Mixture

PROBED = 4  # position tables are tried up to this many times the length of the call


@dataclass(frozen=True)
class Explanation:
    """A report in sections; ``str()`` prints it.

    Attributes:
        compiled: whether the loop compiles.
        reason: the error when it does not, else None.
        sections: heading -> lines.
    """

    compiled: bool
    reason: SMCError | None
    sections: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.reason is not None:
            return f"cannot be compiled: {self.reason}"
        blocks = [
            "\n".join([heading, *(f"  {line}" for line in lines)]) for heading, lines in self.sections.items() if lines
        ]
        return "\n".join(blocks)


@in_turn
def explain(function: Callable[..., Any], *args: Any, trip_count: str | None = None, **options: Any) -> Explanation:
    """Compile and run ``function(*args)`` once and report what was found.

    Args:
        function: a decode loop, as for ``smc_compile.decode`` (or one that it already compiled), or
            ``smc_compile.generate`` itself.
        *args: arguments of one call.
        **options: as for ``smc_compile.decode``, or for ``generate``.

    Raises:
        OptionError: for bad options. A loop that cannot be compiled is no error here: see ``Explanation.reason``.
    """
    if function is generate:
        return _explain_generate(args, options)
    Options.parse(options)
    if isinstance(function, nn.Module):
        function = type(function).forward.__get__(function)
    loop = (
        function
        if isinstance(function, CompiledLoop)
        else compile_loop(_plain(function), trip_count=trip_count, **options)
    )
    receiver = (function.__self__,) if hasattr(function, "__self__") and not isinstance(function, CompiledLoop) else ()
    start = time.perf_counter()
    try:
        loop(*receiver, *args)
    except SMCError as error:
        return Explanation(False, error)
    return _describe(loop, time.perf_counter() - start)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return getattr(function, "__func__", function)


def _explain_generate(args: tuple[Any, ...], options: dict[str, Any]) -> Explanation:
    start = time.perf_counter()
    try:
        result = generate(*args, **options)
    except OptionError:
        raise
    except SMCError as error:
        return Explanation(False, error)
    program = result.program
    distribution = program.target.distribution
    warpers = [getattr(warper, "name", warper.__name__) for warper in distribution.warpers]
    sampler = "argmax" if distribution.kind == "greedy" else f"softmax of logits after {', '.join(warpers)}"
    found = {
        "sampler": [sampler, *proposal_line(program)],
        "potential": result.stats.tables,
        "rules on the text": result.stats.rules,
    }
    return Explanation(True, None, _sections(found, program, result, time.perf_counter() - start))


def proposal_line(program: Program) -> list[str]:
    """What the draft follows, where that is not its temperature alone."""
    distribution = program.draft.distribution if program.draft else None
    if not isinstance(distribution, Mixture):
        return []
    share = f"{distribution.share:.0%}"
    return [f"draft: the same of its own logits, mixed with {share} of its distribution under the temperature alone"]


def _describe(loop: CompiledLoop, seconds: float) -> Explanation:
    assert loop.loop is not None
    assert loop.last is not None
    program = loop.last.program
    sampler = program.target.traced.sampler
    distribution = {"logits": "softmax of logits", "probs": "unnormalised probabilities", "greedy": "argmax"}[
        sampler.kind
    ]
    found = {
        "loop": list(loop.loop.report),
        "sampler": [f"{sampler.form}: {distribution}, temperature {sampler.temperature:g}"],
        "rules on the text": loop.last.stats.rules,
    }
    return Explanation(True, None, _sections(found, program, loop.last, seconds))


def _sections(
    found: dict[str, list[str]], program: Program, result: Generation, seconds: float
) -> dict[str, list[str]]:
    """``found``, and then what was built from it and how long it took."""
    batch, _, length = result.particles.shape
    n, choice = program.rows, choice_of(program)
    return {
        **found,
        "method": [f"{program.method}{method_note(program, result)}"],
        "choice": choice.report() if choice is not None else [],
        "target": _model(program.target, batch, n, length),
        "draft": _model(program.draft, batch, n, length) if program.draft is not None else [],
        "regions": _regions(program),
        "time": [f"{seconds:.1f} s in all, {sum(r.compile_seconds for r in program.regions):.1f} s compiling regions"],
        "warnings": list(result.stats.warnings),
    }


def method_note(program: Program, result: Generation) -> str:
    """How far the answer may be from the target, how much of the draft is accepted, or why a greedy loop runs without
    its draft."""
    greedy = program.target.distribution.kind == "greedy"
    if program.method == "speculative":
        accepted = f"{result.stats.accepted:.2f} of {program.options.lookahead} drafted tokens accepted a cycle"
        return f" (exact{', the greedy text' if greedy else ''}; {accepted})"
    if program.method in ("smc", "auto"):
        far = float(result.kl_bound_per_token.mean())
        if result.stats.potentials:
            evidence = ", ".join(f"{e:.2f}" for e in result.log_evidence[:4].tolist())
            return f" (log_evidence {evidence}: the log of the mass that the model gives to texts that fit)"
        if math.isnan(far):
            return " (no kl_bound: see the warnings)"
        bound = f"kl_bound {far:.2g} nats a token here: on average it bounds how far answers are from the target"
        return f" ({turns_note(result)}{bound})"
    if not greedy or program.options.method == "autoregressive":
        return ""
    if program.options.draft is None:
        return " (the cached one-token loop; a greedy loop with a draft runs as exact speculation)"
    states = " and ".join(with_states(program.target, program.options))
    return (
        f" (the cached one-token loop without the draft: a state of its own, here of {states}, cannot be rolled back)"
    )


def turns_note(result: Generation) -> str:
    """Who took how many cycles, where SMC and exact speculation take turns."""
    stats = result.stats
    if stats.method != "auto":
        return ""
    changes = f"{stats.switches} change{'s' if stats.switches != 1 else ''}"
    return (
        f"SMC with N={stats.n_particles}, K={stats.lookahead}, {stats.cycles - stats.exact_cycles} cycles; exact "
        f"speculation, {stats.exact_cycles} cycles; {changes}; "
    )


def _model(model: Model, batch: int, n: int, length: int) -> list[str]:
    if model.traced is None:
        return ["explicit protocol step(tokens, pos, state): its state is permuted, nothing is synthesized"]
    traced = model.traced
    if model.window is not None:
        return [
            f"window: each token costs a pass over the last {model.window} tokens; nothing is cached",
            f"validated: {'no' if traced.error is None else f'largest relative difference {traced.error:.1e}'}",
            f"passes: {_seconds(traced)}",
        ]
    per_token = sum(site.bytes_per_token for site in traced.cached.sites)
    limit = position_limit(model, PROBED * length)
    return [
        *traced.cached.report,
        f"cache memory at this call: at most {_bytes(per_token * batch * length)} once per request, and "
        f"{_bytes(per_token * batch * n * length)} for {n} particles",
        f"positions: {f'no limit up to {PROBED * length}' if limit is None else f'at most {limit}'}",
        f"validated: {'no' if traced.error is None else f'largest relative difference {traced.error:.1e}'}",
        f"passes: {_seconds(traced)}",
    ]


def _seconds(traced: Traced) -> str:
    return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in traced.seconds.items())


def _regions(program: Program) -> list[str]:
    return [f"{r.name}: compiled {r.compilations} times, {r.compile_seconds:.1f} s" for r in program.regions]


def _bytes(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count //= 1024
    return f"{count} GiB"
