"""A random pair whose acceptance rate is set: the target contains the draft, and adds noise to its logits.

Random weights give distributions that know nothing of each other, while speculative decoding is as fast as its draft is
right. Here the target's residual stream is [the draft's coordinates x | others y]:

- in its first layers some heads and hidden units act on x as the draft's do, with zeros elsewhere; the rest write to y;
  later layers write to y only. So x stays what it is in the draft. Only the head reads y: nothing else would keep it
  from growing, layer after layer;
- y is kept EPSILON times as large as x, so that the root mean square over all D coordinates is that over the draft's d
  times sqrt(d/D), which the weights of the norms make good;
- the tied head adds the two parts: target logits = draft logits + s * noise, and s is found by bisection so that the
  mean of sum_x min(p(x), q(x)), the share of drafted tokens that exact rejection accepts (Leviathan et al., 2023), is
  as asked.

All tensors keep their shapes and type: such a pair costs what the same shapes with any weights cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smc_compile.errors import OptionError
from smc_compile.pairs.llama import Block, Llama, LlamaConfig

EPSILON = 2.0**-6  # of y beside x; a power of two costs no digits
EMBEDDING_STD = 0.05  # small beside what layers add, or a tied head repeats the last token
TEXT_ENTROPY = 2.5  # nats of the draft's distribution at the temperature; of text under a good model
CONTEXTS, LENGTH = 8, 64  # random contexts that the rate is measured on
TOLERANCE = 0.01
STEPS = 30  # of a bisection
MOST_NOISE = 64.0  # s is looked for below it; noise of s = 1 is as large as the draft's logits


@dataclass(frozen=True)
class Tuned:
    """What tuning reached: mean acceptance and entropy in nats, over random contexts, and the size s of the noise."""

    acceptance: float
    entropy: float
    noise: float


def tune_pair(target: Llama, draft: Llama, acceptance: float, temperature: float, seed: int = 0) -> Tuned:
    """Overwrite the weights of both models so that ``target`` accepts the share ``acceptance`` of the draft's tokens.

    Both distributions are softmax(logits / temperature).

    Raises:
        OptionError: where the draft does not fit inside the target, or rounding hides so much that the rate is not
            reached.
    """
    check_fits(target.config, draft.config)
    generator = torch.Generator(target.embedding.weight.device).manual_seed(seed)
    init_draft(draft, generator)
    init_target(target, draft, generator)
    ids = random_contexts(target, generator)
    sharpness = match_entropy(draft, ids, temperature)
    draft.norm.weight.fill_(sharpness)
    set_head(target, draft, sharpness, 0.0)
    noise = match_acceptance(target, draft, ids, sharpness, acceptance, temperature)
    set_head(target, draft, sharpness, noise)
    log_p, log_q = log_distribution(target, ids, temperature), log_distribution(draft, ids, temperature)
    reached = mean_acceptance(log_p, log_q)
    if abs(reached - acceptance) > TOLERANCE:
        raise OptionError(
            f"An acceptance of {acceptance:g} cannot be reached.",
            f"the closest with weights in {target.embedding.weight.dtype} is {reached:.3f}",
            "choose a lower --acceptance, or --dtype float32"
            if reached < acceptance
            else "choose a higher --acceptance",
        )
    return Tuned(reached, mean_entropy(log_q), noise)


# ---- fitting --------------------------------------------------------------------------------------------------------


def check_fits(target: LlamaConfig, draft: LlamaConfig) -> None:
    """Raise OptionError, naming what is too large, unless the draft fits inside the target."""
    reasons = [
        f"the draft's {name} is {ours}, the target's {theirs}"
        for name, ours, theirs in (
            ("number of layers", draft.n_layers, target.n_layers),
            ("hidden width", draft.hidden_dim, target.hidden_dim),
        )
        if ours > theirs
    ]
    if draft.vocab_size != target.vocab_size:
        reasons.append(f"the draft has {draft.vocab_size} tokens, the target {target.vocab_size}")
    if draft.dim >= target.dim:
        reasons.append(f"the draft's width {draft.dim} leaves none of the target's {target.dim} coordinates for noise")
    if head_dim(target) % head_dim(draft):
        reasons.append(f"the target's heads of {head_dim(target)} are no multiple of the draft's of {head_dim(draft)}")
    if kv_copies(target, draft) * draft.n_kv_heads > target.n_kv_heads:
        reasons.append(
            f"{draft.n_heads} heads ({draft.n_kv_heads} kv) do not fit into {target.n_heads} ({target.n_kv_heads} kv)"
        )
    if reasons:
        raise OptionError(
            "The draft does not fit inside the target, so their acceptance rate cannot be set.",
            "; ".join(reasons),
            "change the shapes, or pass --acceptance none for unrelated random weights",
        )


def head_dim(config: LlamaConfig) -> int:
    return config.dim // config.n_heads


def group(config: LlamaConfig) -> int:
    """Heads that share keys and values."""
    return config.n_heads // config.n_kv_heads


def kv_copies(target: LlamaConfig, draft: LlamaConfig) -> int:
    """Heads of keys and values in the target for one of the draft's: several where the draft's groups are larger."""
    return -(-group(draft) // group(target))


def head_places(target: LlamaConfig, draft: LlamaConfig) -> list[int]:
    """The target's head for each head of the draft."""
    places = []
    for head in range(draft.n_heads):
        kv, member = divmod(head, group(draft))
        copy, slot = divmod(member, group(target))
        places.append((kv * kv_copies(target, draft) + copy) * group(target) + slot)
    return places


