"""``smc-compile models``: which decoders of the transformers library compile, found out by trying each of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from smc_compile.compile import LastLogits
from smc_compile.errors import OptionError

DEFAULT = """
    llama mistral qwen2 qwen3 gemma2 gemma3_text phi3 gpt2 gpt_neo gptj falcon bloom opt starcoder2 olmo2 smollm3
    granite cohere2 stablelm gpt_oss mixtral qwen3_moe
""".split()  # noqa: SIM905

# Configurations are shrunk by the names of their attributes, where they hold an integer.
SMALL = {
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers": 2,
    "hidden_size n_embd n_embed d_model dim hidden_dim embed_dim word_embed_proj_dim embedding_size": 32,
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads": 4,
    "num_key_value_heads num_kv_heads n_head_kv num_global_key_value_heads": 2,
    "head_dim global_head_dim kv_channels attention_head_dim d_kv": 8,
    "intermediate_size n_inner ffn_dim d_ff decoder_ffn_dim encoder_ffn_dim moe_intermediate_size dim_ff "
    "shared_expert_intermediate_size ffn_hidden_size expert_ffn_hidden_size intermediate_size_mlp "
    "moe_shared_expert_intermediate_size shared_intermediate_size": 48,
    "vocab_size vocab_size_per_layer_input": 97,
    "num_experts num_local_experts n_routed_experts moe_num_experts": 4,
    "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts": 2,
    "n_shared_experts num_shared_experts n_group topk_group num_expert_group first_k_dense_replace": 1,
    "sliding_window window_size attention_window_size attention_chunk_size local_attention": 6,
    "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length max_target_positions seq_length": 64,
    "rotary_dim": 4,
    "q_lora_rank kv_lora_rank": 16,
    "qk_rope_head_dim qk_nope_head_dim v_head_dim": 8,
    "qk_head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Left unset these are derived, or the configuration does not build.
UNSET = ("head_dim", "num_key_value_heads", "n_group", "topk_group", "num_experts_per_tok", "n_routed_experts")
SIZES = {name: value for names, value in SMALL.items() for name in names.split()}


def families() -> list[str]:
    """The model types that transformers maps to a causal language model.

    Raises:
        OptionError: when transformers is not installed.
    """
    return sorted(_transformers().models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise OptionError(
            "transformers is not installed", "the models come from it", 'pip install "smc_compile[transformers]"'
        ) from None
    return transformers


def build(family: str, attention: str | None = None, dtype: torch.dtype = torch.float64, **sizes: Any) -> nn.Module:
    """A tiny causal language model of a family, with random weights, in eval mode."""
    transformers = _transformers()
    default = transformers.AutoConfig.for_model(family)
    config = type(default)(**{**small(default), **sizes})
    torch.manual_seed(0)
    choice = {"attn_implementation": attention} if attention else {}
    model = transformers.AutoModelForCausalLM.from_config(config, **choice)
    shake(model)
    return model.to(dtype).eval()


def small(config: Any) -> dict[str, Any]:
    """Arguments that make a configuration like ``config`` small, each kind of layer kept."""
    chosen: dict[str, Any] = {}
    for name, value in SIZES.items():
        current = _setting(config, name)
        is_unset = current is None and name in vars(config) and name in UNSET
        if is_unset or (isinstance(current, int) and not isinstance(current, bool)):
            chosen[name] = value
    if "kv_lora_rank" in chosen:  # keys made from a latent have as many heads as queries
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
    kinds = list(dict.fromkeys(_setting(config, "layer_types") or []))
    if kinds:
        shared = bool(_setting(config, "num_kv_shared_layers"))
        chosen["layer_types"] = kinds * (2 if len(kinds) == 1 or shared else 1)
        chosen["num_hidden_layers"] = len(chosen["layer_types"])
        if shared:  # the second half of the layers reads the keys of the first
            chosen["num_kv_shared_layers"] = len(kinds)
    if _setting(config, "is_decoder") is False:
        chosen["is_decoder"] = True
    if getattr(config, "attention_types", None):  # [[kinds, times], ...]
        chosen["attention_types"] = [[config.attention_types[0][0], 1]]
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            chosen[name] = type(getattr(config, name))(**small(getattr(config, name)))
    return chosen


def _setting(config: Any, name: str) -> Any:
    """A configuration's attribute, None where it has none, derives it, or gives each layer its own."""
    if isinstance(getattr(type(config), getattr(config, "attribute_map", {}).get(name, name), None), property):
        return None
    try:
        return getattr(config, name, None)
    except Exception:  # transformers raises a type of its own for what differs between layers
        return None


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Replace the cautious initial weights: all parameters must matter, biases and norms too."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.2)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))


class Doubled(LastLogits):
    """``LastLogits`` in float64 throughout: what a model casts to float32 inside is cast to float64.

    The cached form repeats the model's operations, so a difference above 1e-9 is then a mistake and not rounding.
    """

    def forward(self, ids: Tensor) -> Tensor:
        with _Float64():
            return super().forward(ids)


class _Float64(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            return args[0].double()
        wide = {torch.float32: torch.float64}
        args = tuple(wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {k: wide.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return function(*args, **kwargs)
