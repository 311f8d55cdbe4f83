"""Critics: potentials that weigh texts after they have been written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from smc_compile.control.potentials import Potential
from smc_compile.control.soft_potentials import Reward
from smc_compile.errors import GenerationError
from smc_compile.runtime.state.conditioning import WrittenText


class TextCritic:
    """As ``smc_compile.runtime.state.conditioning.Appraiser``.

    Args:
        of: the potentials that weigh the texts of each request.
        tokens: the bytes of each token; None where no tokenizer was given.
        prompts: [L] of each request, without padding.
    """

    def __init__(
        self,
        of: Mapping[int, Sequence[Potential]],
        tokens: Sequence[bytes | None] | None,
        prompts: Mapping[int, Tensor],
    ) -> None:
        self._of, self._tokens, self._prompts = of, tokens, prompts

    def __call__(self, texts: Sequence[WrittenText]) -> list[float]:
        weights = [0.0] * len(texts)
        for potential in dict.fromkeys(potential for some in self._of.values() for potential in some):
            rows = [i for i, text in enumerate(texts) if potential in self._of[text.request]]
            for i, weight in zip(rows, self._asked(potential, [texts[i] for i in rows]), strict=True):
                weights[i] += weight * self._of[texts[i].request].count(potential)
        return weights

    def _asked(self, potential: Potential, texts: Sequence[WrittenText]) -> list[float]:
        if isinstance(potential, Reward) and isinstance(potential.f, nn.Module):
            return checked(potential, self._of_module(potential, texts))
        weights = [0.0] * len(texts)
        for whole in (False, True):
            rows = [i for i, text in enumerate(texts) if text.whole == whole]
            if not rows:
                continue
            spelled = [self._bytes(texts[i]) for i in rows]
            ask = potential.batch_complete if whole else potential.batch_prefix
            told = checked(potential, ask(spelled), len(rows))
            for i, weight in zip(rows, told, strict=True):
                weights[i] = weight
        return weights

    def _of_module(self, potential: Reward, texts: Sequence[WrittenText]) -> list[float]:
        """Of the part of each text that counts: nothing, a beginning of whole steps, or all."""
        counted = [(i, self._counted(potential, text)) for i, text in enumerate(texts)]
        asked = [(i, tokens) for i, tokens in counted if tokens is not None]
        ids = [torch.cat([self._prompts[texts[i].request], self._ids(texts[i], tokens)]) for i, tokens in asked]
        weights = [0.0] * len(texts)
        for (i, _), weight in zip(asked, potential.of_ids(ids) if ids else [], strict=True):
            weights[i] = weight
        return weights

    def _ids(self, text: WrittenText, tokens: int) -> Tensor:
        prompt = self._prompts[text.request]
        return torch.tensor(text.tokens[:tokens], dtype=prompt.dtype, device=prompt.device)

    def _counted(self, potential: Reward, text: WrittenText) -> int | None:
        """How many of the tokens a reward is asked about; None where it is not asked."""
        if text.whole or potential.at == "cycle":
            return len(text.tokens)
        if potential.at == "end":
            return None
        step = potential.step.encode()
        for size in range(len(text.tokens), 0, -1):
            last = (self._tokens or ())[text.tokens[size - 1]] or b""
            if last.endswith(step):
                return size
        return None

    def _bytes(self, text: WrittenText) -> bytes:
        assert self._tokens is not None
        return b"".join(self._tokens[token] or b"" for token in text.tokens)


def checked(potential: Potential, told: Sequence[float], count: int | None = None) -> list[float]:
    """The weights that a potential gave.

    Raises:
        GenerationError: there are not as many as texts, or one is NaN or infinite.
    """
    weights = [float(weight) for weight in told]
    if count is not None and len(weights) != count:
        raise GenerationError(
            f"{potential.name} must give a weight for each text",
            f"it gave {len(weights)} for {count}",
            "error.partial holds what was generated before",
        )
    if any(math.isnan(weight) or weight == math.inf for weight in weights):
        raise GenerationError(
            f"{potential.name} gave a weight that is NaN or infinite",
            f"its weights were {weights[:4]}",
            "a weight is a number, or -inf; error.partial holds what was generated before",
        )
    return weights
