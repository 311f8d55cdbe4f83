"""Run generated code on the CPU, in a process of its own: what is for a GPU kernel by kernel in Triton's interpreter.

The interpreter is chosen when triton is imported, and a kernel that leaves its buffers can end the process: both are
reasons for a second one. Products and other ops of libraries run as their ATen twins on the CPU.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from smc_compile.errors import SMCError

from . import quick_interpreter
from .absent_device import Target, absent_device, device_memory_on_the_host
from .generated import kernel_sources
from .libdevice_on_host import install


@dataclass(frozen=True)
class Ran:
    """What one run of generated code gave.

    Attributes:
        outputs: of the code.
        changed: arguments that it changed, by their places, with their new values.
        launches: of each kernel.
        unused: kernels that were left out one at a time without any change of outputs and arguments, whether zeros or
            ones stood where they write, and that could write other numbers without any.
    """

    outputs: list[Any]
    changed: dict[int, Tensor]
    launches: dict[str, int]
    unused: tuple[str, ...]


class Interpreter:
    """The other process, started when it is first asked."""

    def __init__(self, target: Target | None) -> None:
        self._target = target
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, code: str, arguments: Sequence[Any], leave_out: Sequence[str] = ()) -> Ran:
        """Run ``code`` once whole, and once without each kernel of ``leave_out``; arguments stay as they are.

        Raises:
            SMCError: when a kernel cannot be interpreted, with its reason.
        """
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _send(process.stdin, (self._target, code, list(arguments), tuple(leave_out)))
            answer = _receive(process.stdout)
        except (BrokenPipeError, EOFError) as error:
            self._process = None
            raise SMCError("the interpreter of Triton kernels ended", f"exit status {process.wait()}") from error
        if isinstance(answer, str):
            raise SMCError("the generated code cannot be interpreted", answer.strip().splitlines()[0])
        assert isinstance(answer, Ran)
        return answer

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            environment = {**os.environ, "TRITON_INTERPRET": "1"}
            command = [sys.executable, "-c", "from smc_compile.listing.interpreter import main; main()"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
        return self._process

    def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()
            self._process = None


# ---- messages: the length, then what torch.save writes ---------------------------------------------------------------


def _send(stream: IO[bytes], message: Any) -> None:
    buffer = io.BytesIO()
    torch.save(message, buffer, pickle_module=pickle)
    stream.write(struct.pack("<Q", buffer.tell()))
    stream.write(buffer.getbuffer())
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError
    (length,) = struct.unpack("<Q", header)
    return torch.load(io.BytesIO(stream.read(length)), weights_only=False)


# ---- the other process -----------------------------------------------------------------------------------------------


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer until the requests end."""
    from torch._inductor.runtime import triton_helpers

    install(triton_helpers.libdevice)
    modules: dict[str, dict[str, Any]] = {}
    while True:
        try:
            target, code, arguments, leave_out = _receive(requests)
        except EOFError:
            return
        answer: Ran | str
        try:
            with ExitStack() as stack:
                if target is not None:
                    stack.enter_context(absent_device(target))
                    stack.enter_context(device_memory_on_the_host())
                if code not in modules:
                    modules[code] = _load(code)
                answer = _run(modules[code], list(kernel_sources(code)), arguments, leave_out)
        except Exception as error:
            answer = traceback.format_exception_only(error)[0]
        _send(answers, answer)


def _load(code: str) -> dict[str, Any]:
    module: dict[str, Any] = {"__name__": "generated"}
    exec(compile(code, "generated", "exec"), module)  # what Inductor wrote in the first process
    module["device"] = lambda *_, **__: torch.device("cpu")
    return module


class _Counted:
    """A kernel that counts its launches. Kernels in C++ are called, others ``run``.

    ``left_out`` it does nothing; ``spoiled`` it writes other numbers than it should, where their names tell.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches, self.left_out, self.spoiled = kernel, 0, False, False

    def run(self, *arguments: Any, **options: Any) -> None:
        self(*arguments, launch=self.kernel.run, **options)

    def __call__(self, *arguments: Any, launch: Any = None, **options: Any) -> None:
        self.launches += 1
        if not self.left_out:
            (launch or self.kernel)(*arguments, **options)
        if self.spoiled:
            names = getattr(getattr(self.kernel, "fn", None), "arg_names", ())
            for name, value in zip(names, arguments, strict=False):
                if "out_ptr" in name and isinstance(value, Tensor) and value.is_floating_point():
                    value.mul_(1.5).add_(1.0)


def _run(module: dict[str, Any], names: Sequence[str], arguments: list[Any], leave_out: Sequence[str]) -> Ran:
    kernels = {name: _Counted(module[name]) for name in names}
    module.update(kernels)
    try:
        whole = _once(module, arguments, 0)
        launches = {name: kernel.launches for name, kernel in kernels.items()}
        if leave_out and not _equal(whole, _once(module, arguments, 1)):
            raise SMCError("a kernel reads memory that nothing has written")
        unused = tuple(name for name in leave_out if not _matters(module, kernels[name], arguments, whole))
    finally:
        module.update({name: kernel.kernel for name, kernel in kernels.items()})
    count = len(whole) - len(arguments)
    outputs, after = whole[:count], whole[count:]
    changed = {
        i: new
        for i, (old, new) in enumerate(zip(arguments, after, strict=True))
        if isinstance(old, Tensor) and not same(old, new)
    }
    return Ran(outputs, changed, launches, unused)


def _once(module: dict[str, Any], arguments: list[Any], fill: int) -> list[Any]:
    """Outputs and arguments after a run in which fresh buffers hold ``fill``."""

    def filled(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype).fill_(fill)

    module["empty_strided_cuda"] = module["empty_strided_cpu"] = filled
    after = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    return [*module["call"](list(after)), *after]


def _matters(module: dict[str, Any], kernel: _Counted, arguments: list[Any], whole: list[Any]) -> bool:
    """Whether anything changes without the kernel, or with other numbers from it: one that rounds in place may change
    none of them. An index out of bounds is a change."""
    kernel.left_out = True
    try:
        if not all(_equal(whole, _once(module, arguments, fill)) for fill in (0, 1)):
            return True
        kernel.left_out, kernel.spoiled = False, True
        return not _equal(whole, _once(module, arguments, 0))
    except Exception:
        return True
    finally:
        kernel.left_out = kernel.spoiled = False


def _equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return all(same(x, y) for x, y in zip(a, b, strict=True))


def same(a: Any, b: Any) -> bool:
    """Equal, NaN included."""
    if not isinstance(a, Tensor):
        return bool(a == b)
    return bool(torch.equal(a, b) or ((a == b) | ((a != a) & (b != b))).all())


def main() -> None:
    """The other process."""
    quick_interpreter.install()
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what kernels print does not mix with the answers
    serve(sys.stdin.buffer, replies)
