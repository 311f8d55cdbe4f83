"""``smc_compile::attend``: attention of a few new positions over shared prompts and own suffixes (attend.cpp).

R = B*N rows: particle n of request b is row b*N + n. H counts key heads, G the query heads that share one, T the new
positions, P those of a prompt, S the slots of a suffix. Its twin is :func:`attend_in_tensor_code`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smc_compile.kernels.cpp_kernel import cpp_kernel

SIGNATURE = (*["const NUMBER*"] * 5, "const bool*", "NUMBER*", *["int64_t"] * 15)
TYPES = (torch.float32, torch.bfloat16)
LANES = 16  # numbers that the kernel handles at once; head widths must be multiples

_library = torch.library.Library("smc_compile", "FRAGMENT")
_library.define(
    "attend(Tensor query, Tensor prompt_keys, Tensor prompt_values, Tensor suffix_keys, Tensor suffix_values,"
    " Tensor hidden) -> Tensor"
)


def attend_in_tensor_code(
    query: Tensor,
    prompt_keys: Tensor,
    prompt_values: Tensor,
    suffix_keys: Tensor,
    suffix_values: Tensor,
    hidden: Tensor,
) -> Tensor:
    """Attention in tensor code: [R, H, G, T, v]. The softmax is float32, or float64 for a query in float64.

    Prompt keys are read once for all particles of a request: their queries are the rows of one product.

    Args:
        query: [R, H, G, T, d], scaled already.
        prompt_keys, prompt_values: [B, H, P, d] and [B, H, P, v].
        suffix_keys, suffix_values: [R, H, S, d] and [R, H, S, v].
        hidden: [1, B or R, T, P+S] bool; True where a query does not see a key.
    """
    r, h, g, t, d = query.shape
    b, _, p, _ = prompt_keys.shape
    n, m = r // b, g * t
    wide = torch.promote_types(query.dtype, torch.float32)

    def fold(x: Tensor) -> Tensor:
        """[R, H, M, w] -> [B, H, N*M, w]"""
        return x.reshape(b, n, h, m, -1).transpose(1, 2).reshape(b, h, n * m, -1)

    def unfold(x: Tensor) -> Tensor:
        """[B, H, N*M, w] -> [R, H, G, T, w]"""
        return x.reshape(b, h, n, m, -1).transpose(1, 2).reshape(r, h, g, t, -1)

    rows = query.reshape(r, h, m, d)
    if 1 < hidden.shape[0] < r:
        hidden = hidden[:, None].expand(b, n, t, -1).flatten(0, 1)
    hidden = hidden[:, None, None]  # [1 or R, 1, 1, T, P+S]
    shared = unfold(fold(rows) @ prompt_keys.transpose(2, 3))
    own = (rows @ suffix_keys.transpose(2, 3)).reshape(r, h, g, t, -1)
    shared = shared.to(wide).masked_fill(hidden[..., :p], float("-inf"))
    own = own.to(wide).masked_fill(hidden[..., p:], float("-inf"))
    top = torch.maximum(shared.amax(-1, keepdim=True), own.amax(-1, keepdim=True))
    shared, own = (shared - top).exp(), (own - top).exp()
    total = shared.sum(-1, keepdim=True) + own.sum(-1, keepdim=True)
    # The weights are rounded to the type of the values before the product, as in ordinary attention.
    mixed = unfold(fold((shared / total).to(query.dtype).reshape(r, h, m, p)) @ prompt_values)
    return mixed + ((own / total).to(query.dtype).reshape(r, h, m, -1) @ suffix_values).reshape(r, h, g, t, -1)


def _laid_out(mixed: Tensor) -> Tensor:
    """[R, H, G, T, v] with the strides that the next layer reads best: all heads of a position are contiguous."""
    return mixed.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)


def _twin(*arguments: Tensor) -> Tensor:
    return _laid_out(attend_in_tensor_code(*arguments))


def _attend(
    query: Tensor,
    prompt_keys: Tensor,
    prompt_values: Tensor,
    suffix_keys: Tensor,
    suffix_values: Tensor,
    hidden: Tensor,
) -> Tensor:
    """The kernel, or its twin where none can be built. Scores, softmax and sums are float32, rounded once."""
    kernel = cpp_kernel("attend", SIGNATURE, query.dtype)
    if kernel is None:
        return _twin(query, prompt_keys, prompt_values, suffix_keys, suffix_values, hidden)
    r, h, g, t, d = query.shape
    b, _, p, _ = prompt_keys.shape
    s, v = suffix_values.shape[2:]
    if query.stride(4) != 1:
        query = query.contiguous()
    caches = [x.contiguous() for x in (prompt_keys, prompt_values, suffix_keys, suffix_values)]
    out = _shape(query, prompt_keys, prompt_values, suffix_keys, suffix_values, hidden)
    kernel(
        query, *caches, hidden.contiguous(), out, *query.stride()[:4], hidden.shape[0],
        b, r // b, h, g, t, p, s, d, v, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _shape(
    query: Tensor,
    prompt_keys: Tensor,
    prompt_values: Tensor,
    suffix_keys: Tensor,
    suffix_values: Tensor,
    hidden: Tensor,
) -> Tensor:
    r, h, g, t, _ = query.shape
    return query.new_empty(r, t, h, g, suffix_values.shape[-1]).permute(0, 2, 3, 1, 4)


def suits(query: Tensor, values: Tensor) -> bool:
    """Whether the kernel takes them: on a CPU or as meta tensors, of its types, with widths that fill its registers."""
    counted = query.device.type in ("cpu", "meta") and query.dtype in TYPES and query.dtype == values.dtype
    return counted and query.shape[-1] % LANES == 0 and values.shape[-1] % LANES == 0


_library.impl("attend", _attend, "CPU")
torch.library.register_fake("smc_compile::attend", _shape, lib=_library)

# The op in tensor code, for devices without a kernel.
IN_TENSOR_CODE = {torch.ops.smc_compile.attend.default: _twin}
