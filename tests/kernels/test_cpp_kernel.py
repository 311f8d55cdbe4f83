"""Kernels in C++: built once a type, and said plainly where they cannot be."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

from smc_compile.kernels import skinny_linear as skinny_linear
from smc_compile.kernels.cpp_kernel import cpp_kernel


def test_a_kernel_is_built_once():
    build = cpp_kernel("skinny_linear", skinny_linear.SIGNATURE, torch.float32)
    assert build is not None
    assert cpp_kernel("skinny_linear", skinny_linear.SIGNATURE, torch.float32) is build


@pytest.mark.parametrize("error", [InvalidCxxCompiler(), CppCompileError(["g++"], "x.cpp: error: no such thing")])
def test_without_a_compiler_a_line_says_that_atens_is_used(error, monkeypatch, caplog):
    def fails(*_):
        raise error

    monkeypatch.setattr(CppPythonBindingsCodeCache, "load_pybinding", fails)
    with caplog.at_level("WARNING", logger="smc_compile"):
        assert cpp_kernel.__wrapped__("thresholds", skinny_linear.SIGNATURE, torch.float32) is None
    assert "the kernel thresholds cannot be built" in caplog.text
    assert ("error: no such thing" in caplog.text) == isinstance(error, CppCompileError)
