"""A target and a draft of given shapes with random weights, and a random prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from smc_compile.pairs.llama import Llama, LlamaConfig
from smc_compile.pairs.nested import Tuned, check_fits, tune_pair


def build_models(
    target: LlamaConfig,
    draft: LlamaConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    acceptance: float | None,
    temperature: float,
) -> tuple[Llama, Llama, Tuned | None]:
    """Both models, and the acceptance rate that was reached; unrelated random weights where ``acceptance`` is None.

    Raises:
        OptionError: where the draft does not fit inside the target, or the rate cannot be reached.
    """
    if acceptance is not None:
        check_fits(target, draft)
    torch.manual_seed(seed)
    pair = build(target, dtype, device), build(draft, dtype, device)
    tuned = None if acceptance is None else tune_pair(*pair, acceptance, temperature, seed)
    return *pair, tuned


def build(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> Llama:
    """A model of random weights, created in ``dtype`` on ``device``: large weights never exist in another type."""
    with device, default_dtype(dtype):
        model = Llama(config)
    return model.to(dtype).eval().requires_grad_(False)  # the rotary table was made in float32


def random_prompt(vocab: int, length: int, device: torch.device, seed: int) -> Tensor:
    """ids [1, P]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (1, length), generator=generator).to(device)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, new tensors are of ``dtype``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
