"""Tiny models of the transformers library, with random weights, built from the families' own configurations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from smc_compile.errors import OptionError
from smc_compile.program.model import LastLogits

# Configurations are shrunk by the names of their attributes, where they hold an integer.
SMALL = {
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers": 2,
    "hidden_size n_embd n_embed d_model dim hidden_dim embed_dim word_embed_proj_dim embedding_size": 32,
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads": 4,
    "num_key_value_heads num_kv_heads n_head_kv num_global_key_value_heads": 2,
    "head_dim global_head_dim kv_channels attention_head_dim d_kv qk_rope_head_dim qk_nope_head_dim v_head_dim": 8,
    "qk_head_dim q_lora_rank kv_lora_rank": 16,
    "rotary_dim": 4,
    "intermediate_size n_inner ffn_dim d_ff dim_ff decoder_ffn_dim encoder_ffn_dim moe_intermediate_size": 48,
    "shared_expert_intermediate_size ffn_hidden_size expert_ffn_hidden_size intermediate_size_mlp": 48,
    "moe_shared_expert_intermediate_size shared_intermediate_size": 48,
    "hidden_size_per_layer_input indexer_head_dim index_head_dim": 8,
    "hidden_size_global": 32,
    "indexer_n_heads indexer_compress_ratio": 2,
    "indexer_kv_heads": 1,
    "indexer_budget index_topk keep_window_size": 4,
    "num_experts num_local_experts n_routed_experts moe_num_experts": 4,
    "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts": 2,
    "n_shared_experts num_shared_experts n_group topk_group num_expert_group first_k_dense_replace": 1,
    "state_size ssm_state_size mamba_d_state linear_key_head_dim linear_value_head_dim linear_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads linear_num_heads": 4,
    "n_groups mamba_n_groups mamba_ngroups": 1,
    "chunk_size mamba_chunk_size": 4,
    "n_mamba_heads": 4,
    "vocab_size vocab_size_per_layer_input unpadded_vocab_size": 97,
    "sliding_window window_size attention_window_size attention_chunk_size local_attention": 6,
    "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length max_target_positions seq_length": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIZES = {name: value for names, value in SMALL.items() for name in names.split()}
# Left unset these are derived, or the configuration does not build.
UNSET = ("head_dim", "num_key_value_heads", "n_group", "topk_group", "num_experts_per_tok", "n_routed_experts",
         "n_shared_experts", "indexer_n_heads", "indexer_kv_heads", "indexer_head_dim",
         "indexer_budget", "indexer_compress_ratio")  # fmt: skip
SWITCHED_ON = ("is_decoder", "causal")  # a family that can be an encoder or a decoder is built as a decoder
KINDS = ("full_attention", "conv")  # of layers, where a configuration wants a list of them and has none
LAYERS = 12  # at most, to meet each kind of layer once


def library() -> Any:
    """The transformers library.

    Raises:
        OptionError: when it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise OptionError(
            "transformers is not installed", "the models come from it", 'pip install "smc_compile[transformers]"'
        ) from None
    return transformers


def build(family: str, attention: str | None = None, dtype: torch.dtype = torch.float64, **sizes: Any) -> nn.Module:
    """A tiny causal language model of a family, with random weights, in eval mode; ``sizes`` override the small ones.

    ``attention`` None takes "sdpa" where the family offers it. Some families share weights between layers of one kind:
    where each kind once does not build, each comes twice.
    """
    default = library().AutoConfig.for_model(family)
    first: Exception | None = None
    for arguments in _attempts(default):
        try:
            return _build(default, attention, dtype, {**arguments, **sizes})
        except Exception as error:  # whatever a library raises on a configuration that it does not like
            first = first or error
    assert first is not None
    raise first


def _attempts(default: Any) -> Iterator[dict[str, Any]]:
    """Arguments to try in turn: families tie their numbers together in ways of their own."""
    chosen = small(default)
    yield chosen
    yield small(default, times=2)
    yield {**chosen, "num_experts_per_tok": 1}
    if "num_attention_heads" in chosen:
        yield {**chosen, "num_key_value_heads": chosen["num_attention_heads"]}
    kinds = _setting(default, "layer_types")
    if kinds:  # as the family lays them out itself
        reached = max(list(kinds).index(kind) + 1 for kind in kinds)
        yield {name: v for name, v in chosen.items() if name != "layer_types"} | {"num_hidden_layers": reached}


def _build(default: Any, attention: str | None, dtype: torch.dtype, arguments: dict[str, Any]) -> nn.Module:
    choice = {"attn_implementation": attention} if attention else {}
    torch.manual_seed(0)
    model = library().AutoModelForCausalLM.from_config(type(default)(**arguments), **choice)
    shake(model)
    return model.to(dtype).eval()


