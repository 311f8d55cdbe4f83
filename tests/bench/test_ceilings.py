"""What a machine allows: rates, and the least a cycle can cost."""

from __future__ import annotations

import pytest
import torch

from smc_compile.bench.ceilings import (
    Ceilings,
    ModelSize,
    PassCost,
    arithmetic_share,
    bandwidth_share,
    costs,
    cycle_passes,
    least_seconds,
    loop_passes,
    measure_ceilings,
    model_pass,
)
from smc_compile.pairs.llama import Llama, LlamaConfig

MACHINE = Ceilings(bytes_per_second=1e9, operations_per_second=1e10)
TARGET, DRAFT = ModelSize(10**6, 4, 100), ModelSize(10**5, 4, 10)


def pass_seconds(rows: int, cached_tokens: float) -> float:
    return least_seconds(MACHINE, [model_pass(TARGET, rows, cached_tokens)])


def test_few_rows_wait_for_the_weights_and_many_for_the_products():
    assert pass_seconds(1, 0) == pytest.approx(4e6 / 1e9)
    assert pass_seconds(1, 5000) == pytest.approx((4e6 + 5e5) / 1e9)
    assert pass_seconds(100, 0) == pytest.approx(2e8 / 1e10)


def test_a_loop_reads_the_target_once_a_token():
    bound = least_seconds(MACHINE, loop_passes(TARGET, prompt=100, new_tokens=200))
    assert bound == pytest.approx((4e6 + 200 * 100) / 1e9)


def test_a_cycle_is_k_passes_of_the_draft_and_one_of_the_target():
    bound = least_seconds(MACHINE, cycle_passes(TARGET, DRAFT, particles=4, lookahead=8, prompt=0, new_tokens=0))
    draft, target = 4e5 / 1e9, 2 * 1e6 * 36 / 1e10
    assert bound == pytest.approx(8 * draft + target)


def test_the_prompt_is_read_once_for_all_particles():
    def extra(particles: int) -> float:
        given = {"particles": particles, "lookahead": 1, "new_tokens": 0}
        long, short = (cycle_passes(TARGET, DRAFT, prompt=prompt, **given) for prompt in (1000, 0))
        return least_seconds(MACHINE, long) - least_seconds(MACHINE, short)

    assert extra(1) == pytest.approx(1000 * (100 + 10) / 1e9)
    assert extra(2) == pytest.approx(extra(1))


def test_shares_are_of_what_the_device_could_have_done_meanwhile():
    passes = [PassCost(bytes=1e9, operations=1e9), PassCost(bytes=1e9, operations=3e9)]
    assert bandwidth_share(MACHINE, passes, seconds=4.0) == pytest.approx(0.5)
    assert arithmetic_share(MACHINE, passes, seconds=4.0) == pytest.approx(0.1)


def test_weights_are_the_matrices():
    model = Llama(LlamaConfig(50, 16, 2, 2, 1, 24)).bfloat16()
    layer = 16 * (16 + 8 + 8 + 16) + 3 * 16 * 24
    assert costs(model, 64) == ModelSize(50 * 16 + 2 * layer, 2, 128)


def test_rates_are_measured():
    found = measure_ceilings(torch.float32, torch.device("cpu"))
    assert 1e8 < found.bytes_per_second < 1e13
    assert 1e8 < found.operations_per_second < 1e15
    assert found.better(MACHINE) == Ceilings(max(1e9, found.bytes_per_second), max(1e10, found.operations_per_second))
