"""What the system says about memory, free and held."""

from __future__ import annotations

import torch

from smc_compile.bench import peak_memory
from smc_compile.runtime.execution.memory import free_bytes

CPU = torch.device("cpu")


def test_kilobytes_are_read_and_a_file_that_is_not_there_says_nothing(tmp_path, monkeypatch):
    status = tmp_path / "status"
    status.write_text("VmPeak:     9 kB\nVmHWM:   123 kB\n")
    assert peak_memory.read_kilobytes(status, "VmHWM") == 123 * 1024
    assert peak_memory.read_kilobytes(status, "VmRSS") is None
    assert peak_memory.read_kilobytes(tmp_path / "none", "VmHWM") is None
    monkeypatch.setattr(peak_memory, "CLEAR", tmp_path / "none" / "clear")
    assert not peak_memory.reset_peak(CPU)


def test_free_memory_is_positive_where_it_is_told():
    free = free_bytes(CPU)
    assert free is None or free > 0
