"""Choose N and K of a program for its first request: predicted costs against what a short pilot shows of the pair.

SMC: log weights of a cycle of K tokens from equal weights have variance K * sigma^2, where sigma^2 is that of one
token's increment log p - log q. If they are normal, N particles are worth N / (1 + cv^2) = N * exp(-K * sigma^2)
(effective sample size: Kong, Liu and Wong, 1994, with the coefficient of variation of a log-normal variable).

Rejection: if each drafted token is accepted with probability a, a cycle commits (1 - a^(K+1)) / (1 - a) tokens
(Leviathan, Kalman and Matias, 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch

from smc_compile.auto.cost_model import CycleModel, cycle_model
from smc_compile.errors import GenerationError, OptionError
from smc_compile.options import AUTO, Options
from smc_compile.program.checks import check_request
from smc_compile.program.program import Program
from smc_compile.result import Generation
from smc_compile.runtime.state.request import Request

LOOKAHEADS = (1, 2, 3, 4, 6, 8, 10, 12, 16)
PARTICLES = (2, 4, 8, 16, 32, 64)
PILOT_PARTICLES, PILOT_LOOKAHEAD = 32, 4
PILOT_TOKENS = {"smc": 21, "speculative": 61}  # a cycle of SMC has many particles to learn from

_settled: WeakKeyDictionary[Program, Program] = WeakKeyDictionary()  # by the program whose N or K were open
_choices: WeakKeyDictionary[Program, Choice] = WeakKeyDictionary()  # by the program that follows the choice


def settled(program: Program, request: Request) -> Program:
    """The program with numbers for N and K: itself, or one that follows the choice made for its first request.

    Raises:
        OptionError: no N and K keep to the floors that the options set, or nothing can be predicted.
        InputError: the request does not fit the models.
    """
    if not program.options.is_auto or program.method == "autoregressive":
        return program
    if program not in _settled:
        check_request(request, program.target, program.draft)
        choice = choose(program, request)
        _settled[program] = program.under(choice.applied(program.options))
        _choices[_settled[program]] = choice
    return _settled[program]


def choice_of(program: Program) -> Choice | None:
    """The choice that a program follows; None where its N and K were given."""
    return _choices.get(program)


@dataclass(frozen=True)
class Candidate:
    """One N and K.

    Attributes:
        cycle_seconds: predicted.
        tokens: that a cycle commits, expected.
        seconds_per_token: of one request, prefill apart; the last cycle of a short text may be cut.
        ess: effective particles at the end of a cycle; None where no pilot ran.
    """

    n_particles: int
    lookahead: int
    cycle_seconds: float
    tokens: float
    seconds_per_token: float
    ess: float | None = None

    def meets(self, options: Options) -> bool:
        """Whether it keeps to the floors."""
        slow = options.time_budget is not None and 1e3 * self.seconds_per_token > options.time_budget
        poor = options.ess_floor is not None and (self.ess is None or self.ess < options.ess_floor)
        return not slow and not poor


@dataclass(frozen=True)
class Choice:
    """What was chosen, from what, and why.

    Attributes:
        candidates: all that were compared.
        chosen: one of them.
        reason: in a sentence.
        pilot: what the pilot run found; empty where none ran.
    """

    candidates: tuple[Candidate, ...]
    chosen: Candidate
    reason: str
    pilot: str = ""

    def applied(self, options: Options) -> Options:
        """The options with what was chosen; the floors have done their work."""
        chosen = self.chosen
        return replace(
            options, n_particles=chosen.n_particles, lookahead=chosen.lookahead, ess_floor=None, time_budget=None
        )

    def report(self) -> list[str]:
        """Lines for a person: the choice, the pilot, and the candidates nearest to it."""
        chosen = self.chosen
        lines = [f"N={chosen.n_particles}, K={chosen.lookahead}: {self.reason}"]
        lines += [self.pilot] if self.pilot else []
        lines.append("    N   K  ms/cycle  tokens/cycle  ms/token  tokens/s" + ("     ESS" if chosen.ess else ""))
        return lines + [_row(candidate, candidate is chosen) for candidate in self._shown()]

    def _shown(self) -> list[Candidate]:
        """All of the chosen K, and the K around it at the chosen N."""
        near = [c for c in self.candidates if c.n_particles == self.chosen.n_particles]
        others = [c for c in self.candidates if c.lookahead == self.chosen.lookahead and c not in near]
        return sorted([*near, *others], key=lambda c: (c.n_particles, c.lookahead))


def _row(c: Candidate, is_chosen: bool) -> str:
    ess = "" if c.ess is None else f"{c.ess:8.1f}"
    shape = f"{'>' if is_chosen else ' '} {c.n_particles:3d} {c.lookahead:3d}"
    per_token = f"{1e3 * c.seconds_per_token:9.2f} {1 / c.seconds_per_token:9.1f}"
    return f"{shape} {1e3 * c.cycle_seconds:9.2f} {c.tokens:13.2f} {per_token}{ess}"


def choose(program: Program, request: Request) -> Choice:
    """N and K for a request's batch, prompt length and number of new tokens.

    Raises:
        OptionError: a model has no graph to count, no candidate keeps to the floors, or no pilot can run.
        CacheError: a model's costs cannot be counted.
    """
    options = program.options
    costs = cycle_model(program.target, program.draft)
    if program.method == "speculative":
        rate = acceptance_rate(_pilot(program, request, program.rows).stats.accepted, PILOT_LOOKAHEAD)
        candidates = [_exact(costs, request, program.rows, k, rate) for k in LOOKAHEADS]
        chosen = fastest(candidates, options)
        pilot = f"pilot: a drafted token is accepted with probability {rate:.2f}"
        return Choice(tuple(candidates), chosen, _reason(options), pilot)
    spread = weight_variance(_pilot(program, request, PILOT_PARTICLES)) if options.ess_floor is not None else None
    counts = PARTICLES if options.n_particles == AUTO else (int(options.n_particles),)
    lookaheads = LOOKAHEADS if options.lookahead == AUTO else (int(options.lookahead),)
    candidates = [_weighted(costs, request, n, k, spread) for n in counts for k in lookaheads]
    chosen = fastest(candidates, options) if options.time_budget is None else best(candidates, options)
    pilot = "" if spread is None else f"pilot: the log weight of a particle varies by {spread:.3f} a token"
    return Choice(tuple(candidates), chosen, _reason(options), pilot)


def fastest(candidates: Sequence[Candidate], options: Options) -> Candidate:
    """The highest rate among those that keep to the floors."""
    return min(_within(candidates, options), key=lambda c: c.seconds_per_token)


def best(candidates: Sequence[Candidate], options: Options) -> Candidate:
    """The most particles, and then the fewest draft tokens, that keep to the floors."""
    return max(_within(candidates, options), key=lambda c: (c.n_particles, -c.lookahead))


def _reason(options: Options) -> str:
    if options.time_budget is None:
        floor = f" of those with at least {options.ess_floor:g} effective particles" if options.ess_floor else ""
        return f"the fastest{floor}"
    floor = f" with at least {options.ess_floor:g} effective particles" if options.ess_floor else ""
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
    raise OptionError(
        "no n_particles and lookahead keep to the floors",
        "; ".join(nearest),
        "lower ess_floor, raise time_budget, or give n_particles and lookahead as numbers",
    )


def _weighted(costs: CycleModel, request: Request, n: int, k: int, spread: float | None) -> Candidate:
    ess = None if spread is None else effective_particles(n, k, spread)
    return _candidate(costs, request, n, k, k + 1, ess)


def _exact(costs: CycleModel, request: Request, n: int, k: int, rate: float) -> Candidate:
    return _candidate(costs, request, n, k, expected_tokens(rate, k), None)


def _candidate(costs: CycleModel, request: Request, n: int, k: int, tokens: float, ess: float | None) -> Candidate:
    """Every cycle is paid whole; the first token comes with the prompt."""
    prompt, new = request.ids.shape[1], int(request.new_tokens.max())
    cycles = math.ceil((new - 1) / tokens)
    cycle = costs.cycle_seconds(n, k, prompt, cycles * (k + 1) + 1, request.batch)
    return Candidate(n, k, cycle, tokens, max(cycles, 1) * cycle / new, ess)


def effective_particles(n: int, lookahead: int, spread: float) -> float:
    """N * exp(-K * sigma^2), and one at least; none where no weight is left."""
    return max(1.0, n * math.exp(-lookahead * spread)) if math.isfinite(spread) else 0.0


def expected_tokens(rate: float, lookahead: int) -> float:
    """Tokens that a cycle of rejection commits: (1 - a^(K+1)) / (1 - a)."""
    return sum(rate**i for i in range(lookahead + 1))


def acceptance_rate(accepted: float, lookahead: int) -> float:
    """The probability a for which a cycle accepts so many of K drafted tokens: sum of a^k over k = 1 .. K."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, lookahead) - 1 < accepted else (low, middle)
    return low


# ---- the pilot ------------------------------------------------------------------------------------------------------


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
    """A few cycles of the pair on the request's own prompt, uncompiled and without resampling."""
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
        time_budget=None,
        ess_threshold=0.0,
        max_divergence=1.0,
    )
    short = replace(
        request, new_tokens=torch.full_like(request.new_tokens, tokens), stop=None, max_lag=None, watch=None
    )
    with torch.compiler.set_stance("force_eager"):
        try:
            result = replace(program.under(concrete), record=None).session.run(short)
        except GenerationError as error:
            raise _broken_pilot(f"{error.what}: {error.why}") from error
    if result.stats.dropped:
        raise _broken_pilot(f"each of {n} particles got weight zero: the draft does not propose what the sampler keeps")
    return result


def _broken_pilot(why: str) -> OptionError:
    return OptionError(
        "the pilot that should show how the weights spread broke off",
        why,
        "give n_particles and lookahead as numbers, or truncate less",
    )
