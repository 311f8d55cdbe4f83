"""Triton kernels compiled for a target by triton and its assembler, and what the machine code uses. No GPU needed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smc_compile.dev.kernel_audit.absent_device import Target, absent_device
from smc_compile.errors import SMCError
from smc_compile.passes.torch_versions import NEWEST, OLDEST

LOADS, STORES = re.compile(r"\bLDG\b"), re.compile(r"\b(?:STG|RED|REDG|ATOMG|ATOM)\b")


@dataclass(frozen=True)
class MachineCode:
    """What a compiled kernel uses.

    Where autotuning would choose among configurations: the one that spills most, then the one with most registers.

    Attributes:
        registers: of a thread.
        spills: bytes of a thread that registers were spilled to.
        shared: bytes of shared memory of a block.
        loads, stores: instructions in the machine code that read and write global memory.
        configurations: how many there are.
        size: bytes of machine code.
    """

    registers: int
    spills: int
    shared: int
    loads: int
    stores: int
    configurations: int
    size: int


def compile_kernel(name: str, source: str, target: Target) -> MachineCode:
    """Compile every configuration of a kernel that Inductor generated.

    Raises:
        SMCError: when triton or its assembler refuses it, or this version of torch keeps elsewhere what is needed.
    """
    from torch._inductor import config
    from torch._inductor.codecache import PyCodeCache

    with absent_device(target), config.patch(_no_launchers(config)):
        kernel = getattr(PyCodeCache.load(source), name)
        try:
            binaries = [kernel._precompile_config(configuration).kernel for configuration in kernel.configs]
        except AttributeError as error:
            raise SMCError(
                "this version of torch compiles Triton kernels in another way",
                str(error),
                f"use torch {OLDEST} to {NEWEST}",
            ) from error
        except Exception as error:
            raise SMCError(f"the kernel {name} does not compile for {target.name}", str(error)) from error
    found = [_used(binary, len(binaries)) for binary in binaries]
    return max(found, key=lambda code: (code.spills, code.registers))


def compile_written(
    kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any], target: Target
) -> MachineCode:
    """Compile a kernel that is written by hand for arguments of Triton's types, such as "*i64".

    Raises:
        SMCError: as ``compile_kernel``.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    names = list(kernel.arg_names)
    try:
        source = triton.compiler.ASTSource(
            fn=kernel,
            signature={name: signature.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
        )
        with absent_device(target):
            binary = triton.compile(source, target=GPUTarget("cuda", target.capability, target.warp_size))
    except Exception as error:
        raise SMCError(f"the kernel {kernel.__name__} does not compile for {target.name}", str(error)) from error
    return _used(binary, 1)


def _no_launchers(config: Any) -> dict[str, Any]:
    """Options that keep the whole result of a compilation, and not only what launches it."""
    names = ("use_static_cuda_launcher", "use_static_triton_launcher")
    return {name: False for name in names if hasattr(config, name)}


def _used(binary: Any, configurations: int) -> MachineCode:
    cubin: bytes = binary.asm["cubin"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        printed = _disassemble(path)
    number = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", printed))
    if "REG" not in number:
        raise SMCError("the resources of a kernel cannot be read", printed.strip()[:200])
    return MachineCode(
        registers=int(number["REG"]),
        spills=int(number["STACK"]) + int(number["LOCAL"]),
        shared=int(binary.metadata.shared),
        loads=len(LOADS.findall(printed)),
        stores=len(STORES.findall(printed)),
        configurations=configurations,
        size=len(cubin),
    )


def _disassemble(cubin: Path) -> str:
    """What the disassembler that comes with triton prints: resources and instructions."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    try:
        done = subprocess.run(
            [tool, "-res-usage", "-sass", cubin], capture_output=True, text=True, timeout=120, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise SMCError("triton's disassembler does not run", f"{tool}: {error} (torch {torch.__version__})") from error
    return done.stdout + done.stderr
