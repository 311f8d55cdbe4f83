"""Choose method, N and K of a program for its first request: predicted costs against what a short pilot shows of the
pair. What is predicted from that stands in ``runtime/algorithms/predictions.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch

from smc_compile.auto.cost_model import CycleModel, cycle_model
from smc_compile.errors import CacheError, GenerationError, OptionError, SMCError
from smc_compile.options import AUTO, LOOKAHEAD, Options
from smc_compile.program.checks import check_request
from smc_compile.program.program import Program
from smc_compile.result import Generation
from smc_compile.runtime.algorithms.predictions import (
    acceptance_rate,
    cycle_divergence,
    effective_particles,
    expected_tokens,
    spread_of,
)
from smc_compile.runtime.sessions.switching import Tradeoff
from smc_compile.runtime.state.request import Request

LOOKAHEADS = (1, 2, 3, 4, 6, 8, 10, 12, 16)
PARTICLES = (2, 4, 8, 16, 32, 64)
PILOT_PARTICLES, PILOT_LOOKAHEAD = 32, 4
PILOT_SEEDS = 0x632BE59BD9B4E019  # from those of the answers
PILOT_TOKENS = {"smc": 21, "speculative": 61}  # a cycle of SMC has many particles to learn from

_settled: WeakKeyDictionary[Program, Program] = WeakKeyDictionary()  # by the program whose N or K were open
_choices: WeakKeyDictionary[Program, Choice] = WeakKeyDictionary()  # by the program that follows the choice


def settled(program: Program, request: Request) -> Program:
    """The program with numbers for N and K: itself, or one that follows the choice made for its first request.

    Raises:
        OptionError: no N and K keep to the floors that the options set, or nothing can be predicted.
        InputError: the request does not fit the models.
    """
    switching = program.method == "auto" and program.tradeoff is None
    if not (program.options.is_auto or switching) or program.method == "autoregressive":
        return program
    if program not in _settled:
        check_request(request, program.target, program.draft)
        choice = choose(program, request)
        warnings = (*program.warnings, *([choice.reason] if choice.blind else []))
        _settled[program] = replace(
            program, options=choice.applied(program.options), tradeoff=choice.tradeoff, warnings=warnings
        )
        _choices[_settled[program]] = choice
    return _settled[program]


def choice_of(program: Program) -> Choice | None:
    """The choice that a program follows; None where its N and K were given."""
    return _choices.get(program)


@dataclass(frozen=True)
class Candidate:
    """One method, N and K.

    Attributes:
        cycle_seconds: predicted.
        tokens: that a cycle commits, expected.
        seconds_per_token: of one request, prefill apart; the last cycle of a short text may be cut.
        ess: effective particles at the end of a cycle; None where no pilot ran.
        kl: nats that a token adds to ``kl_bound``; None where no pilot ran.
        method: "smc", "speculative", or "autoregressive" with K = 0.
    """

    n_particles: int
    lookahead: int
    cycle_seconds: float
    tokens: float
    seconds_per_token: float
    ess: float | None = None
    kl: float | None = None
    method: str = "smc"

    def meets(self, options: Options) -> bool:
        """Whether it keeps to the floors."""
        slow = options.time_budget is not None and 1e3 * self.seconds_per_token > options.time_budget
        poor = options.ess_floor is not None and (self.ess is None or self.ess < options.ess_floor)
        far = options.max_kl_per_token is not None and (self.kl is None or self.kl > options.max_kl_per_token)
        return not slow and not poor and not (far and self.method == "smc")


@dataclass(frozen=True)
class Choice:
    """What was chosen, from what, and why.

    Attributes:
        candidates: all that were compared.
        chosen: one of them.
        reason: in a sentence.
        pilot: what the pilot run found; empty where none ran.
        tradeoff: by what SMC and exact speculation take turns; None where one method alone runs.
        population: N and K of SMC, where that is not what a call begins with.
        blind: whether nothing could be predicted, so that ``reason`` is worth a warning.
    """

    candidates: tuple[Candidate, ...]
    chosen: Candidate
    reason: str
    pilot: str = ""
    tradeoff: Tradeoff | None = None
    population: Candidate | None = None
    blind: bool = False

    def applied(self, options: Options) -> Options:
        """The options with what was chosen; the floors have done their work."""
        chosen = self.population or self.chosen
        method = options.method
        if method == AUTO and self.tradeoff is None:
            method = self.chosen.method
        return replace(
            options,
            method=method,
            n_particles=chosen.n_particles,
            lookahead=max(chosen.lookahead, 1),
            ess_floor=None,
            time_budget=None,
            max_kl_per_token=options.max_kl_per_token if self.tradeoff else None,
        )

    def report(self) -> list[str]:
        """Lines for a person: the choice, the pilot, and the candidates nearest to it."""
        chosen = self.chosen
        numbers = f"N={chosen.n_particles}, K={chosen.lookahead}"
        what = {"smc": numbers, "speculative": f"exact speculation, K={chosen.lookahead}"}
        lines = [f"{what.get(chosen.method, 'the one-token loop')}: {self.reason}"]
        lines += [self.pilot] if self.pilot else []
        if self.blind:
            return lines
        shown = self._shown()
        more = "     ESS" if any(c.ess for c in shown) else ""
        more += "  nats/token" if any(c.kl is not None for c in shown) else ""
        lines.append("    N   K  ms/cycle  tokens/cycle  ms/token  tokens/s" + more)
        return lines + [_row(candidate, candidate is chosen, more) for candidate in shown]

    def _shown(self) -> list[Candidate]:
        """All of the chosen K, and the K around it at the chosen N. With other methods: the best of each."""
        if len({c.method for c in self.candidates}) > 1:
            return list(self.candidates)
        near = [c for c in self.candidates if c.n_particles == self.chosen.n_particles]
        others = [c for c in self.candidates if c.lookahead == self.chosen.lookahead and c not in near]
        return sorted([*near, *others], key=lambda c: (c.n_particles, c.lookahead))


def _row(c: Candidate, is_chosen: bool, more: str) -> str:
    ess = ("" if c.ess is None else f"{c.ess:.1f}").rjust(8) if "ESS" in more else ""
    ess += ("" if c.kl is None else f"{c.kl:.3f}").rjust(12) if "nats" in more else ""
    shape = f"{'>' if is_chosen else ' '} {c.n_particles:3d} {c.lookahead:3d}"
    per_token = f"{1e3 * c.seconds_per_token:9.2f} {1 / c.seconds_per_token:9.1f}"
    return f"{shape} {1e3 * c.cycle_seconds:9.2f} {c.tokens:13.2f} {per_token}{ess}"


def choose(program: Program, request: Request) -> Choice:
    """Method, N and K for a request's batch, prompt length and number of new tokens.

    Raises:
        OptionError: a model has no graph to count, no candidate keeps to the floors, or no pilot can run; but under
            ``method="auto"`` exact speculation, which has no error, runs then.
        CacheError: a model's costs cannot be counted; the same.
    """
    if program.options.method != AUTO:
        return _numbers(program, request)
    try:
        return _fastest_way(program, request) if program.method == AUTO else _numbers(program, request)
    except (OptionError, CacheError) as error:
        return _exact_blindly(program.options, error)


def _exact_blindly(options: Options, error: SMCError) -> Choice:
    """What "auto" takes where it cannot compare: the method without an error."""
    k = LOOKAHEAD if options.lookahead == AUTO else int(options.lookahead)
    exact = Candidate(1, k, math.nan, math.nan, math.nan, method="speculative")
    reason = f'method="auto" takes exact speculation with K={k} and compares nothing: {error.what}: {error.why}'
    return Choice((), exact, reason, blind=True)


def _numbers(program: Program, request: Request) -> Choice:
    """N and K where the method is given."""
    options = program.options
    costs = cycle_model(program.target, program.draft)
    if program.method == "speculative":
        rate = _accepted(program, request, program.rows)
        candidates = [_exact(costs, request, program.rows, k, rate) for k in LOOKAHEADS]
        chosen = fastest(candidates, options)
        pilot = f"pilot: a drafted token is accepted with probability {rate:.2f}"
        return Choice(tuple(candidates), chosen, _reason(options), pilot)
    asked = options.ess_floor is not None or options.max_kl_per_token is not None
    spread = _spread(program, request) if asked else None
    candidates = _populations(costs, request, options, spread)
    chosen = fastest(candidates, options) if options.time_budget is None else best(candidates, options)
    pilot = "" if spread is None else f"pilot: the log weight of a particle varies by {spread:.3f} a token"
    return Choice(tuple(candidates), chosen, _reason(options), pilot)


def _fastest_way(program: Program, request: Request) -> Choice:
    """The one-token loop, exact speculation, or SMC with the N and K that keep to the divergence allowed.

    The one-token loop runs alone. The others take turns, unless SMC would not pay where twice as few drafted tokens
    were rejected.
    """
    options, costs = program.options, cycle_model(program.target, program.draft)
    assert options.max_kl_per_token is not None
    rate, spread = _accepted(program, request, 1), _spread(program, request)
    loop = _one_token(costs, request)
    exact = _fastest(_exact(costs, request, 1, k, rate) for k in _lookaheads(options))
    near = [c for c in _populations(costs, request, options, spread) if c.meets(options)]
    easier = spread_of((1 + rate) / 2)
    later = [c for c in _populations(costs, request, options, min(spread, easier)) if c.meets(options)]
    best_exact = _fastest(_exact(costs, request, 1, k, (1 + rate) / 2) for k in _lookaheads(options))
    smc, later_smc = (_fastest(found) if found else None for found in (near, later))
    shown = tuple(c for c in (loop, exact, smc) if c is not None)
    chosen = _fastest(shown)
    pilot = f"pilot: a drafted token is accepted with probability {rate:.2f}, its log weight varies by {spread:.3f}"
    reason = f"the fastest that keeps to {options.max_kl_per_token:g} nats a token"
    population = chosen if chosen.method == "smc" else later_smc
    if chosen.method == "autoregressive" or population is None:
        return Choice(shown, chosen, reason, pilot)
    if population is not chosen and population.seconds_per_token > best_exact.seconds_per_token:
        return Choice(shown, chosen, reason, pilot)
    tradeoff = Tradeoff(
        options.max_kl_per_token,
        population.cycle_seconds,
        exact.cycle_seconds,
        exact.lookahead,
        rate,
        begin_exact=chosen.method == "speculative",
    )
    return Choice(shown, chosen, reason, pilot, tradeoff, population)


def _fastest(candidates: Iterable[Candidate]) -> Candidate:
    return min(candidates, key=lambda c: c.seconds_per_token)


def fastest(candidates: Sequence[Candidate], options: Options) -> Candidate:
    """The highest rate among those that keep to the floors."""
    return _fastest(_within(candidates, options))


def best(candidates: Sequence[Candidate], options: Options) -> Candidate:
    """The most particles, and then the fewest draft tokens, that keep to the floors."""
    return max(_within(candidates, options), key=lambda c: (c.n_particles, -c.lookahead))


def _reason(options: Options) -> str:
    floors = [f"at least {options.ess_floor:g} effective particles"] if options.ess_floor else []
    if options.max_kl_per_token is not None:
        floors.append(f"at most {options.max_kl_per_token:g} nats a token")
    if options.time_budget is None:
        return "the fastest" + (f" of those with {' and '.join(floors)}" if floors else "")
    floor = f" with {' and '.join(floors)}" if floors else ""
    what = "the most particles" if options.n_particles == AUTO else "the fewest draft tokens a cycle"
    return f"{what} within {options.time_budget:g} ms a token{floor}"


def _within(candidates: Sequence[Candidate], options: Options) -> list[Candidate]:
    found = [candidate for candidate in candidates if candidate.meets(options)]
    if found:
        return found
    nearest = []
    if options.time_budget is not None:
        c = min(candidates, key=lambda c: c.seconds_per_token)
        least = 1e3 * c.seconds_per_token
        nearest.append(f"the fastest (N={c.n_particles}, K={c.lookahead}) takes {least:.2f} ms a token")
    if options.ess_floor is not None:
        c = max(candidates, key=lambda c: c.ess or 0.0)
        nearest.append(f"the best (N={c.n_particles}, K={c.lookahead}) leaves {c.ess:.1f} effective particles")
    if options.max_kl_per_token is not None:
        c = min(candidates, key=lambda c: math.inf if c.kl is None else c.kl)
        nearest.append(f"the nearest (N={c.n_particles}, K={c.lookahead}) adds {c.kl:.3f} nats a token")
    raise OptionError(
        "no n_particles and lookahead keep to the floors",
        "; ".join(nearest),
        "lower ess_floor, raise max_kl_per_token or time_budget, or give n_particles and lookahead as numbers",
    )


def _lookaheads(options: Options) -> Sequence[int]:
    return LOOKAHEADS if options.lookahead == AUTO else (int(options.lookahead),)


def _populations(costs: CycleModel, request: Request, options: Options, spread: float | None) -> list[Candidate]:
    counts = PARTICLES if options.n_particles == AUTO else (int(options.n_particles),)
    return [_weighted(costs, request, n, k, spread) for n in counts for k in _lookaheads(options)]


def _weighted(costs: CycleModel, request: Request, n: int, k: int, spread: float | None) -> Candidate:
    candidate = _candidate(costs, request, n, k, k + 1)
    if spread is None:
        return candidate
    kl = cycle_divergence(n, k, spread) / (k + 1)
    return replace(candidate, ess=effective_particles(n, k, spread), kl=kl)


def _exact(costs: CycleModel, request: Request, n: int, k: int, rate: float) -> Candidate:
    return replace(_candidate(costs, request, n, k, expected_tokens(rate, k)), method="speculative")


def _one_token(costs: CycleModel, request: Request) -> Candidate:
    prompt, new = request.ids.shape[1], int(request.new_tokens.max())
    seconds = costs.token_seconds(prompt, new, request.batch)
    return Candidate(1, 0, seconds, 1, seconds, method="autoregressive")


def _candidate(costs: CycleModel, request: Request, n: int, k: int, tokens: float) -> Candidate:
    """Every cycle is paid whole; the first token comes with the prompt."""
    prompt, new = request.ids.shape[1], int(request.new_tokens.max())
    cycles = math.ceil((new - 1) / tokens)
    cycle = costs.cycle_seconds(n, k, prompt, cycles * (k + 1) + 1, request.batch)
    return Candidate(n, k, cycle, tokens, max(cycles, 1) * cycle / new)


# ---- the pilot ------------------------------------------------------------------------------------------------------


def _accepted(program: Program, request: Request, chains: int) -> float:
    """The probability that a drafted token is accepted."""
    exact = program.under(replace(program.options, method="speculative", max_kl_per_token=None))
    return acceptance_rate(_pilot(exact, request, chains).stats.accepted, PILOT_LOOKAHEAD)


def _spread(program: Program, request: Request) -> float:
    """sigma^2 of a token's log weight."""
    smc = program.under(replace(program.options, method="smc", max_kl_per_token=None))
    pilot = _pilot(smc, request, PILOT_PARTICLES)
    if not pilot.stats.dropped:
        return weight_variance(pilot)
    if program.method == AUTO:
        return math.inf  # exact speculation remains
    raise _broken_pilot(
        f"each of {PILOT_PARTICLES} particles got weight zero: the draft does not propose what the sampler keeps"
    )


