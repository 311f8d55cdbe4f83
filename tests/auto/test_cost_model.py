"""Seconds of a cycle from counted costs and rates: by hand on rates that make sums easy."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache

import pytest
import torch
from helpers.model_parts import perturbed
from helpers.toys import TinyTransformerLM

from smc_compile.auto.calibration import RESIDENT, ROWS, SMALL, STREAMED, Rates, rates
from smc_compile.auto.cost_model import CycleModel, cycle_model
from smc_compile.auto.graph_costs import SYMBOLS, pass_costs
from smc_compile.errors import OptionError
from smc_compile.options import Options
from smc_compile.pairs.llama import Llama, LlamaConfig
from smc_compile.program.build import build_program
from smc_compile.program.draft_distribution import draft_distribution_for
from smc_compile.program.model import compile_model
from smc_compile.program.program import Program
from smc_compile.runtime.algorithms.next_token import SETTINGS, NextTokenDistribution

FREE = Rates(*[(0.0,) * len(ROWS)] * 3, *[0.0] * (len(fields(Rates)) - 3))
MODEL = TinyTransformerLM()
DRAFT = perturbed(MODEL)
IDS = torch.zeros(1, 3, dtype=torch.int64)


def with_rates(**given: object) -> CycleModel:
    return replace(counted(), rates=replace(FREE, **given))


@cache
def counted() -> CycleModel:
    program = pair()
    return cycle_model(program.target, program.draft)


def pair() -> Program:
    return program_of(MODEL, DRAFT)


def program_of(model: torch.nn.Module, draft: torch.nn.Module) -> Program:
    warpers = (SETTINGS["temperature"][0],)
    options = Options.parse({"draft": draft, "compiler": "eager", "validate": False})
    target = compile_model(model, NextTokenDistribution("logits", warpers=warpers), options, IDS, "target")
    return build_program(target, options, draft_distribution_for(warpers, False), IDS)


def test_a_cycle_is_a_head_of_two_tokens_steps_of_one_and_a_score():
    model = with_rates(element_byte=1.0)

    def moved(of, tokens: int) -> float:
        """All of its element-wise traffic."""
        at = dict(zip(SYMBOLS, (1, 4, tokens, 7, 9), strict=True))
        kernels = (k for k in of.costs.kernels if k.kind == "other")
        return float(sum(k.count * sum(k.bytes.values()) for k in kernels).subs(at))

    expected = moved(model.draft, 2) + 4 * moved(model.draft, 1) + moved(model.target, 6)
    assert model.cycle_seconds(4, 5, 7, 9) == pytest.approx(expected)


def test_the_host_and_the_calls_of_compiled_functions_are_paid():
    model = with_rates(call=1.0, cycle=100.0, step=10.0)
    passes = 5 * model.draft.calls + model.target.calls
    assert model.cycle_seconds(4, 5, 7, 9) == pytest.approx(passes + 3 + 100 + 50)
    assert model.target.calls == 1, "two layers are not outlined"


def test_products_are_timed_by_their_rows():
    model = with_rates(small=tuple(float(rows) for rows in ROWS))
    linear = [k for k in model.target.costs.kernels if k.kind == "linear"]
    numbers = sum(k.count * k.weight_bytes // 4 for k in linear)
    assert model.pass_seconds(model.target, 2, 3, 4, 7, 9, 9) == pytest.approx(numbers * 2 * 3 * 4)


def test_attention_on_a_cpu_passes_over_slots_that_hold_nothing():
    target, draft = (Llama(LlamaConfig(17, 32, layers, 2, 1, 48)).eval() for layers in (2, 1))
    program = program_of(target, draft)
    free = replace(FREE, attention_operation=1.0)
    model = replace(cycle_model(program.target, program.draft), rates=free)
    queries, layers, width = 2 * 2 * 3, 2, 16  # particles, heads, tokens
    assert model.pass_seconds(model.target, 1, 2, 3, 7, 100, 10) == layers * 2 * queries * 2 * width * (7 + 10)
    elsewhere = replace(model, device=torch.device("cuda"))
    assert elsewhere.pass_seconds(model.target, 1, 2, 3, 7, 100, 10) == layers * 2 * queries * 2 * width * (7 + 100)


def test_a_vocabulary_is_counted_with_the_draw():
    """The target's rows are normalised, a token is drawn: more traffic than the graph alone."""
    program = pair()
    assert program.target.traced is not None
    alone = pass_costs(program.target.traced.cached, program.target.runtime.weights(), True)
    assert counted().target.costs.launches > alone.launches
    assert counted().target.costs.operations == alone.operations


def test_rates_are_interpolated_and_go_on_beyond_what_was_measured():
    near, far = tuple(1.0 * r for r in ROWS), tuple(3.0 * r for r in ROWS)
    found = replace(FREE, small=near, resident=near, streamed=far)
    assert found.product(SMALL, 5, 1e12, 4) == SMALL * 5
    assert found.product(SMALL + 1, 6, RESIDENT * 4, 4) == (SMALL + 1) * 6
    assert found.product(SMALL + 1, 6, STREAMED * 8, 4) == (SMALL + 1) * 18
    halfway = (4 * RESIDENT * STREAMED) ** 0.5
    assert found.product(SMALL + 1, 6, halfway, 4) == pytest.approx((SMALL + 1) * 12)
    assert found.product(SMALL, 10 * ROWS[-1], 1e12, 4) == SMALL * 10 * ROWS[-1]


def test_rates_are_measured_once():
    found = rates(torch.float32, torch.device("cpu"))
    assert rates(torch.float32, torch.device("cpu")) is found
    assert min(found.attention, found.attention_byte, found.attention_operation, found.element_byte) > 0
    assert min(found.batched_byte, found.batched_operation, found.launch, found.call) > 0
    assert min(*found.small, *found.resident, *found.streamed) > 0


def test_a_model_with_a_state_of_its_own_is_refused():
    class Stateful:
        def initial_state(self, batch: int) -> torch.Tensor:
            return torch.zeros(batch, 1)

        def step(self, tokens, pos, state):
            return torch.zeros(*tokens.shape, 4), state

    options = Options.parse({"draft": Stateful()})
    target = compile_model(MODEL, NextTokenDistribution("logits"), options, IDS, "target")
    program = build_program(target, options, NextTokenDistribution("logits"), IDS)
    with pytest.raises(OptionError, match="state of its own"):
        cycle_model(program.target, program.draft)


def test_more_tokens_a_cycle_cost_more():
    costs = replace(counted(), rates=rates(torch.float32, torch.device("cpu")))
    few, many = (costs.cycle_seconds(2, lookahead, 3, 24) for lookahead in (1, 8))
    assert 0 < few < many
