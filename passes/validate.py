"""Translation validation: the cached form must reproduce the original model on random tokens, or compilation fails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from smc_compile.errors import CacheError, ValidationError
from smc_compile.passes.axes.axis_types import KEY, K, Q, Typing
from smc_compile.passes.axes.infer import type_axes
from smc_compile.passes.cache.position_tables import HIDDEN
from smc_compile.passes.closeness import NARROW, allowed_error, coarsest_dtype, relative_error
from smc_compile.passes.fx_tools import descendants, describe
from smc_compile.passes.ir import CachedLM, CausalLM
from smc_compile.passes.lower.skinny_products import linear

BLOCKS = (3, 1, 2)


PROMPT = 5


def validate(lm: CausalLM, cached: CachedLM, weights: Sequence[Tensor]) -> float:
    """Compare ``lm`` with ``cached`` (prefill, then blocks of several lengths) and return the largest relative error.

    Raises:
        CacheError: when a position reads a later one (the model is not causal); the message names the op.
        ValidationError: when the two differ by more than the dtype's tolerance.
    """
    total = min(PROMPT + sum(BLOCKS), cached.max_positions or 2**31)
    ids = _random_tokens(lm, cached, weights, total)
    with torch.no_grad():
        check_causal(lm, ids, weights)
        check_prefix_tables(cached, weights, total)
        actual, at = replay(cached, ids, weights, PROMPT, BLOCKS)
        *ends, last = at.unique().tolist()
        by_end = {end: original_rows(lm, ids[:, : end + 1], weights, SkinnyProducts) for end in ends}
        by_end[last] = original_rows(lm, ids[:, : last + 1], weights)  # without kernels of ours
        expected = torch.stack([torch.stack([by_end[int(end)][b] for end in at[b]]) for b in range(len(at))])
    # Eight bits of an activation are as coarse as those of a bfloat16.
    dtype = torch.bfloat16 if _rounds_to_bytes(lm) else coarsest_dtype([*weights, expected])
    error = relative_error(actual, expected, dtype in NARROW)
    if not error <= allowed_error(dtype):
        raise ValidationError(
            "the cached model does not reproduce the original",
            f"largest relative difference {error:.2e}, allowed {allowed_error(dtype):.0e} over {total} positions",
            "please report this model; until then use the explicit protocol step(tokens, pos, state)",
        )
    return error


def replay(
    cached: CachedLM, ids: Tensor, weights: Sequence[Tensor], prompt: int, blocks: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Rows of the cached form, fed in blocks, and the positions [B, n] where they stand: [B, n, V].

    Every other request has a prompt one token shorter, as in a batch of prompts of several lengths.
    """
    batch, total = ids.shape
    device = ids.device
    prompt = min(prompt, total)
    row, *prompts = cached.prefill(ids[:, :prompt], *weights)
    rows, at = [row[:, None]], [torch.full((batch, 1), prompt - 1, device=device)]
    capacity = max(total - prompt, 1)
    suffixes = [p.new_zeros(*p.shape[:2], capacity, p.shape[3]) for p in prompts]
    tables = cached.tables(total, *weights)
    lengths = (prompt - torch.arange(batch, device=device) % 2).clamp(min=1)  # [B]
    columns = torch.arange(prompt, device=device)
    keys = torch.cat(
        [
            torch.where(columns < lengths[:, None], columns, total),
            lengths[:, None] + torch.arange(capacity, device=device),
        ],
        1,
    )
    start = 0
    for block in blocks:
        block = min(block, total - prompt - start)
        if block <= 0:
            break
        slots = torch.arange(start, start + block, device=device).expand(batch, -1)  # [B, T]
        positions = lengths[:, None] + slots
        tokens = ids.gather(1, positions)
        args = (positions, slots, keys, *prompts, *suffixes, *tables, *weights)
        copies = [s.clone() for s in suffixes]
        last = cached.advance(tokens, *args)
        for suffix, copy in zip(suffixes, copies, strict=True):
            suffix.copy_(copy)
        scored = cached.score(tokens, *args).view(batch, block, -1)
        if relative_error(last, scored[:, -1], coarsest_dtype([*weights, row]) in NARROW) > 0.2:
            scored = torch.full_like(scored, float("nan"))
        rows.append(scored)
        at.append(positions)
        start += block
    return torch.cat(rows, 1), torch.cat(at, 1)


def check_prefix_tables(cached: CachedLM, weights: Sequence[Tensor], total: int) -> None:
    """A table at a shorter length must be a prefix of the table at a longer one."""
    short, long = cached.tables(total - 2, *weights), cached.tables(total, *weights)
    for i, (a, b) in enumerate(zip(short, long, strict=True)):
        prefix = b[tuple(slice(0, size) for size in a.shape)]
        if cached.shifting[i]:  # counted from the end, say
            prefix = prefix - (prefix - a)[..., :1]
        if not torch.allclose(a.double(), prefix.double(), rtol=1e-5, atol=1e-6, equal_nan=True):
            raise CacheError(
                "a position-dependent value changes when the sequence grows",
                f"table {i} at length {total - 2} is not a prefix of the table at length {total}",
                "compute positions, masks and rotary angles from torch.arange, independent of the total length",
            )


