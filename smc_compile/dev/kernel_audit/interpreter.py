"""Run generated code on the CPU, in a process of its own; kernels for a GPU run one by one in Triton's interpreter.

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
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import torch
from torch import Tensor

from smc_compile.dev.kernel_audit import quick_interpreter
from smc_compile.dev.kernel_audit.absent_device import Target, absent_device, device_memory_on_the_host
from smc_compile.dev.kernel_audit.generated_code import kernel_sources
from smc_compile.dev.kernel_audit.libdevice_on_host import install
from smc_compile.errors import SMCError


@dataclass(frozen=True)
class Ran:
    """The result of running generated code.

    Attributes:
        outputs: what the code returned.
        changed: new values of the arguments that it changed, by position.
        launches: of each kernel.
        unused: kernels without effect. Each was left out once, with zeros and with ones in fresh memory, and neither
            outputs, nor arguments, nor what a used kernel writes changed.
    """

    outputs: list[Any]
    changed: dict[int, Tensor]
    launches: dict[str, int]
    unused: tuple[str, ...]


class Interpreter:
    """The other process, started by the first ``run``."""

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
            command = [sys.executable, "-c", "from smc_compile.dev.kernel_audit.interpreter import main; main()"]
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
    """The child process: read a job, run its code in Triton's interpreter, write result or error; until none comes."""
    from torch._inductor.runtime import triton_helpers

    install(triton_helpers.libdevice)
    loaded: dict[str, _Generated] = {}
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
                if code not in loaded:
                    loaded[code] = load(code)
                answer = run(loaded[code], arguments, leave_out)
        except Exception as error:
            answer = traceback.format_exception_only(error)[0]
        _send(answers, answer)


@dataclass(frozen=True)
class _Launch:
    """The tensors of a launch before it and after it."""

    name: str
    before: list[Tensor]
    after: list[Tensor]

    def written_alike(self, tensors: list[Tensor]) -> bool:
        """Whether what this launch changed is the same in ``tensors``, after another one."""
        triples = zip(tensors, self.before, self.after, strict=True)
        return all(same(new, after) for new, before, after in triples if not same(before, after))


class _Record:
    """Launches as they happen."""

    def __init__(self) -> None:
        self.log: list[_Launch] = []

    def launch(self, name: str, run: Callable[[], Any], tensors: list[Tensor]) -> None:
        before = [t.clone() for t in tensors]
        run()
        self.log.append(_Launch(name, before, [t.clone() for t in tensors]))


class _Without:
    """The launches of ``log`` again without one kernel; what finds its tensors as before is not computed again.

    Raises:
        _Changed: as soon as a kernel of ``used`` writes something else than before.
    """

    def __init__(self, log: list[_Launch], left_out: str, used: set[str]) -> None:
        self._log, self._left_out, self._used, self._place = log, left_out, used, 0

    def launch(self, name: str, run: Callable[[], Any], tensors: list[Tensor]) -> None:
        was = self._log[self._place]
        self._place += 1
        if name == self._left_out:
            return
        if _equal(tensors, was.before):
            for tensor, value in zip(tensors, was.after, strict=True):
                if not same(tensor, value):
                    tensor.copy_(value)
            return
        run()
        if name in self._used and not was.written_alike(tensors):
            raise _Changed


class _Changed(Exception):
    pass


class _Kernel:
    """Stands in the place of a kernel of generated code. Kernels in C++ are called, others ``run``."""

    def __init__(self, name: str, kernel: Any, way: _Record | _Without) -> None:
        self._name, self._kernel, self._way = name, kernel, way

    def run(self, *arguments: Any, **options: Any) -> None:
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        self._way.launch(self._name, partial(self._kernel.run, *arguments, **options), tensors)

    def __call__(self, *arguments: Any) -> None:
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        self._way.launch(self._name, partial(self._kernel, *arguments), tensors)


@dataclass(frozen=True)
class _Generated:
    """Generated code: what its text defines, and its kernels by name."""

    module: dict[str, Any]
    kernels: dict[str, Any]

    def once(self, arguments: list[Any], fill: int, way: _Record | _Without) -> list[Any]:
        """Outputs, and arguments afterwards, of a run in which fresh buffers hold ``fill``."""

        def filled(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
            return torch.empty_strided(size, stride, dtype=dtype).fill_(fill)

        self.module.update({name: _Kernel(name, kernel, way) for name, kernel in self.kernels.items()})
        self.module["empty_strided_cuda"] = self.module["empty_strided_cpu"] = filled
        after = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        return [*self.module["call"](list(after)), *after]


def load(code: str) -> _Generated:
    """Execute what Inductor wrote in the first process."""
    module: dict[str, Any] = {"__name__": "generated"}
    exec(compile(code, "generated", "exec"), module)
    module["device"] = lambda *_, **__: torch.device("cpu")
    return _Generated(module, {name: module[name] for name in kernel_sources(code)})


def run(code: _Generated, arguments: list[Any], leave_out: Sequence[str]) -> Ran:
    """See ``Interpreter.run``."""
    records = [_Record(), _Record()]
    whole = code.once(arguments, 0, records[0])
    launches = Counter(launch.name for launch in records[0].log)
    unused: list[str] = []
    if leave_out:
        if not _equal(whole, code.once(arguments, 1, records[1])):
            raise SMCError("a kernel reads memory that nothing has written")
        used: set[str] = set()
        order = [launch.name for launch in reversed(records[0].log)]
        for name in sorted(leave_out, key=lambda name: order.index(name) if name in order else -1):  # from the last
            if any(_matters(code, name, used, arguments, fill, records[fill].log, whole) for fill in (0, 1)):
                used.add(name)
            else:
                unused.append(name)
    count = len(whole) - len(arguments)
    changed = {
        i: new
        for i, (old, new) in enumerate(zip(arguments, whole[count:], strict=True))
        if isinstance(old, Tensor) and not same(old, new)
    }
    return Ran(whole[:count], changed, {name: launches[name] for name in code.kernels}, tuple(unused))


def _matters(
    code: _Generated, name: str, used: set[str], arguments: list[Any], fill: int, log: list[_Launch], whole: list[Any]
) -> bool:
    """Whether results change without the kernel, or what a kernel in ``used`` writes, or an index leaves its bounds."""
    try:
        return not _equal(whole, code.once(arguments, fill, _Without(log, name, used)))
    except Exception:
        return True


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
