"""Our own contestants: the plain loop, the compiled loop, exact speculation and SMC on one pair and one prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smc_compile.bench.ceilings import ModelSize, PassCost, cycle_passes, loop_passes
from smc_compile.bench.measure import Contestant
from smc_compile.generate import generate
from smc_compile.result import Generation

LogitsFunction = Callable[[Tensor], Tensor]  # ids [B, S] -> logits [B, S, V]


def plain_loop(model: LogitsFunction, ids: Tensor, max_new_tokens: int, temperature: float) -> Tensor:
    """Decoding as people write it: the whole sequence through the model for every token."""
    for _ in range(max_new_tokens):
        logits = model(ids)[:, -1]
        probs = torch.softmax(logits / temperature, -1)
        ids = torch.cat([ids, torch.multinomial(probs, 1)], -1)
    return ids


def contest(
    target: nn.Module,
    draft: nn.Module,
    ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    shapes: Sequence[tuple[int, int]],
    eager_tokens: int | None,
    speculative: Sequence[tuple[int, int]] = (),
    sizes: tuple[ModelSize, ModelSize] | None = None,
    compiler: str = "inductor",
    auto: bool = False,
) -> list[Contestant]:
    """The plain loop (unless ``eager_tokens`` is None), the compiled loop, exact speculation with N chains of K tokens
    at each (N, K) of ``speculative``, SMC at each of ``shapes``, and what is chosen without options (``auto``).

    ``sizes`` of target and draft give each the least that a step can cost; ``compiler`` is the option of that name.
    """

    def compiled(method: str, **numbers: Any) -> Callable[[int], Generation]:
        def run(seed: int) -> Generation:
            return generate(
                target,
                draft,
                ids,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                method=method,
                compiler=compiler,
                **numbers,
            )

        return run

    def cycles(n: int, k: int) -> list[PassCost] | None:
        return cycle_passes(*sizes, n, k, ids.shape[1], max_new_tokens) if sizes and min(n, k) > 0 else None

    tokens = loop_passes(sizes[0], ids.shape[1], max_new_tokens) if sizes else None
    loop = Contestant("autoregressive", compiled("autoregressive"), max_new_tokens, passes=tokens)
    drafted = [
        Contestant(method, compiled(method, n_particles=n, lookahead=k), max_new_tokens, n, k, passes=cycles(n, k))
        for method, pairs in (("speculative", speculative), ("smc", shapes))
        for n, k in pairs
    ]
    if auto:
        drafted.append(Contestant("auto", compiled("auto"), max_new_tokens))
    if eager_tokens is None:
        return [loop, *drafted]
    return [eager_loop(target, ids, temperature, eager_tokens, max_new_tokens), loop, *drafted]


def eager_loop(target: nn.Module, ids: Tensor, temperature: float, tokens: int, max_new_tokens: int) -> Contestant:
    """The plain loop for ``tokens`` tokens."""

    def run(seed: int, tokens: int = tokens) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return plain_loop(target, ids, tokens, temperature)

    note = f"timed on the first {tokens} tokens, its cheapest; each is a pass over the whole text"
    return Contestant(
        "eager",
        run,
        tokens,
        note=None if tokens == max_new_tokens else note,
        warm_up=lambda seed: run(seed, min(4, tokens)),
    )
