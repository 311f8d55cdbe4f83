"""What a program depends on besides the values of weights. Two requests with one key are served by one program."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import nn

from smc_compile.options import Options

OF_A_REQUEST = ("seed", "eos_token_id")  # options that every request brings along


def program_key(options: Options, *target: Hashable) -> Hashable:
    """The key of a program: of its target, which the caller describes, its draft and its options."""
    return (*target, model_state(options.draft), options_key(options))


def model_state(model: Any) -> Hashable:
    """What a program takes from a model besides the values of its weights: which object it is, and where it is.

    That is the device and dtype of its first parameter. Attributes that the forward reads, hooks and adapters are not
    looked at. An object keeps its id while it lives. A program holds its models, so the key holds as long as the
    program is kept.
    """
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return id(model), next(((p.device, p.dtype) for p in parameters), None)


def options_key(options: Options) -> Hashable:
    """The options that decide what is compiled."""
    return tuple(value for name, value in vars(options).items() if name not in ("draft", *OF_A_REQUEST))
