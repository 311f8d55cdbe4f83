"""Train the pair that ships with the package: a tokenizer, a target and a draft, from Python's own standard library.

    python examples/train_pair.py --out smc_compile/pairs/data

Three stages. The target learns next tokens; the draft learns the target's distributions (distillation), starting from
its embedding; then both learn together to predict the text and to agree, which makes a far better proposal for a small
loss of the target's own. ``--stages`` runs some of them on the files in ``--out``. Two runs with the same seed, steps,
Python and torch on the same machine give the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F

from smc_compile.pairs.llama import Llama, LlamaConfig

END = "<|end|>"
VOCABULARY = 2048
CONTEXT, LONG_CONTEXT = 256, 1024
LONG_FROM = 0.8  # the share of training after which windows are LONG_CONTEXT long: late positions are learnt too
TARGET = LlamaConfig(VOCABULARY, dim=192, n_layers=10, n_heads=6, n_kv_heads=2, hidden_dim=320, max_positions=1024)
DRAFT = LlamaConfig(VOCABULARY, dim=192, n_layers=2, n_heads=6, n_kv_heads=2, hidden_dim=128, max_positions=1024)
STAGES = ("target", "draft", "agree")
AGREE_RATE = 0.3  # of the peak learning rate: both models are trained already
LEFT_OUT = {
    *("site-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "__pycache__"),
    *("encodings", "pydoc_data"),  # tables and prose
}
ALWAYS_HELD_OUT = "json/decoder.py"  # what tests/pairs/test_shipped.py reads

Loss = Callable[[Tensor, Tensor], Tensor]  # ids [B, S], next ids [B, S] -> scalar


# --- text ---------------------------------------------------------------------------------------------------------


def library_sources(root: Path) -> dict[str, str]:
    """Relative name -> text of every distinct source file of the standard library, in order of name."""
    sources, seen = {}, set()
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        name = path.relative_to(root)
        if LEFT_OUT & set(name.parts) or name.name.startswith("_sysconfigdata"):  # the latter names this machine
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if text.strip() and text not in seen:
            seen.add(text)
            sources[name.as_posix()] = text
    return sources


def is_held_out(name: str) -> bool:
    """One file in twenty, by a hash of its name."""
    return name == ALWAYS_HELD_OUT or hashlib.sha256(name.encode()).digest()[0] * 20 < 256


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: every text has an encoding, and decoding gives it back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """One stream of ids [T]; each text starts after an end-of-text token."""
    end = tokenizer.token_to_id(END)
    return torch.tensor([i for text in texts for i in (end, *tokenizer.encode(text).ids)])


def batches(stream: Tensor, length: int, count: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch of windows cut at a random offset, shuffled: ids and next ids, each [count, length]."""
    while True:
        offset = int(torch.randint(length, (), generator=generator))
        starts = torch.arange(offset, len(stream) - length, length)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for rows in starts.split(count)[:-1]:
            windows = stream[rows[:, None] + torch.arange(length + 1)]  # [count, length + 1]
            yield windows[:, :-1], windows[:, 1:]


# --- losses -------------------------------------------------------------------------------------------------------


