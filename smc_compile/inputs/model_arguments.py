"""Arguments of a model's forward that the transformers library hands on from ``generate``.

A compiled model is called with token ids alone. What would change its logits is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from smc_compile.errors import InputError
from smc_compile.inputs.requests import prompt_lengths

# Arguments that say how a model is called, and not what it computes: the attention mask is read as padding.
HANDLED = ("attention_mask", "use_cache", "logits_to_keep", "num_logits_to_keep", "cache_position", "return_dict")
CACHES = ("cache", "past_key_values", "cache_params")
WHY = {
    "inputs_embeds": (
        "a compiled model reads token ids, and texts that begin with embeddings have none",
        "pass the tokens as input_ids",
    ),
    "token_type_ids": ("a compiled model reads token ids alone", "leave token_type_ids out"),
    "position_ids": (
        "a compiled model counts the positions of each text from 0, behind its padding",
        "leave position_ids out, and mark padding by attention_mask",
    ),
}


def check_model_arguments(given: Mapping[str, Any], ids: Tensor) -> None:
    """Check what the library hands on beside the ids [B, P].

    Raises:
        InputError: an argument would change what the model computes.
    """
    for name, value in given.items():
        if value is None or value is False or name in HANDLED:
            continue
        if name in CACHES and _holds_nothing(value):
            continue
        if name == "position_ids" and _counted(value, prompt_lengths(ids, given.get("attention_mask")), ids.shape[1]):
            continue
        if name in CACHES:
            raise InputError(
                f"{name} holds a text already, and cannot be handed in",
                "the compiled model makes caches of its own, and cannot tell whether this one belongs to the prompt",
                f"leave {name} out: the prompt is read as a whole",
            )
        why, fix = WHY.get(name, ("a compiled model reads token ids alone", f"leave {name} out"))
        raise InputError(f"the model's argument {name!r} is not supported with a compiled model", why, fix)


def _holds_nothing(cache: Any) -> bool:
    length = getattr(cache, "get_seq_length", None)
    return callable(length) and int(length()) == 0


def _counted(positions: Any, lengths: Tensor, width: int) -> bool:
    """Whether positions [..., B or 1, P] count each text of ``lengths`` [B] from 0; the padding's do not matter."""
    if not isinstance(positions, Tensor) or positions.shape[-1] != width:
        return False
    expected = torch.arange(width, device=lengths.device) - (width - lengths)[:, None]  # [B, P]
    return bool(((positions == expected) | (expected < 0)).all())
