"""The pair that ships with the package: a target and a draft trained on Python source by ``examples/train_pair.py``."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load
from tokenizers import Tokenizer

from smc_compile.errors import InputError
from smc_compile.pairs.llama import Llama, LlamaConfig

END = "<|end|>"
PROMPT = '''\
def moving_average(values, window):
    """Return the average of each run of `window` consecutive values."""
'''
FILES = ("target.safetensors", "draft.safetensors", "tokenizer.json", "pair.json")


class Pair(NamedTuple):
    """Both models share the tokenizer; ``info`` holds shapes, training record and held-out agreement."""

    target: Llama
    draft: Llama
    tokenizer: Tokenizer
    info: dict[str, Any]


def _model(weights: bytes, config: LlamaConfig, dtype: torch.dtype) -> Llama:
    """Stored in float16; computed in ``dtype``. The rotary tables follow ``dtype`` too."""
    with torch.random.fork_rng(devices=()):  # the initial weights are overwritten: leave the caller's generator alone
        model = Llama(config)
    model.load_state_dict(load(weights))
    return model.to(dtype).requires_grad_(False).eval()


def load_pair(dtype: torch.dtype = torch.float32, folder: str | Path | None = None) -> Pair:
    """Target, draft, tokenizer and record, in evaluation mode, without gradients.

    Args:
        folder: another pair than the shipped one, as ``examples/train_pair.py`` writes it.

    Raises:
        InputError: one of the four files is not in the folder.
    """
    home = files("smc_compile.pairs") / "data" if folder is None else Path(folder)
    missing = [name for name in FILES if not (home / name).is_file()]
    if missing:
        raise InputError("There is no pair of models in this folder.", f"{home} has no {', '.join(missing)}")
    info = json.loads((home / "pair.json").read_text())
    target, draft = (
        _model((home / f"{name}.safetensors").read_bytes(), LlamaConfig(**info[name]["config"]), dtype)
        for name in ("target", "draft")
    )
    return Pair(target, draft, Tokenizer.from_str((home / "tokenizer.json").read_text()), info)