def small(config: Any, times: int = 1) -> dict[str, Any]:
    """Arguments that make a configuration like ``config`` small, each kind of layer kept, ``times`` times."""
    chosen: dict[str, Any] = {}
    for name, value in SIZES.items():
        current = _setting(config, name)
        is_unset = current is None and name in vars(config) and name in UNSET
        if is_unset or (isinstance(current, int) and not isinstance(current, bool)):
            chosen[name] = value
    if "kv_lora_rank" in chosen:  # keys made from a latent have as many heads as queries
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
    if "attn_layer_indices" in vars(config):
        chosen["attn_layer_indices"] = [1]
    chosen.update(_layers(config, times))
    chosen.update(_state_heads(config, chosen))
    for name in SWITCHED_ON:
        if _setting(config, name) is False:
            chosen[name] = True
    if _setting(config, "attention_types"):  # [[kinds, times], ...]
        chosen["attention_types"] = [[config.attention_types[0][0], 1]]
    if _setting(config, "languages") and _setting(config, "default_language") is None:
        chosen["default_language"] = config.languages[0]
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            chosen[name] = type(getattr(config, name))(**small(getattr(config, name), times))
    return chosen


def _layers(config: Any, times: int) -> dict[str, Any]:
    """How many layers there are, and of what kinds where a configuration lists them."""
    kinds = list(dict.fromkeys(_setting(config, "layer_types") or []))
    if not kinds and "layer_types" in vars(config):
        kinds = list(KINDS)
    if kinds == ["linear_attention"] and _setting(config, "num_attention_heads"):
        kinds.append("full_attention")  # a hybrid, whose configuration has no attention by default
    if not kinds:
        return {"num_hidden_layers": n} if (n := _layers_for_all_kinds(config)) else {}
    shared = bool(_setting(config, "num_kv_shared_layers"))
    kinds_of_layers = kinds * times * (2 if len(kinds) == 1 or shared else 1)
    chosen = {"layer_types": kinds_of_layers, "num_hidden_layers": len(kinds_of_layers)}
    if shared:  # the second half of the layers reads the keys of the first
        chosen["num_kv_shared_layers"] = len(kinds_of_layers) // 2
    return chosen


def _layers_for_all_kinds(config: Any) -> int | None:
    """The first so many layers hold every kind that a configuration derives from periods, offsets and patterns."""
    total, needed = getattr(config, "num_hidden_layers", None), 0
    derived = [name for name in dir(type(config)) if isinstance(getattr(type(config), name, None), property)]
    for name in derived:
        try:
            kinds = getattr(config, name)
        except Exception:  # a property that fails on defaults is ignored
            continue
        if isinstance(kinds, (list, tuple)) and len(kinds) == total and len(set(map(str, kinds))) > 1:
            needed = max(needed, *(list(kinds).index(kind) + 1 for kind in kinds))
    return needed if 2 < needed <= LAYERS else None


def _state_heads(config: Any, chosen: dict[str, Any]) -> dict[str, Any]:
    """Heads of a state-space layer: their number times their width is the expanded width of the model."""
    expand = next((v for v in (_setting(config, "expand"), _setting(config, "mamba_expand")) if v), None)
    if not isinstance(expand, int):
        return {}
    heads, found = 4, {}
    width = expand * SIZES["hidden_size"] // heads
    names = {"mamba_n_heads mamba_num_heads": heads, "mamba_d_head mamba_head_dim": width, "mamba_d_ssm": heads * width}
    if "num_attention_heads" not in chosen:  # these layers are all there is
        names |= {"num_heads": heads, "head_dim": width}
    for group, value in names.items():
        found.update({name: value for name in group.split() if isinstance(_setting(config, name), int)})
    return found


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


class LastLogits64(LastLogits):
    """``LastLogits`` in float64 throughout: what a model casts to float32 inside is cast to float64.

    The cached form repeats the model's operations, so a difference above 1e-9 is then a mistake and not rounding.
    """

    def forward(self, ids: Tensor) -> Tensor:
        with Float64Throughout():
            return super().forward(ids)


class Float64Throughout(TorchFunctionMode):
    """Inside, a cast to float32 is one to float64, and what is made without a dtype is float64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            return args[0].double()
        wide = {torch.float32: torch.float64}
        args = tuple(wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {k: wide.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        if function in FACTORIES and "dtype" not in kwargs and _holds_float(function, args, kwargs):
            kwargs["dtype"] = torch.float64  # named, so that a graph replayed outside makes it, too
        return function(*args, **kwargs)


FACTORIES = (torch.zeros, torch.ones, torch.empty, torch.linspace, torch.full, torch.arange)


def _holds_float(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a factory without a dtype makes a tensor of the default one."""
    if function not in (torch.full, torch.arange):
        return True
    numbers = [kwargs.get("fill_value", args[1] if len(args) > 1 else None)] if function is torch.full else args
    return any(isinstance(number, float) for number in numbers)
