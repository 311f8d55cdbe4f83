"""Tiny causal language models without any cache, written the way different people write them.

Every model is `forward(ids[B, S]) -> logits[B, S, V]`, takes its sizes as keywords and has the attributes `vocab` and
`max_positions`. `CACHEABLE[name](seed=0, **sizes)` builds one that the cache pass must handle.
"""

from collections.abc import Callable
from functools import partial

from helpers.matmul_models import (
    AssembledKeys,
    Eager,
    EagerWhere,
    MergedHeads,
    MoEDense,
    OneLayerOneHead,
    Parallel,
    RoutedExperts,
    Sinks,
    Softcap,
)
from helpers.model_parts import build
from helpers.plain_models import (
    GPT,
    AdditiveMaskCumsum,
    Alibi,
    GPTSlicedPositions,
    LastOnlyHead,
    Llama,
    LlamaBuffered,
    LlamaInterleaved,
    SlidingWindow,
    Tied,
)
from torch import nn

CACHEABLE: dict[str, Callable[..., nn.Module]] = {
    name: partial(build, cls)
    for name, cls in {
        "gpt": GPT,
        "gpt_sliced_positions": GPTSlicedPositions,
        "llama": Llama,
        "llama_interleaved_rope": LlamaInterleaved,
        "llama_buffered": LlamaBuffered,
        "alibi": Alibi,
        "sliding_window": SlidingWindow,
        "eager": Eager,
        "eager_where": EagerWhere,
        "tied": Tied,
        "sinks": Sinks,
        "softcap": Softcap,
        "parallel_block": Parallel,
        "last_only_head": LastOnlyHead,
        "one_layer_one_head": OneLayerOneHead,
        "moe_dense": MoEDense,
        "additive_mask_cumsum": AdditiveMaskCumsum,
        "routed_experts": RoutedExperts,
        "merged_heads": MergedHeads,
        "assembled_keys": AssembledKeys,
    }.items()
}
