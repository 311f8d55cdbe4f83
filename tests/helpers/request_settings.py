"""A padded batch of four prompts, and settings under which each request must give what it gives alone."""

from __future__ import annotations

from typing import Any

import torch

VOCAB = 7
IDS = torch.randint(VOCAB, (4, 5), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(5) >= torch.tensor([0, 2, 1, 0])[:, None]
SEEDS = [3, 4, 5, 6]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "eos": {"eos_token_id": 4},
    "cut in the tail": {"top_k": 3, "temperature": 0.7},
    "a processor": {"logits_processor": [lambda ids, scores: scores - 0.1 * (ids[:, -1:] % 2)]},
    "a criterion": {"stopping_criteria": [lambda ids, scores=None: ids[:, -1] == ids[:, -2]]},
    "max_lag": {"max_lag": 4, "streamer": lambda *_: None},
}


def of_rows(rows: slice, caps: list[int]) -> dict[str, Any]:
    """What a call for these requests is given; ``caps`` are of all four."""
    return {"attention_mask": MASK[rows].long(), "max_new_tokens": caps[rows], "seed": SEEDS[rows]}
