"""Random small models in random loops: a right result or an error of this package, never anything else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from helpers.enumeration import chi_square_p_value, sequence_distribution
from helpers.matmul_models import Eager, EagerWhere, Softcap
from helpers.model_parts import LM, build, perturbed
from helpers.plain_models import Alibi, Llama, LlamaBuffered, SlidingWindow
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from smc_compile import SMCError, decode

N, RUNS = 4, 512
PROMPT = torch.tensor([1, 0, 2])
OPTIONS = {"compiler": "eager", "n_particles": 3, "lookahead": 2, "seed": 0}


class Learned(LM):
    """The shared skeleton with learned positions and SDPA."""

    learned_positions = True


STYLES = [Learned, Llama, LlamaBuffered, Alibi, SlidingWindow, Eager, EagerWhere, Softcap]
SAMPLERS = ["temperature", "top_k", "bias"]
FORMS = ["cat", "buffer", "list"]
SLICES = ["select", "narrow", "keep"]


@dataclass(frozen=True)
class Case:
    style: type[LM]
    layers: int
    heads: int
    kv_heads: int
    layer_norm: bool
    vocab: int
    form: str
    sampler: str
    slicing: str
    parameter: float

    def model(self) -> nn.Module:
        sizes = {"vocab": self.vocab, "layers": self.layers, "heads": self.heads, "kv_heads": self.kv_heads, "dim": 8}
        return build(normed(self.style) if self.layer_norm else self.style, **sizes)

    def distribution(self, logits: Tensor) -> Tensor:
        """Logits [..., V] of what is drawn."""
        if self.sampler == "temperature":
            return logits / self.parameter
        if self.sampler == "bias":
            return logits + torch.linspace(-1.0, 1.0, self.vocab, dtype=logits.dtype) * self.parameter
        return logits.masked_fill(logits < torch.topk(logits, 2).values[..., -1:], -math.inf)

    def loop(self) -> Callable[[nn.Module, Tensor, int], Tensor]:
        slicing, distribution, form = self.slicing, self.distribution, self.form

        def draw(model, ids):
            logits = model(ids)
            if slicing == "select":
                last = logits[:, -1]
            elif slicing == "narrow":
                last = logits[:, -1, :]
            else:
                last = logits[:, -1:].squeeze(1)
            return torch.multinomial(torch.softmax(distribution(last), -1), 1)

        def cat(model, ids, n):
            for _ in range(n):
                ids = torch.cat([ids, draw(model, ids)], 1)
            return ids

        def buffer(model, ids, n):
            start = ids.shape[1]
            tokens = torch.zeros(ids.shape[0], start + n, dtype=torch.long)
            tokens[:, :start] = ids
            for i in range(start, start + n):
                tokens[:, i] = draw(model, tokens[:, :i])[:, 0]
            return tokens

        def listed(model, ids, n):
            tokens = [ids]
            for _ in range(n):
                tokens.append(draw(model, torch.cat(tokens, 1)))
            return torch.cat(tokens, 1)

        return {"cat": cat, "buffer": buffer, "list": listed}[form]


def normed(style: type[LM]) -> Callable[..., nn.Module]:
    def make(**sizes: int) -> nn.Module:
        model = style(**sizes)
        width = model.embed.weight.shape[1]
        for block in model.blocks:
            block.norm1, block.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        model.norm = nn.LayerNorm(width)
        return model

    return make


@st.composite
def cases(draw: st.DrawFn) -> Case:
    style = draw(st.sampled_from(STYLES))
    heads = draw(st.sampled_from([1, 2, 4]))
    grouped = style in (Llama, LlamaBuffered)
    return Case(
        style=style,
        layers=draw(st.integers(1, 2)),
        heads=heads,
        kv_heads=draw(st.sampled_from([k for k in (1, 2, 4) if heads % k == 0])) if grouped else heads,
        layer_norm=draw(st.booleans()),
        vocab=draw(st.integers(3, 6)),
        form=draw(st.sampled_from(FORMS)),
        sampler=draw(st.sampled_from(SAMPLERS)),
        slicing=draw(st.sampled_from(SLICES)),
        parameter=draw(st.sampled_from([0.5, 0.8, 1.5])),
    )


def assert_valid(case: Case, model: nn.Module, ids: Tensor, result: Tensor) -> None:
    assert result.dtype == torch.int64
    assert result.shape == (ids.shape[0], ids.shape[1] + N)
    assert torch.equal(result[:, : ids.shape[1]], ids)
    assert result.min() >= 0
    assert result.max() < case.vocab
    with torch.no_grad():
        probs = case.distribution(model(result[:, :-1])[:, -N:].double()).softmax(-1)
    assert (probs.gather(-1, result[:, -N:, None]) > 0).all()


@pytest.mark.slow
@pytest.mark.usefixtures("untraced_regions")
@settings(max_examples=5, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_a_valid_result_or_an_error_of_the_package(case: Case):
    """The first token's distribution: chi-square at level 1e-4 a case, 512 runs."""
    torch._dynamo.reset()
    model = case.model()
    ids = PROMPT.expand(2, -1) % case.vocab
    smc = decode(case.loop(), draft=perturbed(model), **OPTIONS)
    exact = decode(case.loop(), method="autoregressive", **{**OPTIONS, "validate": False})
    try:
        result, many = smc(model, ids, N), exact(model, ids[:1].expand(RUNS, -1), N)
    except SMCError as error:
        event(f"refused: {error.what}")
        return
    event("compiled")
    assert_valid(case, model, ids, result)
    assert torch.isfinite(smc.last.log_evidence).all()
    assert_valid(case, model, ids[:1].expand(RUNS, -1), many)
    distribution = sequence_distribution(model, ids[0], 1, case.vocab, process=case.distribution)
    assert chi_square_p_value(many[:, 3:4], distribution) > 1e-4
