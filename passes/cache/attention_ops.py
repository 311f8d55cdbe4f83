"""Attention over a prompt that all particles share and a suffix of their own: the only products a cache changes.

R = B*N rows: particle n of request b is row b*N + n. H counts distinct key heads; M = queries folded over grouped heads
and new tokens. Prompt keys are read once for all particles of a request: the queries of all of them are rows of one
matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smc_compile.kernels import attend
from smc_compile.passes.cache.position_tables import to_rows


def write_cache(suffix: Tensor, slots: Tensor, new: Tensor) -> Tensor:
    """Put ``new`` [R, H, T, d] into ``suffix`` [R, H, S, d] at positions ``slots`` [B, T], in place."""
    r, _, t, _ = new.shape
    b = slots.shape[0]
    own = slots[:, None].expand(b, r // b, t).reshape(r, 1, t, 1)
    return suffix.scatter_(2, own.expand_as(new), new)


def scores_over_cache(query: Tensor, prompt: Tensor, suffix: Tensor) -> Tensor:
    """query [R, H, M, d] against prompt keys [B, H, P, d] and suffix keys [R, H, S, d] -> [R, H, M, P+S]."""
    r, h, m, d = query.shape
    b = prompt.shape[0]
    n = r // b
    folded = query.view(b, n, h, m, d).transpose(1, 2).reshape(b, h, n * m, d)
    shared = folded @ prompt.transpose(2, 3)  # [B, H, N*M, P]
    shared = shared.view(b, h, n, m, -1).transpose(1, 2).reshape(r, h, m, -1)
    return torch.cat([shared, query @ suffix.transpose(2, 3)], -1)


def mix_over_cache(probs: Tensor, prompt: Tensor, suffix: Tensor) -> Tensor:
    """probs [R, H, M, P+S] over prompt values [B, H, P, d] and suffix values [R, H, S, d] -> [R, H, M, d]."""
    r, h, m, _ = probs.shape
    b, _, p, d = prompt.shape
    n = r // b
    folded = probs[..., :p].view(b, n, h, m, p).transpose(1, 2).reshape(b, h, n * m, p)
    shared = (folded @ prompt).view(b, h, n, m, d).transpose(1, 2).reshape(r, h, m, d)
    return shared + probs[..., p:] @ suffix


def attention_over_cache(
    query: Tensor,
    prompt_keys: Tensor,
    prompt_values: Tensor,
    suffix_keys: Tensor,
    suffix_values: Tensor,
    hidden: Tensor,
) -> Tensor:
    """Scores, softmax and mix at once: shapes as ``smc_compile.kernels.attend``; the query is scaled."""
    arguments = (query, prompt_keys, prompt_values, suffix_keys, suffix_values, hidden)
    if attend.suits(query, suffix_values):
        return torch.ops.smc_compile.attend(*arguments)
    return attend.attend_in_tensor_code(*arguments)


def hidden_later(positions: Tensor, keys: Tensor) -> Tensor:
    """[B, T, L]: whether key l of a request, at ``keys[b, l]``, lies after its query t, at ``positions[b, t]``."""
    return keys[:, None, :] > positions[:, :, None]


def hidden_by(mask: Tensor, tokens: int) -> Tensor:
    """[1 or B or R, T, L] from a mask [..., T or 1, L] that keeps, the same for all heads."""
    hidden = ~mask.reshape(-1, *mask.shape[-2:])
    return hidden.expand(-1, tokens, -1)


def entries_over_cache(prompt: Tensor, suffix: Tensor) -> Tensor:
    """One number per head and position: prompt [B, H, P, 1] and suffix [R, H, S, 1] -> [R, H, P+S]."""
    b, h, p, _ = prompt.shape
    r = suffix.shape[0]
    shared = prompt.view(b, 1, h, p).expand(b, r // b, h, p).reshape(r, h, p)
    return torch.cat([shared, suffix.squeeze(3)], -1)


def causal_mask(scores: Tensor, batch: int, inner: int, positions: Tensor, keys: Tensor) -> Tensor:
    """Scores [..., T, L] with -inf where a key lies after its query.

    Axis ``batch`` holds rows times ``inner`` heads; query t of request b stands at ``positions[b, t]``, key l at
    ``keys[b, l]``.
    """
    later = hidden_later(positions, keys)
    later = later.view(later.shape[0], *(1 for _ in range(scores.dim() - 1)), *later.shape[1:])  # parted: rank + 2
    rows = scores.shape[batch] // inner
    return scores.masked_fill(to_rows(later, batch, inner, rows, False), float("-inf"))


def masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Apply an attention mask the way scaled_dot_product_attention does: bool keeps, float adds."""
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
