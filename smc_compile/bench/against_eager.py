"""Whether compiled generation computes what the model does: log-probabilities beside those of an eager pass.

An error in a cache, a copy of rows, a recorded graph or a kernel changes the log-probability of some later token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from smc_compile.errors import SMCError
from smc_compile.result import Generation

LOOKED_AT = 4  # particles of a request
ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}  # nats, on average


class Agreement(NamedTuple):
    """Differences of log-probabilities over all tokens, in nats."""

    mean: float
    largest: float


def difference(model: Callable[[Tensor], Tensor], generation: Generation, temperature: float) -> Agreement:
    """How far reported log-probabilities are from the model's at ``temperature``, on new tokens of some particles.

    model: ids [1, S] -> logits [1, S, V]. Prompts without padding.
    """
    reported = generation.particle_log_probs[:, :LOOKED_AT].flatten(0, 1)  # [R, n]
    texts = generation.particles[:, :LOOKED_AT].flatten(0, 1)  # [R, P+n]
    new = reported.shape[1]
    found = []
    with torch.no_grad():
        for text in texts:
            logits = model(text[None])[0, -new - 1 : -1]
            log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, -1)
            found.append(log_p.gather(1, text[-new:, None])[:, 0].double())
    lengths = generation.particle_lengths[:, :LOOKED_AT].flatten()
    counts = torch.arange(new, device=lengths.device) < lengths[:, None]
    error = (torch.stack(found) - reported).abs()[counts]
    return Agreement(float(error.mean()), float(error.max()))


def checked(name: str, agreement: Agreement, dtype: torch.dtype) -> Agreement:
    """Return ``agreement`` if rounding in ``dtype`` explains it.

    Raises:
        SMCError: if it does not, or a difference is not a number.
    """
    if agreement.mean <= ALLOWED[dtype]:
        return agreement
    raise SMCError(
        f"{name} does not compute what the model computes in eager mode",
        f"log-probabilities of its tokens differ by {agreement.mean:.2g} nats on average, {agreement.largest:.2g} at "
        f"most; rounding in {str(dtype).removeprefix('torch.')} explains {ALLOWED[dtype]:g}",
        "nothing was timed; please report the command, the versions of torch and triton, and the device",
    )
