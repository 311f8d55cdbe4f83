"""The pair that ships with the package: a target and a draft trained on Python source by ``examples/train_pair.py``."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any, NamedTuple

import torch
from safetensors.torch import load
from tokenizers import Tokenizer

from smc_compile.pairs.llama import Llama, LlamaConfig

END = "<|end|>"


class Pair(NamedTuple):
    """Both models share the tokenizer; ``info`` holds shapes, training record and held-out agreement."""

    target: Llama
    draft: Llama
    tokenizer: Tokenizer
    info: dict[str, Any]


def _packaged(name: str) -> bytes:
    return (files("smc_compile.pairs") / "data" / name).read_bytes()


def _model(name: str, config: LlamaConfig, dtype: torch.dtype) -> Llama:
    """Stored in float16; computed in ``dtype``. The rotary tables follow ``dtype`` too."""
    with torch.random.fork_rng(devices=()):  # the initial weights are overwritten: leave the caller's generator alone
        model = Llama(config)
    model.load_state_dict(load(_packaged(f"{name}.safetensors")))
    return model.to(dtype).requires_grad_(False).eval()


def load_pair(dtype: torch.dtype = torch.float32) -> Pair:
    """Target, draft, tokenizer and record, in evaluation mode, without gradients."""
    info = json.loads(_packaged("pair.json"))
    target, draft = (_model(name, LlamaConfig(**info[name]["config"]), dtype) for name in ("target", "draft"))
    return Pair(target, draft, Tokenizer.from_str(_packaged("tokenizer.json").decode()), info)
