"""Loops whose model reads the last tokens only: the law and the greedy text of the loop as it was written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.enumeration import chi_square_p_value, sequence_distribution
from helpers.model_parts import perturbed
from helpers.models import CACHEABLE
from helpers.toys import TinyTransformerLM
from torch import Tensor, nn

import smc_compile
from smc_compile import decode, explain
from smc_compile.errors import InputError, LoopError

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "untraced_regions")
V, W = 7, 6
OPTIONS = {"compiler": "eager", "n_particles": 3, "lookahead": 2, "seed": 0}


def model_of(name: str, seed: int = 0, **sizes: int) -> nn.Module:
    return CACHEABLE[name](seed=seed, **{"vocab": V, "layers": 2, **sizes}).double()


MODEL = TinyTransformerLM(V).double()


def prompt(length: int, batch: int = 2, vocab: int = V) -> Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(length))


def greedy(logits: Tensor) -> Tensor:
    return logits[:, -1].argmax(-1, keepdim=True)


def drawn(logits: Tensor) -> Tensor:
    return torch.multinomial(torch.softmax(logits[:, -1] / 0.8, -1), 1)


# ---- ways to write a window ----------------------------------------------------------------------------------------


def sliced(model, ids, n, take=greedy, window=W):
    for _ in range(n):
        ids = torch.cat([ids, take(model(ids[:, -window:]))], 1)
    return ids


def where_it_is_longer(model, ids, n, take=greedy, window=W):
    for _ in range(n):
        shown = ids if ids.size(1) <= window else ids[:, -window:]
        ids = torch.cat([ids, take(model(shown))], 1)
    return ids


def narrowed(model, ids, n, take=greedy, window=W):
    for _ in range(n):
        length = min(ids.shape[1], window)
        ids = torch.cat([ids, take(model(ids.narrow(1, ids.shape[1] - length, length)))], 1)
    return ids


def split_off(model, ids, n, take=greedy, window=W):
    for _ in range(n):
        shown = torch.tensor_split(ids, [max(0, ids.shape[1] - window)], dim=1)[1]
        ids = torch.cat([ids, take(model(shown))], 1)
    return ids


def from_a_buffer(model, ids, n, take=greedy, window=W):
    start = ids.shape[1]
    buffer = torch.zeros(ids.shape[0], start + n, dtype=torch.long)
    buffer[:, :start] = ids
    for i in range(start, start + n):
        buffer[:, i] = take(model(buffer[:, max(0, i - window) : i]))[:, 0]
    return buffer


def carried(model, ids, n, take=greedy, window=W):
    tokens, shown = [ids], ids
    for _ in range(n):
        shown = shown[:, -window:]
        token = take(model(shown))
        tokens.append(token)
        shown = torch.cat([shown, token], 1)
    return torch.cat(tokens, 1)


class Cropping(nn.Module):
    """The window is the model's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids[:, -W:])


