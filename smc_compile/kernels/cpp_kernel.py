"""Building the kernels written in C++: with Inductor's builder, for this processor, kept in Inductor's cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger("smc_compile")
NUMBERS = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "c10::BFloat16"}


@cache
def cpp_kernel(name: str, arguments: Sequence[str], dtype: torch.dtype) -> Callable[..., None] | None:
    """The function ``kernel`` of ``name.cpp`` beside this file, with ``dtype`` in place of NUMBER.

    ``arguments`` are the C++ types of its parameters. ``lanes.h`` is inserted where it is included. None, with a
    warning, where it cannot be built: callers then use the kernel's twin.
    """
    from torch._inductor.codecache import CppPythonBindingsCodeCache
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    folder = Path(__file__).parent
    source = (folder / f"{name}.cpp").read_text().replace('#include "lanes.h"', (folder / "lanes.h").read_text())
    number = NUMBERS[dtype]
    types = [argument.replace("NUMBER", number) for argument in arguments]
    try:
        built: Any = CppPythonBindingsCodeCache.load_pybinding(types, source.replace("NUMBER", number))
    except (CppCompileError, InvalidCxxCompiler, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "error:" in line), lines[0])
        log.warning(
            "smc: the kernel %s cannot be built (%s); ATen is used instead, which is slower there", name, reason
        )
        return None
    return built