def weight_variance(pilot: Generation) -> float:
    """sigma^2 of a token's log weight, from particles that were never resampled: the mean over requests.

    Infinite where fewer than two particles of a request are left.
    """
    drafted = pilot.particle_lengths.double().mean(1) * PILOT_LOOKAHEAD / (PILOT_LOOKAHEAD + 1)  # [B]
    found = []
    for log_w, count in zip(pilot.log_weights.double(), drafted.tolist(), strict=True):
        left = log_w[log_w.isfinite()]
        found.append(left.var().item() / count if len(left) > 1 else math.inf)
    return sum(found) / len(found)


def _pilot(program: Program, request: Request, n: int) -> Generation:
    """A few cycles of the pair on the request's own prompt, uncompiled and without resampling.

    It draws with seeds of its own: what is chosen must not depend on what the answer will draw.
    """
    if program.on_host:
        raise OptionError(
            "no pilot can run",
            "logits processors of this request keep a state of their own, which a pilot would change",
            "give n_particles and lookahead as numbers",
        )
    tokens = program.positions_left(request, PILOT_TOKENS[program.method])
    if tokens < 2:
        raise OptionError("no pilot can run", "the prompt fills all positions of the models", "shorten the prompt")
    concrete = replace(
        program.options,
        n_particles=n,
        lookahead=PILOT_LOOKAHEAD,
        ess_floor=None,
        max_kl_per_token=None,
        time_budget=None,
        ess_threshold=0.0,
        max_divergence=1.0,
    )
    short = replace(
        request,
        new_tokens=torch.full_like(request.new_tokens, tokens),
        seeds=request.seeds + PILOT_SEEDS,  # 64 bits wrap around
        stop=None,
        max_lag=None,
        watch=None,
    )
    with torch.compiler.set_stance("force_eager"):
        try:
            return replace(program.under(concrete), record=None).session.run(short)
        except GenerationError as error:
            raise _broken_pilot(f"{error.what}: {error.why}") from error


def _broken_pilot(why: str) -> OptionError:
    return OptionError(
        "the pilot that should show how the weights spread broke off",
        why,
        "give n_particles and lookahead as numbers, or truncate less",
    )