class Speaker(nn.Module):
    """A model whose ``generate`` crops to its block size, as in small repositories."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.block_size = model, W

    def forward(self, ids: Tensor) -> tuple[Tensor, None]:
        return self.model(ids), None

    @torch.no_grad()
    def generate(self, ids, n, temperature=1.0, top_k=None):
        for _ in range(n):
            shown = ids if ids.size(1) <= self.block_size else ids[:, -self.block_size :]
            logits, _ = self(shown)
            logits = logits[:, -1, :] / temperature
            if top_k is not None:
                least, _ = torch.topk(logits, min(top_k, logits.size(-1)))
                logits[logits < least[:, [-1]]] = -float("inf")
            ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
        return ids


FORMS: list[Callable[..., Tensor]] = [sliced, where_it_is_longer, narrowed, split_off, from_a_buffer, carried]


@pytest.mark.parametrize("loop", FORMS)
def test_greedy_is_the_loop_as_it_was_written(loop):
    """Prompts shorter than the window, up to it and longer; texts that stay below it, reach it and outgrow it."""
    compiled = decode(loop, compiler="eager")
    every = [(3, 2), (3, 8), (1, 8), (W - 1, 2), (W, 3), (W + 1, 8), (3 * W, 2)]
    for length, n in every if loop in (sliced, where_it_is_longer) else [(3, 8), (1, 3), (2 * W, 3)]:
        ids = prompt(length)
        with torch.no_grad():
            assert torch.equal(compiled(MODEL, ids, n), loop(MODEL, ids, n)), (length, n)
        assert compiled.loop.window == (W if length + n - 1 > W else None)


def test_the_window_may_be_the_models_own():
    compiled, cropping = decode(plain, compiler="eager"), Cropping(MODEL)
    for length, n in [(3, 2), (3, 9), (1, 9), (W + 2, 4)]:
        with torch.no_grad():
            assert torch.equal(compiled(cropping, prompt(length), n), plain(cropping, prompt(length), n))


def plain(model, ids, n):
    for _ in range(n):
        ids = torch.cat([ids, greedy(model(ids))], 1)
    return ids


def test_a_method_that_crops_to_the_block_size():
    speaker = Speaker(MODEL)
    compiled = decode(Speaker.generate, compiler="eager")
    for length in (2, W + 3):
        expected = speaker.generate(prompt(length), 9, 0.7, 3)
        assert torch.equal(compiled(speaker, prompt(length), 9, 0.7, 3), expected)


# ---- the law -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "length"), [("gpt", 2), ("llama", 4), ("llama", 6)])
def test_the_distribution_is_that_of_the_loop(family, length):
    """Two layers, a window of 4: chi-square at level 1e-3 against enumeration; the model of all tokens is another."""
    model, batch, window = model_of(family, vocab=3, dim=8), 2**12, 4
    ids = prompt(length, 1, 3)

    def loop(model, ids, n):
        return sliced(model, ids, n, drawn, window)

    compiled = decode(loop, compiler="eager", method="autoregressive", seed=3)
    result = compiled(model, ids.expand(batch, -1), 4)[:, length:]
    own = sequence_distribution(lambda x: model(x[:, -window:]), ids[0], 4, 3, temperature=0.8)
    assert chi_square_p_value(result, own) > 1e-3
    assert compiled.loop.window == window
    assert chi_square_p_value(result, sequence_distribution(model, ids[0], 4, 3, temperature=0.8)) < 1e-3


@pytest.mark.parametrize("family", ["llama"])
def test_particles_are_weighted_by_the_distribution_of_the_loop(family):
    """The log-probability of every token of every particle, and an evidence of 1 (5 standard errors, 6e-7)."""
    model, batch = model_of(family, dim=8), 2**7

    def loop(model, ids, n):
        return sliced(model, ids, n, drawn)

    compiled = decode(loop, **OPTIONS, draft=perturbed(model))
    for length in (3, W + 2):
        compiled(model, prompt(length, batch), 7)
        particles = compiled.last.particles.flatten(0, 1)  # [B*N, P+n]
        with torch.no_grad():
            steps = [
                torch.log_softmax(model(particles[:, :at][:, -W:])[:, -1] / 0.8, -1).gather(
                    1, particles[:, at : at + 1]
                )[:, 0]
                for at in range(length, length + 7)
            ]
        assert torch.allclose(compiled.last.particle_log_probs.flatten(0, 1), torch.stack(steps, 1), atol=1e-9)
        evidence = compiled.last.log_evidence.exp()
        assert abs(evidence.mean() - 1) < 5 * evidence.std() / batch**0.5


def test_a_draft_whose_positions_end_reads_the_last_ones_too():
    """Target and draft learned 12 positions: the draft is cut as the target is, and all weights are one."""
    model = model_of("gpt", max_positions=12)

    def loop(model, ids, n):
        return sliced(model, ids, n, drawn, 12)

    compiled = decode(loop, **OPTIONS, draft=model)
    compiled(model, prompt(7), 12)
    assert compiled.last.log_weights.abs().max() < 1e-9


# ---- what is said of it, and what is refused -----------------------------------------------------------------------


def test_the_report_names_the_window_and_its_cost():
    report = str(explain(sliced, MODEL, prompt(3), 9, compiler="eager"))
    assert f"reads the last {W} tokens of longer texts" in report
    assert f"each token costs a pass over the last {W} tokens" in report


def test_exact_speculation_is_refused_by_name():
    def loop(model, ids, n):
        return sliced(model, ids, n, drawn)

    with pytest.raises(smc_compile.OptionError, match="cannot use this target"):
        decode(loop, **OPTIONS, draft=MODEL, method="speculative")(MODEL, prompt(3), 9)
    with pytest.raises(
        smc_compile.OptionError, match=r"max_divergence(.|\n)*reads the last .* tokens of the text anew"
    ):
        decode(loop, **OPTIONS, draft=MODEL, max_divergence=0.5)(MODEL, prompt(3), 9)


def test_a_window_of_two_tokens_is_refused():
    def loop(model, ids, n):
        return sliced(model, ids, n, greedy, 2)

    with pytest.raises((LoopError, InputError), match=r"window|last 2"):
        decode(loop, compiler="eager")(MODEL, prompt(4), 6)


def test_a_rule_on_the_whole_text_beside_the_window_is_refused():
    def loop(model, ids, n):
        for _ in range(n):
            logits = model(ids[:, -W:])[:, -1]
            logits = logits.scatter_add(1, ids, torch.full(ids.shape, -0.5, dtype=logits.dtype))
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        return ids

    with pytest.raises(smc_compile.SMCError):
        decode(loop, compiler="eager")(MODEL, prompt(3), 9)


@pytest.mark.parametrize("loop", [sliced, from_a_buffer])
def test_torch_compile_crosses_the_window_or_refuses(loop):
    compiled = torch.compile(loop, backend="smc", options={"compiler": "eager"})
    with torch.no_grad():
        assert torch.equal(compiled(MODEL, prompt(3), 8), loop(MODEL, prompt(3), 8))
        with pytest.raises(LoopError, match=r"crops its text[\s\S]*use @smc_compile.decode"):
            compiled(MODEL, prompt(W + 2), 5)
