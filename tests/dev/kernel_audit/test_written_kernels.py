"""Kernels in C++ are compared with float64 on random shapes; what is wrong is seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from smc_compile.dev.kernel_audit import time_regions
from smc_compile.dev.kernel_audit.written_kernels import WRITTEN_BY_HAND, WrittenKernel, check_by_hand

SMALL = [replace(entry, typical=entry.operands) for entry in WRITTEN_BY_HAND]
each = pytest.mark.parametrize("entry", SMALL, ids=lambda entry: entry.name)


@pytest.fixture(scope="module", autouse=True)
def small_flush() -> Iterator[None]:
    """What is timed here does not matter: caches need not be emptied."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(time_regions, "FLUSHED", 2**20)
        yield


def test_every_op_of_the_package_is_in_the_list() -> None:
    names = torch._C._dispatch_get_all_op_names()
    ours = {name.partition("::")[2] for name in names if name.startswith("smc_compile::")}
    ours -= {"branch"}  # a mark in a trace, which is never run (see passes.loop.branches)
    assert {entry.name for entry in WRITTEN_BY_HAND} == ours


@each
def test_a_right_kernel_passes_and_is_timed_beside_its_twin(entry: WrittenKernel) -> None:
    outcome = check_by_hand(entry, 3, seed=1, compiler="eager")
    assert outcome.passes
    assert (outcome.name, outcome.runs, outcome.allowed) == (entry.name, 3, entry.allowed)
    assert outcome.kernel_us > 0
    assert outcome.compiled_us > 0


@each
def test_a_kernel_that_is_off_by_little_fails(entry: WrittenKernel) -> None:
    wrong = replace(entry, op=lambda *given: entry.op(*given) * (1 + 1e-5))
    assert not check_by_hand(wrong, 1, seed=1, compiler="eager").passes
