"""Compile a plain decode loop into Sequential Monte Carlo speculative decoding.

fast = torch.compile(decode, backend="smc", options={"draft": draft, "n_particles": 8, "lookahead": 6})
"""

from typing import Any

from smc_compile.decode import decode
from smc_compile.errors import (
    CacheError,
    GenerationError,
    InputError,
    LoopError,
    OptionError,
    SMCError,
    ValidationError,
)
from smc_compile.explain import Explanation, explain
from smc_compile.generate import generate
from smc_compile.options import Options
from smc_compile.own_cache import OwnCache
from smc_compile.result import Generation, Stats

__all__ = [
    "CacheError",
    "Explanation",
    "Generation",
    "GenerationError",
    "InputError",
    "LoopError",
    "OptionError",
    "Options",
    "OwnCache",
    "SMCError",
    "Stats",
    "ValidationError",
    "decode",
    "explain",
    "generate",
]


def __getattr__(name: str) -> Any:
    """``smc_compile.transformers`` is imported when it is asked for: the transformers library is optional."""
    if name != "transformers":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    try:
        return importlib.import_module("smc_compile.transformers")
    except ModuleNotFoundError as error:
        raise OptionError(
            "smc_compile.transformers needs the transformers library",
            str(error),
            "pip install 'smc_compile[transformers]'",
        ) from error
