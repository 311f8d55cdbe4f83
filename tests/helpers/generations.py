"""Generations made by hand: what a test does not name is empty."""

from __future__ import annotations

from typing import Any

import torch

from smc_compile import Generation


def generation(**given: Any) -> Generation:
    batch, n = given["particles"].shape[:2]
    empty = {
        "log_probs": torch.zeros(batch, 0),
        "new_lengths": torch.zeros(batch, dtype=torch.int64),
        "particle_log_probs": torch.zeros(batch, n, 0),
        "particle_lengths": torch.zeros(batch, n, dtype=torch.int64),
        "widths": torch.ones(*given["ancestors"].shape[:2], dtype=torch.int64),
        "dropped": torch.zeros(batch, dtype=torch.int64),
        "lag": torch.zeros(batch, 0, dtype=torch.int64),
    }
    return Generation(**{**empty, **given})
