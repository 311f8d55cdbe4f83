"""The Triton kernel that copies rows: compared with its twin, compiled, and seen to be wrong where it is."""

from __future__ import annotations

import subprocess

import pytest
import torch

from smc_compile.dev.kernel_audit import copy_rows_region
from smc_compile.dev.kernel_audit.absent_device import TARGETS
from smc_compile.dev.kernel_audit.copy_rows_region import (
    compare_with_twin,
    examine_copy_rows,
    interpreted,
    machine_code,
)
from smc_compile.errors import SMCError


def test_in_the_interpreter_it_is_its_twin_and_is_needed() -> None:
    verdict = interpreted(12, seed=0)
    assert (verdict.runs, verdict.beyond, verdict.unused) == (12, 0.0, set())


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
def test_it_compiles_to_machine_code_without_spilling(name) -> None:
    code = machine_code(TARGETS[name])
    assert code.spills == 0
    assert code.registers <= 64
    assert code.loads
    assert code.stores


def test_a_kernel_that_writes_elsewhere_or_not_at_all_is_seen(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(copy_rows_region, "copy_group", lambda *_: None)
    assert max(compare_with_twin(generator)[0] for _ in range(8)) > 0


def test_what_cannot_be_interpreted_fails_with_its_reason(monkeypatch) -> None:
    broken = subprocess.CompletedProcess([], 1, "", "Traceback\nNameError: what")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: broken)
    with pytest.raises(SMCError, match="NameError: what"):
        interpreted(1, 0)
    region = examine_copy_rows(2, 1, 0, TARGETS["sm_90"])
    assert not region.passes
    assert region.verdict.problem == "NameError: what"
