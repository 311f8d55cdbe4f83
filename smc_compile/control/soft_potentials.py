"""Potentials that weigh texts, and forbid none: powers of the model's law, rewards, twists."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smc_compile.control.potentials import Potential
from smc_compile.errors import OptionError

AT = ("end", "cycle", "step")


class Power(Potential):
    """The model's law of whole texts to the power of ``alpha``: p(text) ** alpha over the sum of these.

    That is not a temperature, which raises the law of each token and normalises it there: a beginning is as likely here
    as all that may follow makes it. ``log_evidence`` is the log of the sum.

    Raises:
        OptionError: alpha is no number above 0.
    """

    def __init__(self, alpha: float) -> None:
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            raise OptionError("the exponent of Power must be a number above 0", f"got {alpha!r}")
        self.alpha = float(alpha)

    @property
    def name(self) -> str:
        return f"Power({self.alpha:g})"

    def prefix(self, text: bytes) -> float:
        raise OptionError("Power has no weight of a text alone", "it depends on the model", "")

    complete = prefix

    def to_power(self, beta: float) -> Potential:
        """What it weighs beside the model is p ** (alpha - 1)."""
        return Power(1 + (self.alpha - 1) * beta)


class Reward(Potential):
    """Texts weigh exp(beta * f(text)).

    Args:
        f: a function of a text, a str, to a number; or a module, ``ids [n, L] -> [n]``, of prompts with texts. Bytes
            that are no character yet are left out of a str.
        beta: the larger, the more the reward counts; negative ones look for small rewards.
        at: when it is asked: "end", for whole texts alone; "cycle", of what is written at the end of each cycle;
            "step", of whole steps. The law of whole texts is the same. Rewards of beginnings let good ones survive.
        step: what ends a step.

    Raises:
        OptionError: an argument does not fit.
    """

    def __init__(self, f: Callable[..., Any], beta: float = 1.0, at: str = "end", step: str = "\n") -> None:
        if not callable(f):
            raise OptionError("a reward must be a function of a text, or a module", f"got {type(f).__name__}")
        if at not in AT:
            raise OptionError(f"at={at!r} is unknown", f"valid values are {', '.join(AT)}")
        if isinstance(beta, bool) or not isinstance(beta, int | float) or not math.isfinite(beta):
            raise OptionError("beta must be a number", f"got {beta!r}")
        if not isinstance(step, str) or not step:
            raise OptionError("step must be a string that ends a step", f"got {step!r}")
        self.f, self.beta, self.at, self.step = f, float(beta), at, step

    @property
    def name(self) -> str:
        return f"Reward({getattr(self.f, '__name__', type(self.f).__name__)})"

    def prefix(self, text: bytes) -> float:
        if self.at == "end":
            return 0.0
        if self.at == "cycle":
            return self.complete(text)
        whole_steps, step, _ = text.rpartition(self.step.encode())
        return self.complete(whole_steps + step) if step else 0.0

    def complete(self, text: bytes) -> float:
        if isinstance(self.f, nn.Module):
            raise OptionError("a reward that is a module weighs tokens", "it has no weight of a text alone", "")
        return self.beta * float(self.f(text.decode(errors="ignore")))

    @torch.no_grad()
    def of_ids(self, ids: Sequence[Tensor]) -> list[float]:
        """What a module gives to texts [L] each, beta times; those of one length together."""
        found = [0.0] * len(ids)
        for length in sorted({len(text) for text in ids}):
            rows = [i for i, text in enumerate(ids) if len(text) == length]
            told = self.f(torch.stack([ids[i] for i in rows]))
            if not isinstance(told, Tensor) or told.numel() != len(rows):
                shape = tuple(told.shape) if isinstance(told, Tensor) else type(told).__name__
                raise OptionError(f"{self.name} must give one number for each text", f"it gave {shape} for {len(rows)}")
            for i, value in zip(rows, told.double().flatten().tolist(), strict=True):
                found[i] = self.beta * value
        return found


class Twist(Potential):
    """Weighs beginnings by exp(f(text)), and whole texts by 1: the law stays, and particles are guided.

    Args:
        f: a function of a text, a str, to a number, as high as what may follow is good.
    """

    def __init__(self, f: Callable[[str], float]) -> None:
        if not callable(f):
            raise OptionError("a twist must be a function of a text", f"got {type(f).__name__}")
        self.f = f

    @property
    def name(self) -> str:
        return f"Twist({getattr(self.f, '__name__', type(self.f).__name__)})"

    def prefix(self, text: bytes) -> float:
        return float(self.f(text.decode(errors="ignore")))

    def complete(self, text: bytes) -> float:
        return 0.0


class Critic(Potential):
    """A potential that weighs texts once a cycle, and does not say which tokens are proposed, whatever it can tell."""

    def __init__(self, potential: Potential) -> None:
        if not isinstance(potential, Potential):
            raise OptionError("a critic must be of a potential", f"got {type(potential).__name__}")
        self._of = potential

    @property
    def name(self) -> str:
        return f"Critic({self._of.name})"

    def prefix(self, text: bytes) -> float:
        return self._of.prefix(text)

    def complete(self, text: bytes) -> float:
        return self._of.complete(text)

    def batch_prefix(self, texts: Sequence[bytes]) -> Sequence[float]:
        return self._of.batch_prefix(texts)

    def batch_complete(self, texts: Sequence[bytes]) -> Sequence[float]:
        return self._of.batch_complete(texts)
