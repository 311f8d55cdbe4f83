"""The loops of ``transformers`` in a bench: the library's own ``generate`` on the same weights."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from smc_compile.bench.ceilings import PassCost
from smc_compile.bench.measure import Contestant
from smc_compile.errors import OptionError
from smc_compile.pairs.llama import Llama

NAMES = {  # of parts of ours and of the library's
    "embedding.": "model.embed_tokens.",
    "layers.": "model.layers.",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}
PILOT_TOKENS = 32  # generated with each number of assistant tokens, to choose one
FEW_TOKENS = 8  # generated to estimate how long a round takes
ROUND_SECONDS = 60  # of one: where a processor emulates a type, all tokens can take many minutes


def has_library() -> bool:
    return importlib.util.find_spec("transformers") is not None


def require_library() -> None:
    if not has_library():
        raise OptionError("transformers is not installed", 'pip install "smc_compile[transformers]"')


def library_loop(
    target: Llama, ids: Tensor, *, new_tokens: int, temperature: float, passes: Sequence[PassCost] | None = None
) -> Contestant:
    """``generate`` of transformers, with its own cache; raises OptionError without the library."""
    require_library()
    run = library_run(library_twin(target), ids, temperature)
    tokens = tokens_within(ROUND_SECONDS, lambda n: run(0, n), new_tokens)
    note = f"generate of transformers {importlib.metadata.version('transformers')}, its own cache, not compiled"
    return Contestant(
        "transformers",
        lambda seed: run(seed, tokens),
        tokens,
        note=note + cut_note(tokens, new_tokens),
        warm_up=lambda seed: run(seed, 2),
        passes=passes,
        peer=True,
    )


def assisted_loop(
    target: Llama, draft: Llama, ids: Tensor, *, new_tokens: int, temperature: float, assistant_tokens: Sequence[int]
) -> Contestant:
    """``generate`` of transformers with the draft as its assistant, at the best of several numbers of its tokens.

    Each is tried on a few tokens; the number stays what it is during a generation. Raises OptionError without the
    library.
    """
    require_library()
    twin, assistant = library_twin(target), library_twin(draft)
    settings = assistant.generation_config
    settings.num_assistant_tokens_schedule, settings.assistant_confidence_threshold = "constant", 0.0
    run = library_run(twin, ids, temperature, assistant_model=assistant)
    steps = count_passes(twin)

    def with_tokens(k: int, seed: int, tokens: int) -> Tensor:
        settings.num_assistant_tokens = k
        return run(seed, tokens)

    tokens = tokens_within(ROUND_SECONDS, lambda n: with_tokens(assistant_tokens[0], 0, n), new_tokens)
    best = fastest(assistant_tokens, lambda k: with_tokens(k, 0, min(PILOT_TOKENS, tokens)))
    tried = f", the fastest of {', '.join(map(str, assistant_tokens))} in a short pilot"
    note = f"generate of transformers with assistant_model and num_assistant_tokens={best}"
    return Contestant(
        "assisted",
        lambda seed: with_tokens(best, seed, tokens),
        tokens,
        lookahead=best,
        note=note + tried * (len(assistant_tokens) > 1) + cut_note(tokens, new_tokens),
        warm_up=lambda seed: with_tokens(best, seed, 2),
        steps=steps,
        peer=True,
    )


def tokens_within(seconds: float, run: Callable[[int], object], new_tokens: int) -> int:
    """How many of ``new_tokens`` tokens to time, so that one run takes about so many seconds at most."""
    if new_tokens <= FEW_TOKENS:
        return new_tokens
    run(2)
    first, few = (seconds_of(run, n) for n in (1, FEW_TOKENS))
    each = max(few - first, 1e-9) / (FEW_TOKENS - 1)
    return min(new_tokens, max(FEW_TOKENS, int((seconds - first) / each)))


def seconds_of(run: Callable[[int], object], number: int) -> float:
    """Wall-clock of ``run(number)``, the device's part included."""
    begin = time.perf_counter()
    run(number)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def cut_note(tokens: int, new_tokens: int) -> str:
    """What a note ends with where not all tokens are timed."""
    return f"; timed on the prompt and its first {tokens} tokens, since all take minutes" if tokens < new_tokens else ""


def library_run(twin: Any, ids: Tensor, temperature: float, **more: Any) -> Callable[[int, int], Tensor]:
    """(seed, tokens) -> ids [1, P + tokens], sampled."""

    from transformers.utils import logging

    def run(seed: int, tokens: int) -> Tensor:
        logging.set_verbosity_error()  # it warns about arguments that it passes itself
        torch.manual_seed(seed)
        settings = {"do_sample": True, "temperature": temperature, "top_k": 0, **more}
        text: Tensor = twin.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **settings)
        return text

    return run


def count_passes(twin: Any) -> Callable[[], int]:
    """A counter of the model's forward passes since it was last read."""
    passes = 0

    def counted(*_: Any) -> None:
        nonlocal passes
        passes += 1

    def read() -> int:
        nonlocal passes
        since, passes = passes, 0
        return since

    twin.register_forward_hook(counted)
    return read


def fastest(values: Sequence[int], run: Callable[[int], object]) -> int:
    """The value whose run took least, after one that warms up."""
    if len(values) == 1:
        return values[0]
    run(values[0])
    seconds = {value: seconds_of(run, value) for value in values}
    return min(seconds, key=lambda value: seconds[value])


def library_twin(model: Llama) -> Any:
    """The model as a ``transformers`` one that shares its weights; needs the library."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    c, weight = model.config, model.embedding.weight
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.hidden_dim, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, max_position_embeddings=c.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_base}, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        twin: Any = LlamaForCausalLM(config)
    weights = {library_name(name): value for name, value in model.named_parameters()}
    twin.to(weight.dtype).load_state_dict({**weights, "lm_head.weight": weight}, assign=True)
    twin.model.rotary_emb = LlamaRotaryEmbedding(config).to(weight.device)  # its table is no weight
    return twin.eval().requires_grad_(False)


def library_name(name: str) -> str:
    if name == "norm.weight":
        return "model.norm.weight"
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name
