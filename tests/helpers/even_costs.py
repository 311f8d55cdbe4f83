"""Costs that no machine has, so that none is measured."""

from __future__ import annotations

from typing import Any


class EvenCosts:
    """Every cycle costs the same, and a token of the one-token loop far more."""

    def cycle_seconds(self, *_: Any) -> float:
        return 1.0

    def token_seconds(self, *_: Any) -> float:
        return 10.0