def half_precision() -> torch.autocast:
    """bfloat16 where the processor computes in it; elsewhere it would only be slower."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=native)


def data_loss(model: nn.Module) -> Loss:
    def loss(ids: Tensor, following: Tensor) -> Tensor:
        with half_precision():
            logits = model(ids)
        return F.cross_entropy(logits.float().flatten(0, 1), following.flatten())

    return loss


def distillation_loss(draft: nn.Module, target: nn.Module, share: float) -> Loss:
    """``share`` of KL(target || draft), the rest cross entropy to the data."""

    def loss(ids: Tensor, following: Tensor) -> Tensor:
        with half_precision():
            logits = draft(ids)
            with torch.no_grad():
                taught = target(ids)
        log_q = logits.float().log_softmax(-1).flatten(0, 1)  # [B * S, V]
        log_p = taught.float().log_softmax(-1).flatten(0, 1)
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        return share * kl + (1 - share) * F.nll_loss(log_q, following.flatten())

    return loss


def agreement_loss(target: nn.Module, draft: nn.Module, share: float) -> Loss:
    """Cross entropy of the target to the data, and ``share`` of KL in both directions, whose gradient reaches both.

    Forward KL makes the draft cover the target; backward KL is the loss of log weight per token that drafting costs.
    """

    def loss(ids: Tensor, following: Tensor) -> Tensor:
        with half_precision():
            p, q = target(ids), draft(ids)
        log_p = p.float().log_softmax(-1).flatten(0, 1)  # [B * S, V]
        log_q = q.float().log_softmax(-1).flatten(0, 1)
        apart = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean()  # KL(p, q) + KL(q, p)
        return F.nll_loss(log_p, following.flatten()) + share * apart

    return loss


# --- training -----------------------------------------------------------------------------------------------------


def optimizers(models_: Sequence[Llama], rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    named = [(name, p) for model in models_ for name, p in model.named_parameters()]
    matrices = [p for name, p in named if p.dim() == 2 and name.startswith("layers.")]
    rest = [p for name, p in named if p.dim() == 1 or not name.startswith("layers.")]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def rate_at(progress: float) -> float:
    """A short rise, then a straight line down to zero."""
    return min(progress / 0.03, (1 - progress) / 0.97, 1.0)


def train(
    label: str,
    models_: Sequence[Llama],
    loss: Loss,
    stream: Tensor,
    *,
    steps: int,
    rate: float,
    tokens: int,
    seed: int,
    bars: Progress,
) -> dict:
    """Train in place for ``steps`` steps; return what was recorded."""
    generator = torch.Generator().manual_seed(seed)
    short = batches(stream, CONTEXT, tokens // CONTEXT, generator)
    long = batches(stream, LONG_CONTEXT, tokens // LONG_CONTEXT, generator)
    optimizer_list = optimizers(models_, rate)
    parameters = [p for model in models_ for p in model.parameters()]
    bar = bars.add_task(label, total=steps, loss=math.nan)
    losses, average, began = [], math.nan, time.monotonic()
    for step in range(1, steps + 1):
        value = loss(*next(long if step > LONG_FROM * steps else short))
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizer_list:
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_at(step / steps)
            optimizer.step()
            optimizer.zero_grad()
        average = value.item() if math.isnan(average) else 0.95 * average + 0.05 * value.item()
        if step % 50 == 0:
            losses.append(round(average, 4))
            bars.console.print(f"{label} {step:5d}  loss {average:.4f}  {time.monotonic() - began:.0f} s", style="dim")
        bars.update(bar, completed=step, loss=average)
    taken = (time.monotonic() - began) / 60
    return {"steps": steps, "tokens_per_step": tokens, "minutes": round(taken, 2), "loss_every_50_steps": losses}


# --- measuring ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(target: nn.Module, draft: nn.Module, stream: Tensor, length: int = 512) -> dict:
    """Held-out losses in nats per token, KL per token, and the chance that a draft token is accepted."""
    sums, count = torch.zeros(6, dtype=torch.float64), 0
    for start in range(0, len(stream) - length, length):
        ids, following = stream[None, start : start + length], stream[start + 1 : start + length + 1]
        p, q = target(ids)[0], draft(ids)[0]  # [S, V]
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        per_token = (
            F.nll_loss(log_p, following, reduction="none"),
            F.nll_loss(log_q, following, reduction="none"),
            (log_p.exp() * (log_p - log_q)).sum(-1),
            (log_q.exp() * (log_q - log_p)).sum(-1),
            torch.minimum(log_p.exp(), log_q.exp()).sum(-1),
            torch.minimum((p / 0.8).softmax(-1), (q / 0.8).softmax(-1)).sum(-1),
        )
        sums += torch.stack(per_token).double().sum(-1)  # [6]
        count += length
    names = ("target_nats", "draft_nats", "kl_target_draft", "kl_draft_target", "acceptance_1.0", "acceptance_0.8")
    means = {name: round(total / count, 4) for name, total in zip(names, sums.tolist(), strict=True)}
    return means | {"tokens": count, "window": length}


# --- files --------------------------------------------------------------------------------------------------------


def save(model: nn.Module, path: Path) -> None:
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, path)


def restore(config: LlamaConfig, path: Path) -> Llama:
    """The model as its users see it: rounded to float16, computed in float32."""
    model = Llama(config)
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.requires_grad_(False).eval()


def describe(config: LlamaConfig, path: Path) -> dict:
    numbers = sum(value.numel() for value in load_file(path).values())
    return {"config": asdict(config), "parameters": numbers, "file_bytes": path.stat().st_size}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("pair"), help="folder for the four files (default: pair)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target-steps", type=int, default=3000)
    parser.add_argument("--draft-steps", type=int, default=1600)
    parser.add_argument("--agree-steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=6e-3, help="peak learning rate")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per step")
    parser.add_argument("--share", type=float, default=0.9, help="share of the KL in the draft's loss")
    parser.add_argument("--agree-share", type=float, default=2.0, help="share of both KLs in the common loss")
    parser.add_argument("--threads", type=int, default=2, help="1 is faster where other work shares the cores")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="what to run (default: all)")
    return parser.parse_args()


def main() -> None:
    a = arguments()
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    a.out.mkdir(parents=True, exist_ok=True)
    target_file, draft_file = a.out / "target.safetensors", a.out / "draft.safetensors"

    sources = library_sources(Path(sysconfig.get_paths()["stdlib"]))
    held_out = [name for name in sources if is_held_out(name)]
    texts = [text for name, text in sources.items() if not is_held_out(name)]
    tokenizer = train_tokenizer(texts)
    tokenizer.save(str(a.out / "tokenizer.json"))
    stream, held_out_stream = encode(tokenizer, texts), encode(tokenizer, [sources[name] for name in held_out])

    loss_column = TextColumn("{task.fields[loss]:.3f}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), loss_column)
    earlier = a.out / "pair.json"
    records = json.loads(earlier.read_text())["training"] if earlier.exists() and len(a.stages) < len(STAGES) else {}
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as bars:
        bars.console.print(f"{len(texts)} files, {len(stream)} tokens; {len(held_out_stream)} tokens held out")
        rest = {"stream": stream, "rate": a.rate, "tokens": a.tokens, "seed": a.seed, "bars": bars}
        if "target" in a.stages:
            target = Llama(TARGET)
            records["target"] = train("target", [target], data_loss(target), steps=a.target_steps, **rest)
            save(target, target_file)
        target = restore(TARGET, target_file)
        if "draft" in a.stages:
            torch.manual_seed(a.seed + 1)
            draft = Llama(DRAFT)
            draft.embedding.load_state_dict(target.embedding.state_dict())
            draft.norm.load_state_dict(target.norm.state_dict())
            loss = distillation_loss(draft, target, a.share)
            records["draft"] = train("draft", [draft], loss, steps=a.draft_steps, **rest) | {"share": a.share}
            save(draft, draft_file)
        draft = restore(DRAFT, draft_file)
        if "agree" in a.stages:
            pair = [target.requires_grad_(), draft.requires_grad_()]
            loss = agreement_loss(*pair, a.agree_share)
            records["agree"] = train("agree", pair, loss, steps=a.agree_steps, **rest | {"rate": a.rate * AGREE_RATE})
            records["agree"] |= {"share": a.agree_share}
            save(target, target_file)
            save(draft, draft_file)

    info = {
        "target": describe(TARGET, target_file),
        "draft": describe(DRAFT, draft_file),
        "training": records,
        "held_out": measure(restore(TARGET, target_file), restore(DRAFT, draft_file), held_out_stream),
        "seed": a.seed,
        "learning_rate": a.rate,
        "trained_on": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "data": {
            "what": "Python's standard library (PSF licence)",
            "training_files": len(texts),
            "training_tokens": len(stream),
            "held_out_files": held_out,
        },
    }
    (a.out / "pair.json").write_text(json.dumps(info, indent=1) + "\n")
    print(json.dumps(info["held_out"], indent=1))


if __name__ == "__main__":
    main()
