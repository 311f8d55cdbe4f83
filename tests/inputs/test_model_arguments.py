"""Every argument that a transformers model takes and ``generate`` hands on is honoured or refused by its name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import smc_compile
from smc_compile.errors import InputError
from smc_compile.inputs.model_arguments import HANDLED, check_model_arguments

transformers = pytest.importorskip("transformers")
IDS = torch.tensor([[5, 3, 7, 1], [1, 9, 4, 2]])
PADDED = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
SIZES = {
    "GPT2LMHeadModel": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    "LlamaForCausalLM": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "OPTForCausalLM": {
        "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 16,
    },
}  # fmt: skip
NAMES = {name: list(inspect.signature(getattr(transformers, name).forward).parameters) for name in SIZES}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    made = {}
    for name, sizes in SIZES.items():
        torch.manual_seed(0)
        cls = getattr(transformers, name)
        config = cls.config_class(vocab_size=11, bos_token_id=None, eos_token_id=None, pad_token_id=None, **sizes)
        made[name] = cls(config).eval()
    return made


def generate(model: Any, **given: Any) -> torch.Tensor:
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    ours = {"compiler": "eager", "custom_generate": smc_compile.transformers.generate} if given.pop("ours") else {}
    return model.generate(IDS, **options, **ours, **given)


def value_of(name: str) -> Any:
    """A value that means something to the argument, and changes what the model computes."""
    if name in ("cache", "past_key_values"):
        cache = transformers.DynamicCache()
        cache.update(torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8), 0)
        return cache
    return torch.randn(2, 4, 16) if "embeds" in name or "hidden" in name else torch.arange(1, 5).expand(2, 4)


@pytest.mark.parametrize(("model", "name"), [(m, n) for m in NAMES for n in NAMES[m] if n not in ("self", "input_ids")])
def test_an_argument_that_changes_the_model_is_refused_by_name(models: dict[str, Any], model: str, name: str) -> None:
    if name in HANDLED or name in ("kwargs", "output_attentions", "output_hidden_states"):
        pytest.skip("what the model computes stays the same, or another test's subject")
    with pytest.raises((InputError, ValueError), match=name if name != "past_key_values" else "cache|past_key_values"):
        generate(models[model], ours=True, **{name: value_of(name)})


@pytest.mark.parametrize("name", ["something_else", "adapter_names", "pixel_values"])
def test_an_unknown_argument_is_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=name):
        check_model_arguments({name: torch.ones(1)}, IDS)


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"attention_mask": PADDED},
        {"position_ids": torch.arange(4).expand(2, 4)},
        {"attention_mask": PADDED, "position_ids": (PADDED.cumsum(-1) - 1).masked_fill(PADDED == 0, 1)},
        {"use_cache": False},
    ],
    ids=lambda given: " ".join(given) or "nothing",
)
def test_what_says_nothing_new_is_taken(models: dict[str, Any], model: str, given: dict[str, Any]) -> None:
    if model == "OPTForCausalLM" and "position_ids" in given:
        pytest.skip("its positions begin elsewhere")
    expected = generate(models[model], ours=False, **given)
    assert torch.equal(generate(models[model], ours=True, **given), expected)


def test_an_empty_cache_is_taken(models: dict[str, Any]) -> None:
    assert generate(models["LlamaForCausalLM"], ours=True, cache=transformers.DynamicCache()).shape == (2, 8)


def test_embeddings_without_tokens_are_refused_by_name(models: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="inputs_embeds"):
        models["LlamaForCausalLM"].generate(
            inputs_embeds=torch.zeros(1, 3, 16), max_new_tokens=2, custom_generate=smc_compile.transformers.generate
        )


def test_a_model_with_an_encoder_is_refused() -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=30, decoder_start_token_id=0, **sizes)
    ).eval()
    for call in (
        lambda: smc_compile.generate(t5, None, IDS, max_new_tokens=2, temperature=0),
        lambda: t5.generate(IDS, max_new_tokens=2, custom_generate=smc_compile.transformers.generate),
    ):
        with pytest.raises(InputError, match="no decoder-only model"):
            call()
