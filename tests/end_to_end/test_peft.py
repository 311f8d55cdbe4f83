"""Adapters of the peft library: what generates is the model as it is, adapters on, off, switched, merged or mixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import smc_compile
from smc_compile.program import from_model

peft = pytest.importorskip("peft")

PROMPT = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
pytestmark = pytest.mark.usefixtures("untraced_regions")


def llama(layers: int = 1, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def adapted(layers: int = 1) -> nn.Module:
    """A model with two adapters, "default" (active) and "second"."""
    model = peft.get_peft_model(llama(layers), lora())
    model.add_adapter("second", lora(rank=3))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn_like(weight)
    return model.double().eval()


def lora(rank: int = 2) -> object:
    return peft.LoraConfig(r=rank, lora_alpha=4, target_modules=["q_proj", "v_proj", "up_proj"], lora_dropout=0.1)


@contextmanager
def switched(model: nn.Module, *names: str) -> Iterator[None]:
    model.base_model.set_adapter(list(names))
    try:
        yield
    finally:
        model.base_model.set_adapter(["default"])


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()


@contextmanager
def scaled(model: nn.Module) -> Iterator[None]:
    layers = [module for module in model.modules() if hasattr(module, "scale_layer")]
    for layer in layers:
        layer.scale_layer(3.0)
    try:
        yield
    finally:
        for layer in layers:
            layer.unscale_layer(3.0)


STATES: dict[str, Callable[[nn.Module], object]] = {
    "off": lambda m: m.disable_adapter(),
    "the second": lambda m: switched(m, "second"),
    "both": lambda m: switched(m, "default", "second"),
    "merged": merged,
    "scaled": scaled,
}


def eager(model: nn.Module, ids: Tensor, n: int = 6) -> Tensor:
    with torch.no_grad():
        for _ in range(n):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def ours(model: nn.Module, **options: object) -> Tensor:
    options = {"max_new_tokens": 6, "compiler": "eager", "temperature": 0, "validate": False, **options}
    return smc_compile.generate(model, input_ids=PROMPT, **options).sequences


def through_the_library(model: nn.Module) -> Tensor:
    return model.generate(
        input_ids=PROMPT,
        max_new_tokens=6,
        do_sample=False,
        custom_generate=smc_compile.transformers.generate,
        compiler="eager",
        validate=False,
        pad_token_id=0,
        eos_token_id=None,
    )


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return adapted()


WAYS = [*((name, ours) for name in STATES), ("off", through_the_library), ("the second", through_the_library)]


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_the_text_is_that_of_the_adapters_as_they_are(
    model: nn.Module, name: str, way: Callable[[nn.Module], Tensor]
) -> None:
    before = eager(model, PROMPT)
    assert torch.equal(way(model), before)
    with STATES[name](model):  # type: ignore[attr-defined]
        assert not torch.equal(eager(model, PROMPT), before) or name == "merged"
        assert torch.equal(way(model), eager(model, PROMPT))
    known = set(from_model.programs)
    assert torch.equal(way(model), before)
    with STATES[name](model):  # type: ignore[attr-defined]
        way(model)
    assert set(from_model.programs) == known


def test_an_adapter_is_trained_between_calls(model: nn.Module) -> None:
    ours(model)
    known = set(from_model.programs)
    for name, weight in model.named_parameters():
        if "lora_B.default" in name:
            weight.data.neg_()
    assert torch.equal(ours(model), eager(model, PROMPT))
    assert set(from_model.programs) == known


def test_an_adapter_is_added_and_deleted(model: nn.Module) -> None:
    ours(model)
    model.add_adapter("third", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.double()
    with switched(model, "third"):
        assert torch.equal(ours(model), eager(model, PROMPT))
    model.delete_adapter("third")
    assert torch.equal(ours(model), eager(model, PROMPT))


def test_the_draft_may_be_the_target_without_its_adapter(model: nn.Module) -> None:
    """One set of weights, two models: the draft is a view of the base model."""
    plain = llama()
    assert torch.equal(ours(model, draft=plain, lookahead=2), eager(model, PROMPT))
    with model.disable_adapter():
        assert torch.equal(ours(model, draft=plain, lookahead=2), eager(model, PROMPT))


def test_a_draft_with_adapters_is_what_it_is_at_the_call() -> None:
    target, draft = llama(), adapted()
    options = {"temperature": 1.0, "lookahead": 3, "n_particles": 2, "seed": 0, "compiler": "eager", "validate": False}
    with draft.disable_adapter():  # without its adapter the draft is the target: nothing is left to weigh
        alike = smc_compile.generate(target, draft, PROMPT, max_new_tokens=6, **options)
    other = smc_compile.generate(target, draft, PROMPT, max_new_tokens=6, **options)
    assert alike.log_weights.abs().max() < 1e-9 < other.log_weights.abs().max()
