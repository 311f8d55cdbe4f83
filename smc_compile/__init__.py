"""Compile a plain decode loop into Sequential Monte Carlo speculative decoding.

fast = torch.compile(decode, backend="smc", options={"draft": draft, "n_particles": 8, "lookahead": 6})
"""

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
    "SMCError",
    "Stats",
    "ValidationError",
    "decode",
    "explain",
    "generate",
]
