"""Named shapes of a target and its draft: one list for all commands."""

from __future__ import annotations

import argparse
import difflib
from dataclasses import dataclass

import torch

from smc_compile.errors import OptionError
from smc_compile.pairs.llama import Llama, LlamaConfig
from smc_compile.runtime.execution.memory import free_bytes

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DEFAULT = "336m-31m"
WORTH_TIMING = 10**8  # bytes of weights: smaller presets show nothing about speed


@dataclass(frozen=True)
class Shape:
    """One model, in the words of the command's options."""

    layers: int
    dim: int
    heads: int
    kv_heads: int
    hidden: int


@dataclass(frozen=True)
class Preset:
    """Shapes of a pair; both models have the same vocabulary."""

    vocab: int
    target: Shape
    draft: Shape


PRESETS = {
    "336m-31m": Preset(32000, Shape(24, 1024, 16, 16, 2752), Shape(4, 512, 8, 8, 1664)),
    "0.5b-60m": Preset(151936, Shape(24, 896, 14, 2, 4864), Shape(8, 320, 5, 1, 1280)),  # a target as Qwen2.5-0.5B
    "llama-8b-1b": Preset(128256, Shape(32, 4096, 32, 8, 14336), Shape(16, 2048, 32, 8, 8192)),  # Llama 3.1 and 3.2
    "small": Preset(500, Shape(2, 64, 4, 2, 128), Shape(1, 32, 2, 1, 64)),  # compiles quickly; nothing to time
}
SHORT_NAMES = {"bench": "336m-31m", "llama-8b": "llama-8b-1b"}


def find_preset(name: str) -> Preset:
    """The preset of that name, or of a short name.

    Raises:
        OptionError: with the list of names and the nearest of them.
    """
    name = SHORT_NAMES.get(name, name)
    if name not in PRESETS:
        near = difflib.get_close_matches(name.lower(), PRESETS, 1, 0.3)
        raise OptionError(
            f"There is no preset {name!r}" + (f"; did you mean {near[0]}?" if near else "."),
            f"the presets are {', '.join(PRESETS)}",
            "name one of them, and change it by --layers, --draft-dim, ...",
        )
    return PRESETS[name]


def fill_in(arguments: argparse.Namespace) -> None:
    """Set each shape that no option gave to that of the preset."""
    preset = find_preset(arguments.preset)
    given = {"vocab": preset.vocab, **vars(preset.target)}
    given |= {f"draft_{name}": value for name, value in vars(preset.draft).items()}
    for name, value in given.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def configs(arguments: argparse.Namespace, lookahead: int) -> tuple[LlamaConfig, LlamaConfig]:
    """Shapes of target and draft, with positions for a cycle past the last token."""
    a = arguments
    positions = a.prompt_length + a.new_tokens + 2 * (max(lookahead, 0) + 1)
    return (
        LlamaConfig(a.vocab, a.dim, a.layers, a.heads, a.kv_heads, a.hidden, positions),
        LlamaConfig(a.vocab, a.draft_dim, a.draft_layers, a.draft_heads, a.draft_kv_heads, a.draft_hidden, positions),
    )


def weight_count(config: LlamaConfig) -> int:
    """Parameters of a model of that shape, without building it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Llama(config).parameters())


def preset_count(preset: Preset) -> int:
    """Parameters of target and draft."""
    shapes = (preset.target, preset.draft)
    return sum(weight_count(LlamaConfig(preset.vocab, s.dim, s.layers, s.heads, s.kv_heads, s.hidden)) for s in shapes)


def check_memory(numbers: int, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse weights of ``numbers`` numbers that do not fit in what is free, before anything is allocated."""
    free = free_bytes(device)
    needed = numbers * dtype.itemsize
    if free is None or needed <= free:
        return
    sizes = {name: preset_count(preset) * dtype.itemsize for name, preset in PRESETS.items()}
    fits = [f"--preset {name} ({size / 1e9:.1f} GB)" for name, size in sizes.items() if WORTH_TIMING <= size <= free]
    if numbers * 2 <= free < needed:
        fits.insert(0, "--dtype bfloat16")
    raise OptionError(
        "The weights do not fit in memory.",
        f"{numbers / 1e6:.0f}M numbers of {dtype.itemsize} bytes need {needed / 1e9:.1f} GB, and "
        f"{free / 1e9:.1f} GB of {device} are free",
        f"what fits: {', '.join(fits)}" if fits else "free memory, or choose smaller shapes",
    )