def row_places(heads: list[int], target: LlamaConfig, draft: LlamaConfig) -> Tensor:
    """Rows of the target's projections for those of the draft's heads, given the target's head for each.

    A head of m*d rows turns pair i of its m*d/2 pairs (i, i + m*d/2) at frequency base^(-2i/(m*d)): pair m*i turns as
    pair i of a head of d rows does.
    """
    wide, narrow = head_dim(target), head_dim(draft)
    first_half = torch.arange(narrow // 2) * (wide // narrow)
    within = torch.cat([first_half, first_half + wide // 2])  # [d]
    return (torch.tensor(heads)[:, None] * wide + within).flatten()


# ---- weights --------------------------------------------------------------------------------------------------------


def init_draft(draft: Llama, generator: torch.Generator) -> None:
    """Random weights at which every layer adds about as much as its input holds."""
    fill(draft.embedding.weight, EMBEDDING_STD, generator)
    for parameter in draft.layers.parameters():
        fill_by_width(parameter, generator)
    draft.norm.weight.fill_(1.0)


@torch.no_grad()
def init_target(target: Llama, draft: Llama, generator: torch.Generator) -> None:
    """The draft inside, and random weights that write to the other coordinates only."""
    d, ratio = draft.config.dim, width_ratio(target, draft)
    fill(target.embedding.weight, EMBEDDING_STD * EPSILON, generator)
    target.embedding.weight[:, :d] = draft.embedding.weight
    for index, block in enumerate(target.layers):
        assert isinstance(block, Block)
        for parameter in block.parameters():
            fill_by_width(parameter, generator)
        for norm in (block.attention_norm, block.mlp_norm):
            norm.weight[:d], norm.weight[d:] = ratio, 0.0
        for out in (block.attention.wo.weight, block.w2.weight):
            out[:d], out[d:] = 0.0, EPSILON * out[d:]
        if index < draft.config.n_layers:
            inner = draft.layers[index]
            assert isinstance(inner, Block)
            embed_attention(block, inner, target.config, draft.config)
            embed_mlp(block, inner, d)


@torch.no_grad()
def embed_attention(block: Block, inner: Block, target: LlamaConfig, draft: LlamaConfig) -> None:
    """Write the heads of ``inner`` at their places.

    Attention divides scores by the root of a head's width, smaller in the draft: queries are scaled to match.
    """
    heads = head_places(target, draft)
    sources = [
        kv for kv in range(draft.n_kv_heads) for _ in range(kv_copies(target, draft))
    ]  # of the target's kv heads
    q_rows = row_places(heads, target, draft)
    kv_rows = row_places(list(range(len(sources))), target, draft)
    narrow = head_dim(draft)
    source_rows = (torch.tensor(sources)[:, None] * narrow + torch.arange(narrow)).flatten()
    scale = math.sqrt(head_dim(target) / narrow)
    ours, theirs = block.attention, inner.attention
    place_rows(ours.wq, heads, q_rows, theirs.wq.weight * scale, head_dim(target))
    for projection, source in ((ours.wk, theirs.wk), (ours.wv, theirs.wv)):
        place_rows(projection, range(len(sources)), kv_rows, source.weight[source_rows], head_dim(target))
    for head in heads:
        ours.wo.weight[:, head * head_dim(target) : (head + 1) * head_dim(target)] = 0.0
    ours.wo.weight[: draft.dim, q_rows] = theirs.wo.weight


def place_rows(projection: nn.Linear, heads: list[int] | range, rows: Tensor, weight: Tensor, wide: int) -> None:
    """Clear the rows of ``heads`` and write ``weight`` [rows, d], which reads the first d coordinates."""
    for head in heads:
        projection.weight[head * wide : (head + 1) * wide] = 0.0
    projection.weight[rows, : weight.shape[1]] = weight


@torch.no_grad()
def embed_mlp(block: Block, inner: Block, d: int) -> None:
    """The first hidden units are those of ``inner``."""
    units = inner.w1.out_features
    for ours, theirs in ((block.w1, inner.w1), (block.w3, inner.w3)):
        ours.weight[:units] = 0.0
        ours.weight[:units, :d] = theirs.weight
    block.w2.weight[:, :units] = 0.0
    block.w2.weight[:d, :units] = inner.w2.weight


def width_ratio(target: Llama, draft: Llama) -> float:
    """Root mean square over the target's coordinates beside that over the draft's."""
    return math.sqrt(draft.config.dim / target.config.dim)


@torch.no_grad()
def set_head(target: Llama, draft: Llama, sharpness: float, noise: float) -> None:
    """Weights of the last norm: the draft's logits, and ``noise`` times as much from the other coordinates."""
    d, ratio = draft.config.dim, width_ratio(target, draft)
    loudness = math.sqrt(d / (target.config.dim - d)) / EPSILON**2  # of y and of its part of the embedding
    target.norm.weight[:d], target.norm.weight[d:] = ratio * sharpness, ratio * sharpness * noise * loudness


@torch.no_grad()
def fill_by_width(parameter: nn.Parameter, generator: torch.Generator) -> None:
    """Ones for the weights of a norm; products of unit variance for a matrix."""
    if parameter.dim() == 1:
        parameter.fill_(1.0)
    else:
        fill(parameter, parameter.shape[1] ** -0.5, generator)


@torch.no_grad()
def fill(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    parameter.normal_(0.0, std, generator=generator)


# ---- distributions --------------------------------------------------------------------------------------------------


def random_contexts(model: Llama, generator: torch.Generator) -> Tensor:
    """ids [contexts, length]."""
    shape = CONTEXTS, min(LENGTH, model.config.max_positions)
    return torch.randint(0, model.config.vocab_size, shape, generator=generator, device=generator.device)


@torch.no_grad()
def log_distribution(model: Llama, ids: Tensor, temperature: float) -> Tensor:
    """ids [B, S] -> log-probabilities [B*S, V] float32 of the next token."""
    return normalised(model(ids), temperature)


def normalised(logits: Tensor, temperature: float) -> Tensor:
    """logits [B, S, V] -> log-probabilities [B*S, V] float32."""
    return (logits.flatten(0, 1).float() / temperature).log_softmax(-1)


def mean_acceptance(log_p: Tensor, log_q: Tensor) -> float:
    """Mean over positions of sum_x min(p(x), q(x)); both [n, V]."""
    return float(torch.minimum(log_p, log_q).exp().sum(-1).mean())


def mean_entropy(log_p: Tensor) -> float:
    """Nats, a mean over positions; log_p [n, V]."""
    return float(-(log_p.exp() * log_p).sum(-1).mean())


def match_entropy(draft: Llama, ids: Tensor, temperature: float) -> float:
    """The factor on the logits at which the draft's distribution has the entropy of text (or half of the largest)."""
    log_q = log_distribution(draft, ids, temperature)
    wanted = min(TEXT_ENTROPY, math.log(draft.config.vocab_size) / 2)
    return bisect(lambda factor: mean_entropy((factor * log_q).log_softmax(-1)), wanted, 0.0, upper_end(log_q))


def upper_end(log_q: Tensor) -> float:
    """A factor at which hardly anything but the likeliest token is left."""
    return 100.0 / float((log_q.max(-1).values - log_q.mean(-1)).mean())


@torch.no_grad()
def match_acceptance(
    target: Llama, draft: Llama, ids: Tensor, sharpness: float, acceptance: float, temperature: float
) -> float:
    """The size of the noise that gives the mean acceptance asked for; only the target's head depends on it."""
    log_q, hidden = log_distribution(draft, ids, temperature), target.trunk(ids)

    def accepted(noise: float) -> float:
        set_head(target, draft, sharpness, noise)
        return mean_acceptance(normalised(target.head(hidden), temperature), log_q)

    return bisect(accepted, acceptance, 0.0, MOST_NOISE, TOLERANCE / 10)


def bisect(falling: Callable[[float], float], value: float, low: float, high: float, enough: float = 1e-4) -> float:
    """Where a falling function has ``value``, to within ``enough`` of it; an end of the range where it has not."""
    middle = low
    for _ in range(STEPS):
        middle = (low + high) / 2
        reached = falling(middle)
        if abs(reached - value) < enough:
            break
        low, high = (middle, high) if reached > value else (low, middle)
    return middle
