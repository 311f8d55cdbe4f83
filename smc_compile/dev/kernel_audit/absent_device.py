"""Pretend that a GPU is there: everything that is replaced for it is in this file, and is put back afterwards.

Inductor asks the device for its properties and Triton a driver for its target before they generate any code. Here the
answers come from a table. Nothing can run on the device that is pretended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from smc_compile.errors import OptionError, SMCError
from smc_compile.passes.torch_versions import NEWEST, OLDEST


@dataclass(frozen=True)
class Target:
    """A GPU as the compilers see it; ``torch.cuda.get_device_properties`` has fields of these names."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    max_threads_per_multi_processor: int
    shared_memory_per_block_optin: int  # bytes
    regs_per_multiprocessor: int = 65536
    max_threads_per_block: int = 1024
    warp_size: int = 32

    @property
    def capability(self) -> int:
        return 10 * self.major + self.minor

    @property
    def total_memory(self) -> int:
        return 80 * 2**30


TARGETS = {
    "sm_80": Target("A100", 8, 0, 108, 2048, 166912),
    "sm_86": Target("A10", 8, 6, 72, 1536, 101376),
    "sm_89": Target("L4", 8, 9, 58, 1536, 101376),
    "sm_90": Target("H100", 9, 0, 132, 2048, 232448),
    "sm_100": Target("B200", 10, 0, 148, 2048, 232448),
}
CUDA = torch.device("cuda", 0)


def target_named(name: str) -> Target:
    """The target of a name such as sm_90.

    Raises:
        OptionError: when it is none of ``TARGETS``.
    """
    if name not in TARGETS:
        raise OptionError(f"target {name!r} is unknown", f"known are {', '.join(TARGETS)}")
    return TARGETS[name]


@contextmanager
def absent_device(target: Target) -> Iterator[None]:
    """Inside, code for ``target`` can be generated on any machine.

    Raises:
        SMCError: when this version of torch or triton keeps elsewhere what must be replaced.
    """
    try:
        with ExitStack() as stack:
            _replace(stack, target)
            _forget(stack)
            stack.enter_context(_driver(target))
            entered = stack.pop_all()
    except (ImportError, AttributeError) as error:
        raise SMCError(
            "this version of torch or triton cannot be told of an absent GPU",
            f"torch {torch.__version__}: {error}",
            f"use torch {OLDEST} to {NEWEST} with the triton that belongs to it",
        ) from error
    with entered:
        yield


def _replace(stack: ExitStack, target: Target) -> None:
    from torch._dynamo import device_interface as interfaces
    from torch._inductor import select_algorithm
    from torch._inductor.runtime import triton_helpers
    from torch._subclasses import fake_tensor

    interfaces.get_interface_for_device("cpu")  # registers those of the machine first
    answers = _interface(interfaces.CudaInterface, target)
    stack.enter_context(patch.dict(interfaces.device_interfaces, {"cuda": answers, "cuda:0": answers}))
    for name, answer in {
        "is_available": True,
        "get_device_capability": (target.major, target.minor),
        "get_device_properties": target,
        "current_device": 0,
        "device_count": 1,
    }.items():
        stack.enter_context(patch.object(torch.cuda, name, _always(answer)))
    stack.enter_context(patch.object(torch.version, "cuda", "12.8"))
    stack.enter_context(patch.object(fake_tensor, "init_gpu_context", _always(None)))  # starts a driver
    stack.enter_context(patch.object(triton_helpers, "set_driver_to_gpu", _always(None)))
    stack.enter_context(patch.object(select_algorithm, "_ALGORITHM_SELECTOR_CACHE", None))


def _interface(base: Any, target: Target) -> Any:
    answers = {
        "is_available": True,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
        "current_device": 0,
        "set_device": None,
        "device_count": 1,
        "get_device_properties": target,
        "get_compute_capability": target.capability,
        "get_raw_stream": 0,
    }
    names = ("current_device", "set_device", "get_device_properties")
    worker = type("Worker", (), {n: staticmethod(_always(answers[n])) for n in names})
    return type("AbsentCuda", (base,), {n: staticmethod(_always(a)) for n, a in answers.items()} | {"Worker": worker})


def _always(answer: Any) -> Callable[..., Any]:
    return lambda *_, **__: answer


def _forget(stack: ExitStack) -> None:
    """Clear what compilers remember about devices, now and on leaving."""
    import torch._inductor.utils
    import torch.utils._triton
    from torch._inductor.codecache import CacheBase
    from torch._inductor.runtime.hints import DeviceProperties

    remembered = [CacheBase.get_system, DeviceProperties.create]
    for module in (torch._inductor.utils, torch.utils._triton):
        remembered += _cached_functions(module)
    for function in remembered:
        function.cache_clear()
        stack.callback(function.cache_clear)


def _cached_functions(module: ModuleType) -> list[Any]:
    return [value for value in vars(module).values() if hasattr(value, "cache_clear")]


@contextmanager
def _driver(target: Target) -> Iterator[None]:
    """A stand-in for Triton's active driver, with what compiling asks of it."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    active = type("AbsentDriver", (), {})()
    active.get_current_target = _always(GPUTarget("cuda", target.capability, target.warp_size))
    active.get_active_torch_device = _always(CUDA)
    active.get_current_device = _always(0)
    active.get_current_stream = _always(0)
    with patch.object(driver, "_active", active):
        yield


@contextmanager
def device_memory_on_the_host() -> Iterator[None]:
    """Inside, Inductor's Python for a GPU runs with buffers on the CPU; streams and devices do nothing.

    For kernels that are interpreted only.
    """
    from torch._C import _dynamo

    with ExitStack() as stack:
        stack.enter_context(patch.object(_dynamo.guards, "_empty_strided_cuda", torch.empty_strided, create=True))
        stack.enter_context(patch.object(torch._C, "_cuda_getCurrentRawStream", _always(0), create=True))
        stack.enter_context(patch.object(torch.cuda, "_DeviceGuard", _always(nullcontext())))
        stack.enter_context(patch.object(torch.cuda, "set_device", _always(None)))
        yield
