"""How long a cycle of N particles and K draft tokens takes: counted costs of its passes times the rates of the machine.

Products with a weight and attention are timed as they run (``calibration``); every other kernel takes the
longer of what its bytes and its operations need (the roofline model: Williams, Waterman and Patterson, 2009). Each is
launched, regions add the calls of what was compiled, and a cycle what the host does between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import sympy
import torch
from torch import Tensor

from smc_compile.auto.calibration import Rates, rates
from smc_compile.auto.graph_costs import SYMBOLS, Costs, Kernel, PassSizes, pass_costs
from smc_compile.errors import OptionError
from smc_compile.passes.ir import CachedLM
from smc_compile.runtime.algorithms.next_token import SETTINGS, Mixture, NextTokenDistribution
from smc_compile.runtime.execution.incremental import CachedModel
from smc_compile.runtime.execution.region_bodies import choose, judge
from smc_compile.runtime.state.region_types import EosIds
from smc_compile.runtime.state.suffix_sizes import mean_slots

META = torch.device("meta")
_passes: WeakKeyDictionary[Any, dict[NextTokenDistribution | Mixture, Pass]] = WeakKeyDictionary()
SMALL_CALLS = 3  # compiled functions of a cycle that are no passes of a model: the weights and what moves particles


@dataclass(frozen=True)
class Pass:
    """One region with a model in it.

    Attributes:
        costs: of one call, as expressions in B, N, T, P, S.
        calls: compiled functions that it calls: one, or head, layers and tail.
        arguments: tensors that these are given in all.
    """

    costs: Costs
    calls: int
    arguments: int

    @cached_property
    def numbers(self) -> Callable[..., list[list[float]]]:
        """Sizes to rows, operations and bytes of each of the kernels."""
        kernels = [[k.rows, k.operations, sum(k.bytes.values())] for k in self.costs.kernels]
        return sympy.lambdify(SYMBOLS, kernels, "math")  # type: ignore[no-any-return]

    @cached_property
    def working_set(self) -> int:
        """Bytes of the weights that it multiplies with."""
        return sum(k.count * k.weight_bytes for k in self.costs.kernels)


@dataclass(frozen=True)
class CycleModel:
    """Predicts the cycles of a target and a draft on one device.

    Attributes:
        target, draft: the passes of a cycle.
        one: the target's pass over one token, which draws it.
        dtype, device: of the weights.
        rates: of the machine.
    """

    target: Pass
    draft: Pass
    one: Pass
    dtype: torch.dtype
    device: torch.device
    rates: Rates

    def pass_seconds(
        self, of: Pass, batch: int, particles: int, tokens: int, prompt: int, suffix: float, held: float
    ) -> float:
        """Seconds of one pass over ``tokens`` new tokens a particle, with P prompt and S suffix positions.

        ``held`` of the suffix positions hold something; on a CPU attention passes over the others.
        """
        numbers = of.numbers(batch, particles, tokens, prompt, suffix)
        seen = of.numbers(batch, particles, tokens, prompt, held) if self.device.type == "cpu" else numbers
        kernels = sum(
            kernel.count * self._kernel_seconds(kernel, of.working_set, *(few if kernel.kind == "attention" else all_))
            for kernel, all_, few in zip(of.costs.kernels, numbers, seen, strict=True)
        )
        return kernels + of.calls * self.rates.call + of.arguments * self.rates.argument

    def _kernel_seconds(self, kernel: Kernel, working_set: int, rows: float, operations: float, moved: float) -> float:
        rate, size = self.rates, self.dtype.itemsize
        if kernel.kind == "linear":
            return rate.launch + rate.product(kernel.weight_bytes // size, rows, working_set, size)
        if kernel.kind == "attention":
            return rate.attention + max(moved * rate.attention_byte, operations * rate.attention_operation)
        if kernel.kind == "batched":
            return rate.launch + max(moved * rate.batched_byte, operations * rate.batched_operation)
        return rate.launch + moved * rate.element_byte

    def cycle_seconds(self, particles: int, lookahead: int, prompt: int, capacity: int, batch: int = 1) -> float:
        """Seconds of a cycle in which every particle drafts K tokens and the target judges K+1 positions.

        The mean over an answer that fills ``capacity`` slots of its own: they are allocated as it grows.
        """
        suffix, held = mean_slots(capacity, lookahead + 1, prompt)
        return self.seconds_at(particles, lookahead, prompt, suffix, held, batch)

    def token_seconds(self, prompt: int, new_tokens: int, batch: int = 1) -> float:
        """Seconds of a token of the one-token loop, the mean over an answer."""
        sizes = (prompt, *mean_slots(new_tokens, 1, prompt))
        return self.pass_seconds(self.one, batch, 1, 1, *sizes) + self.rates.cycle + self.rates.call

    def seconds_at(
        self, particles: int, lookahead: int, prompt: int, suffix: float, held: float, batch: int = 1
    ) -> float:
        """As ``cycle_seconds``, of one cycle: with S slots of which ``held`` hold something."""
        sizes = (prompt, suffix, held)
        head = self.pass_seconds(self.draft, batch, particles, 2, *sizes)
        step = self.pass_seconds(self.draft, batch, particles, 1, *sizes)
        score = self.pass_seconds(self.target, batch, particles, lookahead + 1, *sizes)
        host = self.rates.cycle + lookahead * self.rates.step + SMALL_CALLS * self.rates.call
        return head + (lookahead - 1) * step + score + host


def cycle_model(target: Any, draft: Any) -> CycleModel:
    """The model of a compiled pair, the two sides of a program.

    Raises:
        OptionError: a side carries a state of its own (step protocol): there is no graph to count.
        CacheError: a graph's costs are no expressions in its sizes.
    """
    for name, model in (("target", target), ("draft", draft)):
        if not isinstance(model.runtime, CachedModel):
            raise OptionError(
                "the cost of a cycle cannot be predicted",
                f"the {name} carries a state of its own (step protocol), and the compiler does not see its work",
                "give n_particles and lookahead as numbers",
            )
    weight = next(w for w in target.runtime.weights() if w.is_floating_point() and w.dim() > 1)
    return CycleModel(
        _pass(target, every_position=True),
        _pass(draft, every_position=False),
        _pass(target, every_position=False),
        weight.dtype,
        weight.device,
        rates(weight.dtype, weight.device),
    )


def _pass(model: Any, every_position: bool) -> Pass:
    """A region with ``model`` in it: counted once for a graph and a distribution."""
    cached: CachedLM = model.traced.cached
    known = _passes.setdefault(cached.score if every_position else cached.advance, {})
    if model.distribution not in known:
        known[model.distribution] = _count(model, cached, every_position)
    return known[model.distribution]


def _count(model: Any, cached: CachedLM, every_position: bool) -> Pass:
    weights = model.runtime.weights()
    costs = pass_costs(
        cached,
        weights,
        every_position,
        _judging(model.distribution) if every_position else _choosing(model.distribution),
    )
    graph: Any = cached.score if every_position else cached.advance
    if hasattr(graph, "reads"):
        return Pass(costs, len(graph.reads) + 1, sum(len(read) for read in graph.reads))
    return Pass(costs, 1, len(weights) + 2 * len(cached.sites) + len(cached.table_axes) + 4)


# ---- what a region does with a model's rows, on tensors without data ------------------------------------------------


def _choosing(distribution: NextTokenDistribution | Mixture) -> Any:
    chosen = choose(distribution)

    def tail(rows: Tensor, z: PassSizes) -> Any:
        r = z.rows
        return chosen(rows, _ids(r, z.tokens), _flags(r), _eos_ids(r), _settings(distribution, r), _reals(r))

    return tail


def _judging(distribution: NextTokenDistribution) -> Any:
    judged = judge(distribution)

    def tail(rows: Tensor, z: PassSizes) -> Any:
        r, width = z.rows, z.tokens
        drafted = _reals(r, width - 1)
        stops = torch.zeros(r, width, dtype=torch.bool, device=META)
        ended, remaining = _flags(r), _ids(r)
        of_block = (_ids(r, width), drafted, (), _reals(1, r).double(), ended, stops, _eos_ids(r), remaining)
        return judged(rows, *of_block, _settings(distribution, r), _reals(r, width))

    return tail


def _ids(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device=META)


def _reals(*shape: int) -> Tensor:
    return torch.empty(shape, device=META)


def _flags(rows: int) -> Tensor:
    return torch.empty(rows, dtype=torch.bool, device=META)


def _eos_ids(rows: int) -> EosIds:
    return EosIds(_ids(rows, 4), _ids(rows))


def _settings(distribution: NextTokenDistribution | Mixture, rows: int) -> dict[str, Tensor]:
    """All that a distribution's stages can ask for."""
    return {name: torch.empty(rows, dtype=torch.float64, device=META) for name in SETTINGS}
