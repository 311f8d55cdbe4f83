"""Shared by the tests of the passes: a function of ids as a module, and models traced once for all tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from helpers.models import CACHEABLE
from torch import Tensor, fx, nn

from smc_compile.passes.cache.synthesize import synthesize_cache
from smc_compile.passes.capture.export_lm import OwnedWeights
from smc_compile.passes.ir import CachedLM, CausalLM
from smc_compile.passes.pipeline import capture
from smc_compile.passes.validate import original_rows


class Last(nn.Module):
    """The logits of the last position."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids)[:, -1]


class Step(nn.Module):
    """``then(embedding(ids))``: the smallest step whose graph shows what ``then`` does with [B, S, width]."""

    def __init__(self, then: Callable[[Tensor], Tensor], width: int = 8, vocab: int = 11) -> None:
        super().__init__()
        self.then = then
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Parameter(torch.randn(vocab, width, generator=generator, dtype=torch.float64))

    def forward(self, ids: Tensor) -> Tensor:
        return self.then(nn.functional.embedding(ids, self.embed))


def tokens(batch: int, length: int, vocab: int = 11, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def export(step: nn.Module, batch: int = 2) -> CausalLM:
    return capture(step, torch.zeros(batch, 2, dtype=torch.long))[0]


def export_then(then: Callable[[Tensor], Tensor], batch: int = 2, **sizes: int) -> CausalLM:
    return export(Step(then, **sizes), batch)


@lru_cache
def model(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Two layers in float64; one layer in other dtypes, to keep the many traces short."""
    sizes = {"layers": 1} if dtype != torch.float64 and name != "one_layer_one_head" else {}
    return CACHEABLE[name](**sizes).to(dtype)


Traced = tuple[CausalLM, CachedLM, OwnedWeights]


def traced(name: str, dtype: torch.dtype = torch.float64, batch: int = 2) -> Traced:
    """A model of tests/models.py as a causal graph, its cached form and its weights."""
    return _traced(name, dtype, batch)


@lru_cache
def _traced(name: str, dtype: torch.dtype, batch: int) -> Traced:
    lm, owned = capture(Last(model(name, dtype)), torch.zeros(batch, 2, dtype=torch.long))
    return lm, synthesize_cache(lm), owned


def op_names(graph: fx.Graph) -> list[str]:
    return [getattr(n.target, "__name__", str(n.target)) for n in graph.nodes if n.op == "call_function"]


def rows_of(lm: CausalLM, ids: Tensor, weights: list[Tensor]) -> Tensor:
    """What the graph returns for ids, run op by op."""
    with torch.no_grad():
        return original_rows(lm, ids, weights)