def check_causal(lm: CausalLM, ids: Tensor, weights: Sequence[Tensor]) -> None:
    """Change one token at a time: no earlier position of any value may move. Names the first op that leaks."""
    typing = type_axes(lm)
    vocab = int(ids.max()) + 1
    base = _trace_values(lm, typing, ids, weights)
    check_hidden(typing, base)
    for changed in sorted({1, ids.shape[1] // 2, ids.shape[1] - 1}):
        other = ids.clone()
        other[:, changed] = (other[:, changed] + 1) % max(vocab, 2)
        moved = _trace_values(lm, typing, other, weights)
        for node, value in base.items():
            if node not in typing.hiding and _leaks(typing, node, value, moved[node], changed):
                raise CacheError(
                    "the model is not causal: a position reads later ones",
                    f"the first op that leaks is {describe(node)}",
                    "give attention a causal mask (is_causal=True), or use an autoregressive model",
                )


def check_hidden(typing: Typing, values: dict[fx.Node, Tensor]) -> None:
    """Scores that keys are chosen by, and masks that depend on the tokens, must hide every later key.

    Raises:
        CacheError: naming the value that does not, however little came of it on these tokens.
    """
    for node in typing.hiding:
        later = _later_keys(typing, node, values[node])
        shown = later if later.dtype == torch.bool else ~(later <= HIDDEN)
        if shown.any():
            raise CacheError(
                "the model is not causal: attention to later positions is open",
                f"later keys are not hidden in {describe(node)}",
                "hide them with -inf (or False) before keys are chosen, and again in the mask that attention gets",
            )


def _later_keys(typing: Typing, node: fx.Node, value: Tensor) -> Tensor:
    """The entries [..., n] of a value over [query, key] that belong to keys after their query."""
    axes = typing.of(node)
    value = value.movedim((axes.index((Q,)), axes.index((K,))), (-2, -1))
    return value[..., torch.ones(value.shape[-2:], dtype=torch.bool, device=value.device).triu(1)]


def _leaks(typing: Typing, node: fx.Node, before: Tensor, after: Tensor, changed: int) -> bool:
    """Whether positions before ``changed`` moved; attention probabilities leak when a later key has any weight."""
    axes = typing.of(node)
    d = axes.index((Q,))
    if (K,) in axes:
        return bool((_later_keys(typing, node, before).abs() > 1e-6).any())
    before, after = before.narrow(d, 0, changed).double(), after.narrow(d, 0, changed).double()
    return not torch.allclose(before, after, rtol=1e-3, atol=1e-4, equal_nan=True)


def _trace_values(lm: CausalLM, typing: Typing, ids: Tensor, weights: Sequence[Tensor]) -> dict[fx.Node, Tensor]:
    """Floating per-position values, attention probabilities and what must hide keys, by node, in program order."""

    class Recorder(SkinnyProducts):
        def __init__(self) -> None:
            super().__init__(lm.graph_module)
            self.values: dict[fx.Node, Tensor] = {}

        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            axes = typing.axes.get(n)
            floating = isinstance(value, Tensor) and value.is_floating_point()
            if (floating and _is_checked(n, axes)) or n in typing.hiding:
                self.values[n] = value
            return value

    recorder = Recorder()
    recorder.run(*lm.arguments(ids, weights))
    return recorder.values


def _is_checked(node: fx.Node, axes: object) -> bool:
    if not isinstance(axes, tuple) or (Q,) not in axes:
        return False
    over_keys = any(atom.kind == KEY for axis in axes for atom in axis)
    return not over_keys or ("softmax" in str(node.target) and (K,) in axes)


class SkinnyProducts(fx.Interpreter):
    """Runs a graph with its linear layers in the kernel for few rows: ATen takes several times as long on many CPUs."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(linear if target is torch.ops.aten.linear.default else target, args, kwargs)


def original_rows(
    lm: CausalLM, ids: Tensor, weights: Sequence[Tensor], interpreter: type[fx.Interpreter] = fx.Interpreter
) -> Tensor:
    """The original model's rows [B, V] for ids [B, S], op by op, so that S may be one."""
    result = interpreter(lm.graph_module).run(*lm.arguments(ids, weights))
    return result[0] if isinstance(result, (list, tuple)) else result


def _random_tokens(lm: CausalLM, cached: CachedLM, weights: Sequence[Tensor], total: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    device = next((w.device for w in weights), torch.device("cpu"))
    return torch.randint(0, cached.vocab_size, (lm.batch, total), generator=generator).to(device)


def _rounds_to_bytes(lm: CausalLM) -> bool:
    """Whether values that depend on the tokens are rounded to eight bits, as where activations are quantised."""
    return any(getattr(node.meta.get("val"), "dtype", None) == torch.int8 for node in descendants(lm.ids))
