"""Generated code run kernel by kernel: launches counted, each kernel left out once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from smc_compile.dev.kernel_audit import interpreter as file
from smc_compile.dev.kernel_audit.interpreter import Interpreter, Ran, same
from smc_compile.errors import SMCError


class Double:
    """A kernel: the second argument becomes twice the first."""

    def run(self, x: Tensor, out: Tensor) -> None:
        out.copy_(2 * x)


def run(body: Any) -> Ran:
    """Generated code with two kernels and a function ``call``."""
    generated: dict[str, Any] = {}
    generated["call"] = lambda arguments: body(
        arguments, generated["first"], generated["second"], generated["empty_strided_cuda"]
    )
    code = file._Generated(generated, {"first": Double(), "second": Double()})
    return file.run(code, [torch.ones(3), 7], ["first", "second"])


def test_a_chain_of_kernels_is_used_and_arguments_change_in_the_answer_only():
    def chain(arguments, first, second, empty):
        x, _ = arguments
        buffer = empty((3,), (1,), torch.float32)
        first.run(x, buffer)
        second.run(buffer, x)
        return (buffer,)

    ran = run(chain)
    assert ran.launches == {"first": 1, "second": 1}
    assert ran.unused == ()
    assert torch.equal(ran.outputs[0], torch.full((3,), 2.0))
    assert torch.equal(ran.changed[0], torch.full((3,), 4.0))


def test_a_kernel_whose_output_nothing_reads_is_unused():
    def one_for_nothing(arguments, first, second, empty):
        buffer, other = (empty((3,), (1,), torch.float32) for _ in range(2))
        first.run(arguments[0], buffer)
        second.run(arguments[0], other)
        return (buffer,)

    assert run(one_for_nothing).unused == ("second",)


def test_zeros_that_a_kernel_writes_count_as_written():
    """Left out, its buffer may hold the same zeros by chance: then it is tried with ones."""

    def zeros(arguments, first, second, empty):
        buffer, other = (empty((3,), (1,), torch.float32) for _ in range(2))
        first.run(arguments[0] * 0, buffer)
        second.run(buffer, other)
        return (other,)

    assert run(zeros).unused == ()


def test_a_kernel_that_is_never_launched_shows():
    def only_first(arguments, first, second, empty):
        buffer = empty((3,), (1,), torch.float32)
        first.run(arguments[0], buffer)
        return (buffer,)

    assert run(only_first).launches["second"] == 0


def test_memory_that_nothing_wrote_must_not_be_read():
    def reads_anything(arguments, first, second, empty):
        buffer = empty((3,), (1,), torch.float32)
        second.run(buffer, arguments[0])
        return (buffer,)

    with pytest.raises(SMCError, match="nothing has written"):
        run(reads_anything)


def test_same_takes_nan_for_nan():
    nan = torch.tensor([1.0, torch.nan])
    assert same(nan, nan.clone())
    assert not same(nan, torch.tensor([torch.nan, 1.0]))
    assert not same(3, 4)


def test_what_cannot_run_in_the_other_process_comes_back_as_an_error():
    interpreter = Interpreter(None)
    try:
        with pytest.raises(SMCError, match="division by zero"):
            interpreter.run("1 / 0", [])
        answer = interpreter.run("def call(arguments):\n    return [2 * arguments[0]]", [torch.ones(2)])
        assert torch.equal(answer.outputs[0], torch.full((2,), 2.0)), "it goes on after an error"
    finally:
        interpreter.close()
