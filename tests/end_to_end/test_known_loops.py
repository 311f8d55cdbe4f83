"""Loops in the shape of well-known repositories, in our own code: docs/loops.md says what becomes of each."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.cached_models import HandedLM, SlotLM
from helpers.model_parts import build
from torch import Tensor, nn

from smc_compile import decode

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "untraced_regions")
V, N = 17, 6
LOOPS = Path(__file__).resolve().parents[2] / "docs" / "loops.md"


class Block(nn.Module):
    """``(logits, loss)`` of a small causal model; without targets the head runs for the last position."""

    block_size = 64

    def __init__(self, only_last: bool = True) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.place = nn.Embedding(V, 8), nn.Embedding(self.block_size, 8)
        self.qkv, self.head, self.only_last = nn.Linear(8, 24), nn.Linear(8, V), only_last
        self.double()

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.embed(idx) + self.place(torch.arange(idx.shape[1]))
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]
        return self.head(x[:, [-1], :] if self.only_last and targets is None else x), None


class Plain(Block):
    """Logits alone."""

    def forward(self, idx: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(idx)[0]


# ---- the loops -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def nanogpt(model, idx, max_new_tokens, temperature=1.0, top_k=1):
    for _ in range(max_new_tokens):
        idx_cond = idx if idx.size(1) <= model.block_size else idx[:, -model.block_size :]
        logits, _ = model(idx_cond)
        logits = logits[:, -1, :] / temperature
        if top_k is not None:
            v, _ = torch.topk(logits, min(top_k, logits.size(-1)))
            logits[logits < v[:, [-1]]] = -float("Inf")
        probs = F.softmax(logits, dim=-1)
        idx_next = torch.multinomial(probs, num_samples=1)
        idx = torch.cat((idx, idx_next), dim=1)
    return idx


@torch.no_grad()
def mingpt(model, idx, max_new_tokens, do_sample=False):
    for _ in range(max_new_tokens):
        idx_cond = idx if idx.size(1) <= model.block_size else idx[:, -model.block_size :]
        logits, _ = model(idx_cond)
        probs = F.softmax(logits[:, -1, :], dim=-1)
        if do_sample:
            idx_next = torch.multinomial(probs, num_samples=1)
        else:
            _, idx_next = torch.topk(probs, k=1, dim=-1)
        idx = torch.cat((idx, idx_next), dim=1)
    return idx


def litgpt(model, prompt, max_new_tokens, eos_id=None):
    length = prompt.size(0)
    idx = torch.empty(length + max_new_tokens, dtype=prompt.dtype)
    idx[:length] = prompt
    for at in range(length, length + max_new_tokens):
        logits = model(idx[:at].view(1, -1))[0, -1]
        v, i = torch.topk(logits, min(1, logits.size(-1)))
        logits = torch.full_like(logits, float("-inf")).scatter_(-1, i, v)
        probs = F.softmax(logits, dim=-1)
        idx_next = torch.multinomial(probs, num_samples=1)
        idx[at : at + 1] = idx_next
        if eos_id is not None and idx_next == eos_id:
            return idx[: at + 1]
    return idx


def gpt_fast(model, prompt, max_new_tokens):
    length = prompt.size(-1)
    input_pos = torch.arange(0, length)
    token = model(prompt, input_pos)[:, -1].argmax(-1, keepdim=True)
    tokens, input_pos = [token.clone()], torch.tensor([length])
    for _ in range(max_new_tokens - 1):
        token = model(token, input_pos)[:, -1].argmax(-1, keepdim=True)
        input_pos += 1
        tokens.append(token.clone())
    return torch.cat([prompt, *tokens], dim=-1)


@torch.inference_mode()
def llama2c(model, idx, max_new_tokens, temperature=0.0):
    for _ in range(max_new_tokens):
        logits = model(idx)
        logits = logits[:, -1, :]
        if temperature == 0.0:
            _, idx_next = torch.topk(logits, k=1, dim=-1)
        else:
            idx_next = torch.multinomial(F.softmax(logits / temperature, dim=-1), num_samples=1)
        idx = torch.cat((idx, idx_next), dim=1)
    return idx


def makemore(model, idx, max_new_tokens):
    """What is drawn is cut at the stop token, and printed."""
    samples = mingpt(model, idx, max_new_tokens)
    words = []
    for i in range(samples.size(0)):
        row = samples[i, 1:].tolist()
        end = row.index(0) if 0 in row else len(row)
        words.append("".join(chr(97 + t) for t in row[:end]))
    for word in words:
        print(word)
    return words


def x_transformers(net, prompts, seq_len, eos_token=5, pad_value=0):
    t = prompts.shape[1]
    out = prompts
    for _ in range(seq_len):
        logits = net(out)[:, -1]
        val, ind = torch.topk(logits, 1)
        probs = torch.full_like(logits, float("-inf"))
        probs.scatter_(1, ind, val)
        sample = torch.multinomial(F.softmax(probs, dim=-1), 1)
        out = torch.cat((out, sample), dim=-1)
        is_eos_tokens = out == eos_token
        if is_eos_tokens.any(dim=-1).all():
            break
    shifted = F.pad(out == eos_token, (1, -1))
    mask = shifted.float().cumsum(dim=-1) >= 1
    return out.masked_fill(mask, pad_value)[:, t:]


def huggingface(model, input_ids, max_new_tokens, eos_token_id=None):
    generated, past, tokens = input_ids, None, input_ids
    for _ in range(max_new_tokens):
        with torch.no_grad():
            outputs = model(tokens, past_key_values=past, use_cache=True)
        past = outputs.past_key_values
        tokens = outputs.logits[:, -1, :].argmax(dim=-1, keepdim=True)
        generated = torch.cat([generated, tokens], dim=-1)
        if tokens.item() == eos_token_id:
            break
    return generated


def mistral(model, prompt, max_tokens, eos_id=None):
    prelogits, cache = model(prompt, None)
    generated, is_finished = [], torch.zeros(prompt.shape[0], dtype=torch.bool)
    for _ in range(max_tokens):
        next_token = prelogits[:, -1].argmax(dim=-1)
        if eos_id is not None:
            is_finished = is_finished | (next_token == eos_id)
        if is_finished.all():
            break
        generated.append(next_token[:, None])
        prelogits, cache = model(next_token[:, None], cache)
    return torch.cat(generated, 1).tolist() if generated else []


def lucidrains(net, prompt, seq_len):
    length, out, cache, fed = prompt.shape[-1], prompt, None, prompt
    for _ in range(seq_len):
        logits, cache = net(fed, cache)
        logits = logits[:, -1]
        fed = logits.argmax(dim=-1)[..., None]
        out = torch.cat((out, fed), dim=-1)
    return out[..., length:]


def llama() -> nn.Module:
    pytest.importorskip("transformers", minversion="5")
    from smc_compile.pairs.tiny_transformers import build as build_family

    torch.manual_seed(0)
    return build_family("llama", dtype=torch.float64, num_hidden_layers=1).eval()


def slots() -> nn.Module:
    return build(SlotLM, batch=1).double()


def handed() -> nn.Module:
    return build(HandedLM).double()


ONE, TWO = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6]])
KNOWN: dict[str, tuple[Callable[..., Any], Callable[[], nn.Module], Tensor, tuple[Any, ...]]] = {
    "nanoGPT": (nanogpt, Block, TWO, ()),
    "minGPT": (mingpt, lambda: Block(False), TWO, ()),
    "litgpt": (litgpt, lambda: Plain(False), ONE[0], (5,)),
    "gpt-fast": (gpt_fast, slots, ONE, ()),
    "llama2.c": (llama2c, lambda: Plain(True), TWO, ()),
    "makemore": (makemore, lambda: Block(False), TWO, ()),
    "x-transformers": (x_transformers, lambda: Plain(False), TWO, ()),
    "transformers": (huggingface, llama, ONE, (11,)),
    "mistral-inference": (mistral, handed, TWO, (5,)),
    "speculative-decoding": (lucidrains, handed, TWO, ()),
}


def listed(result: Any) -> Any:
    return result.tolist() if isinstance(result, Tensor) else result


@pytest.mark.parametrize("name", KNOWN)
def test_what_becomes_of_it(name, capsys):
    """Each compiles and gives what it gives in eager mode: the sampled ones draw one of one token."""
    loop, model, ids, more = KNOWN[name][0], KNOWN[name][1](), *KNOWN[name][2:]
    with torch.no_grad():
        expected = listed(loop(model, ids.clone(), N, *more))
        printed = capsys.readouterr().out
        compiled = decode(loop, method="autoregressive", compiler="eager")
        assert listed(compiled(model, ids.clone(), N, *more)) == expected
    assert capsys.readouterr().out == printed


def test_the_page_lists_them():
    text = LOOPS.read_text()
    rows = set(re.findall(r"^\| ([\w.-]+) \|", text.partition("## Loops of well-known repositories")[2], re.M))
    assert rows - {"repository"} == set(KNOWN)
