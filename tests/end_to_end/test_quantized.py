"""Models whose weights torchao has quantised: tensor subclasses are inputs of what is compiled, part by part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from transformers import LlamaConfig, LlamaForCausalLM

import smc_compile
from smc_compile.program.guards import model_state

quantization = pytest.importorskip("torchao.quantization")
CONFIGS = {
    "int8 weights": quantization.Int8WeightOnlyConfig,
    "int8 weights and activations": quantization.Int8DynamicActivationInt8WeightConfig,
}
PROMPT = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture(autouse=True)
def settings_do_not_stay() -> Iterator[None]:
    """The library sets options of Inductor for the whole process when it quantises."""
    before = inductor_config.get_config_copy()
    yield
    for name, value in inductor_config.get_config_copy().items():
        if value != before[name]:
            setattr(inductor_config, name, before[name])


def llama(name: str | None = None, layers: int = 1, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
        initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    if name is not None:
        quantization.quantize_(model, CONFIGS[name]())
    return model


def eager(model: nn.Module, n: int) -> Tensor:
    ids = PROMPT
    with torch.no_grad():
        for _ in range(n):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def greedy(model: nn.Module, draft: nn.Module | None = None, n: int = 8, **options: Any) -> Tensor:
    options = {"temperature": 0, "compiler": "eager", "lookahead": 3, **options}
    return smc_compile.generate(model, draft, PROMPT, max_new_tokens=n, **options).sequences


interpreted = pytest.mark.usefixtures("untraced_regions")


@interpreted
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_is_the_quantized_model(name: str) -> None:
    model = llama(name)
    assert torch.equal(greedy(model), eager(model, 8))
    assert torch.equal(greedy(model, llama(seed=1)), eager(model, 8))


@interpreted
def test_a_quantized_draft_proposes_for_its_target() -> None:
    """The target rounds nothing: its text is its own."""
    model, draft = llama(), llama("int8 weights")
    assert torch.equal(greedy(model, draft), eager(model, 8))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_quantized_model_is_lowered(name: str) -> None:
    model = llama(name)
    assert torch.equal(greedy(model, n=4, compiler="aot_eager"), eager(model, 4))


@interpreted
def test_quantizing_between_calls_is_seen() -> None:
    model = llama()
    before = model_state(model)
    assert torch.equal(greedy(model), eager(model, 8))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert model_state(model) != before
    assert torch.equal(greedy(model), eager(model, 8))


def test_what_inductor_compiles_wrongly_is_refused() -> None:
    """With torch 2.13 on a CPU, torch.compile of such a model alone gives logits that are off by their whole size."""
    model = llama("int8 weights and activations")
    with pytest.raises(smc_compile.OptionError, match=r"rounded to eight bits[\s\S]*aot_eager"):
        greedy(model, compiler="inductor")
