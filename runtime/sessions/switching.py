"""SMC and exact speculation in one call: SMC while what it adds to the error is paid for, exact speculation else.

``kl_bound`` grows with the cycles of SMC alone. So each token of a text earns its share of the divergence that the
caller allows, and cycles of SMC spend it. When it is spent, one particle is drawn by its weight, its log mean weight
goes into the evidence, and exact speculation goes on from its text. Once tokens have earned enough, and enough drafted
ones are accepted, the text becomes N equal particles again.

All this is decided before a cycle draws anything, from what earlier ones have shown, so the evidence stays unbiased and
its mean logarithm still bounds the divergence. The requests of a batch switch together, by their mean.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from smc_compile.result import Generation
from smc_compile.runtime.algorithms.predictions import (
    acceptance_rate,
    cycle_divergence,
    expected_tokens,
    spread_of,
)
from smc_compile.runtime.algorithms.uniforms import Streams
from smc_compile.runtime.algorithms.weights import log_mean_exp, select
from smc_compile.runtime.execution.memory import require_memory
from smc_compile.runtime.execution.region import Region, begin_run
from smc_compile.runtime.sessions.replay import fixed
from smc_compile.runtime.sessions.run import CACHES, Run, drive, result_of
from smc_compile.runtime.sessions.smc import SMCSession
from smc_compile.runtime.sessions.speculative import Committed, SpeculativeRun, SpeculativeSession
from smc_compile.runtime.state.particles import ENDLESS, CycleState, Particles, Texts, Weights
from smc_compile.runtime.state.population import Population
from smc_compile.runtime.state.rejections import Rejections
from smc_compile.runtime.state.request import Request
from smc_compile.runtime.state.suffix_sizes import capacity_of

SHOWN = 4  # cycles of exact speculation that show how much is accepted
PRIOR = 2  # cycles that count beside them as the pilot has it: a few good ones alone promise too much
AHEAD = 4  # cycles of SMC that must be paid for before they begin
FAR = 3.0  # nats: log evidence that is lower than this beyond what is paid for says that the predictions are wrong


@dataclass(frozen=True)
class Tradeoff:
    """What decides between the two, as it was predicted.

    Attributes:
        max_kl: nats that a token may add to ``kl_bound``.
        smc_seconds: of a cycle of SMC.
        exact_seconds: of a cycle of exact speculation.
        exact_lookahead: draft tokens of such a cycle.
        acceptance: the probability that a drafted token is accepted.
        begin_exact: whether a call begins with exact speculation.
    """

    max_kl: float
    smc_seconds: float
    exact_seconds: float
    exact_lookahead: int
    acceptance: float
    begin_exact: bool


@dataclass
class Ledger:
    """What the requests of a call have spent, by their numbers: nats that the weights of their cycles let expect."""

    paid: dict[int, float] = field(default_factory=dict)  # by populations that were resampled
    open: dict[int, float] = field(default_factory=dict)  # by the one that goes on
    cycles: int = 0  # of SMC
    accepted: list[float] = field(default_factory=list)  # drafted tokens a request, of each cycle of this exact phase
    widths: list[float] = field(default_factory=list)  # tokens a request, of each cycle of this phase of SMC

    def spent(self, number: int) -> float:
        """Of one request."""
        return self.paid.get(number, 0.0) + self.open.get(number, 0.0)


class SwitchingSession:
    """Both methods on one pair, with N particles or one chain."""

    def __init__(
        self,
        smc: SMCSession,
        exact: SpeculativeSession,
        n: int,
        lookahead: int,
        tradeoff: Tradeoff,
    ) -> None:
        """Both sessions share models and text processors; n, lookahead: of SMC."""
        self._smc, self._exact, self._n, self._tradeoff = smc, exact, n, tradeoff
        self._k, self._exact_k = lookahead, tradeoff.exact_lookahead
        self._models = exact.models
        self._sizes: set[int] = set()

    @property
    def regions(self) -> list[Region]:
        return list(dict.fromkeys([*self._smc.regions, *self._exact.regions]))

    @torch.no_grad()
    def run(self, request: Request) -> Generation:
        """Generate; raises as the two do. N particles must fit into memory, whatever a call begins with."""
        ledger = Ledger()
        longest = max(self._k, self._exact_k)
        capacity = capacity_of(int(request.new_tokens.max()), longest + 1)
        require_memory(request, self._n, capacity, longest + 1, *self._models)
        most = int(request.new_tokens.max())
        run: Run
        if self._tradeoff.begin_exact:
            run = self._exact.begun(request, self.regions, longest, self._smc.check_draft)
            run.p.copies = self._n
        else:
            run = self._smc.begun(request, self.regions, longest)
        run.rejections = run.rejections or Rejections.start(request, 1, self._exact_k)
        run.streams = Streams(run.request.seeds, self._n, run.p.state.texts.tokens.shape[1], most)
        run.stats.method = "auto"

        def advance(run: Run) -> Run:
            run = self._chosen(run, ledger)
            if not isinstance(run, SpeculativeRun):
                run = self._smc.advance(run)
                self._note(run, ledger)
                return run
            assert run.rejections is not None
            live, before = int((run.p.wanted(run.request) > 0).sum()), run.rejections.accepted
            self._exact.advance(run)
            ledger.accepted.append((run.rejections.accepted - before) / max(live, 1))
            run.stats.exact_cycles += 1
            return run

        return drive(run, self._models, self._sizes, advance, result_of)

    # ---- deciding ----------------------------------------------------------------------------------------------------

    def _chosen(self, run: Run, ledger: Ledger) -> Run:
        """The run as the next cycle needs it."""
        if isinstance(run, SpeculativeRun):
            return self._to_smc(run) if self._affordable(run, ledger) else run
        leaves = run.p.ess and (self._overspent(run, ledger) or self._slow(ledger))
        return self._to_exact(run, ledger) if leaves else run

    def _note(self, run: Run, ledger: Ledger) -> None:
        """Enter what the last cycle of SMC has spent."""
        even = (run.p.state.weights.log_w == 0).all(1).tolist()  # as resampling leaves them
        assert run.p.cost is not None
        ledger.cycles += 1
        ledger.widths.append(float(run.p.widths[-1].double().mean()))
        for number, spent, resampled in zip(run.request.number, run.p.cost.tolist(), even, strict=True):
            ledger.open[number] = 0.0 if resampled else spent
            ledger.paid[number] = ledger.paid.get(number, 0.0) + spent * resampled

    def _overspent(self, run: Run, ledger: Ledger) -> bool:
        """Whether the next cycle cannot be paid for, where it costs what those before did."""
        allowed = self._tradeoff.max_kl * (self._tokens(run) + self._k + 1)
        spent, seen = self._spent(run, ledger)
        return spent * (1 + 1 / ledger.cycles) > allowed or seen > allowed + FAR

    def _slow(self, ledger: Ledger) -> bool:
        """Whether cuts leave so little of the blocks that exact speculation would be faster."""
        shown, t = ledger.widths[-SHOWN:], self._tradeoff
        exact = expected_tokens(t.acceptance, self._exact_k) / t.exact_seconds
        return len(shown) == SHOWN and sum(shown) / SHOWN / t.smc_seconds < exact

    def _affordable(self, run: Run, ledger: Ledger) -> bool:
        shown = ledger.accepted[-SHOWN:]
        if len(shown) < SHOWN:
            return False
        t = self._tradeoff
        usual = expected_tokens(t.acceptance, self._exact_k) - 1
        rate = acceptance_rate((sum(shown) + PRIOR * usual) / (SHOWN + PRIOR), self._exact_k)
        each = cycle_divergence(self._n, self._k, spread_of(rate))
        faster = (self._k + 1) / t.smc_seconds > expected_tokens(rate, self._exact_k) / t.exact_seconds
        allowed = t.max_kl * (self._tokens(run) + AHEAD * (self._k + 1))
        spent, seen = self._spent(run, ledger)
        return faster and each <= t.max_kl * (self._k + 1) and max(spent, seen) + AHEAD * each <= allowed

    def _going(self, run: Run) -> list[int]:
        """The places of the requests that go on."""
        return [b for b, number in enumerate(run.request.number) if number not in run.gone]

    def _tokens(self, run: Run) -> float:
        return float(run.p.made[self._going(run)].double().mean())

    def _spent(self, run: Run, ledger: Ledger) -> tuple[float, float]:
        """Nats by the ledger, and by the log evidence: means over the requests that go on."""
        on = self._going(run)
        seen = -evidence_now(run.p.state.weights)[on]
        return sum(ledger.spent(run.request.number[b]) for b in on) / len(on), float(seen.mean())

    # ---- switching ---------------------------------------------------------------------------------------------------

    def _to_exact(self, run: Run, ledger: Ledger) -> SpeculativeRun:
        """One particle of each request, drawn by its weight."""
        p, n, weights, cap = run.p, run.p.n, run.p.state.weights, run.request.new_tokens
        chosen = select(weights.log_w, run.streams.choose(len(p.ess)))  # [B]
        rows = chosen + n * torch.arange(len(chosen), device=chosen.device)
        length = p.lengths(run.eos_ids)[rows]
        ended = length < ENDLESS
        generated = torch.where(ended, length, p.state.generated).minimum(cap)
        p.ancestors[-1] = p.ancestors[-1].gather(1, chosen[:, None]).expand(-1, n)  # all go on with one
        for number in run.request.number:
            ledger.paid[number], ledger.open[number] = ledger.spent(number), 0.0
        ledger.accepted.clear()
        ledger.widths.clear()
        one = weights.log_w.new_zeros(len(chosen), 1)
        state = self._moved(
            p.state,
            rows,
            Particles.unconditioned(ended, length),
            Weights(one, evidence_now(weights), weights.shared.new_zeros(len(chosen), 1, 1), weights.dropped),
            generated,
        )
        after = Committed(n=1, copies=n, state=state, made=generated.cpu(), **history(p))
        return self._continued(run, SpeculativeRun, after, chains=1)

    def _to_smc(self, run: SpeculativeRun) -> Run:
        """N particles with the text of each request."""
        p, n, weights, ended = run.p, self._n, run.p.state.weights, run.p.state.particles.ended
        batch = len(ended)
        rows = torch.arange(batch, device=ended.device).repeat_interleave(n)
        generated = p.count.clamp_min(2)  # one that ended with its first token stands behind it, as others would
        length = torch.where(ended, p.count, ENDLESS)[rows]
        equal = weights.log_w.new_zeros(batch, n)
        shared = (generated - 1)[:, None, None].expand(-1, n, n).contiguous()
        state = self._moved(
            p.state,
            rows,
            Particles.unconditioned(ended[rows], length),
            Weights(equal, weights.log_evidence, shared, weights.dropped),
            generated,
        )
        after = Population(n=n, state=state, made=generated.cpu(), **history(p))
        return self._continued(run, Run, after)

    def _moved(
        self, state: CycleState, rows: Tensor, particles: Particles, weights: Weights, generated: Tensor
    ) -> CycleState:
        """The texts and caches of ``rows`` [R], with these fields beside them."""
        texts = Texts(*(value[rows] for value in state.texts))
        caches = {
            name: model.rows(getattr(state, name), rows) for name, model in zip(CACHES, self._models, strict=True)
        }
        return CycleState(texts, particles, weights, **caches, generated=generated)

    def _continued(self, run: Run, kind: type[Run], p: Population, **more: int) -> Run:
        """``run`` with other particles. Its keys are its own: a recording knows by them whose tensors it holds."""
        begin_run()
        own = {f.name: getattr(run, f.name) for f in fields(Run)}
        after = kind(**{**own, "p": p, "keys": fixed(run.keys), "reported": None}, **more)
        after.gone = run.gone
        after.stats.switches += 1
        return after


def history(p: Population) -> dict[str, list[Tensor]]:
    """What a population tells of its cycles."""
    return {"ess": p.ess, "widths": p.widths, "ancestors": p.ancestors, "lag": p.lag}


def evidence_now(weights: Weights) -> Tensor:
    """[B], the log evidence with the mean weight of the population."""
    return weights.log_evidence + log_mean_exp(weights.log_w)
