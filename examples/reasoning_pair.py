"""A task with answers that can be checked: train a target and a weak draft on it, and see what each method gets right.

    python examples/reasoning_pair.py

A problem is twelve digits d_1 .. d_12; the answer is twelve more, r_i = 3 r_(i-1) + d_i modulo 10, beginning with
r_0 = 0. One wrong step makes all that follows wrong, as in a chain of thought. The target learns it almost perfectly,
the draft is smaller and learns for a shorter time: it is often wrong, and does not know it.

Both train in about two minutes on two cores. The table counts problems of which every digit is right, passes of the
target that an answer took, and nats a token from the target (``kl_bound``).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from smc_compile import generate
from smc_compile.pairs.llama import Llama, LlamaConfig

STEPS = 12  # digits of a problem, and of its answer
BEGIN, EQUALS, VOCABULARY = 10, 11, 12
TARGET = LlamaConfig(VOCABULARY, dim=64, n_layers=2, n_heads=4, n_kv_heads=4, hidden_dim=128, max_positions=64)
DRAFT = LlamaConfig(VOCABULARY, dim=32, n_layers=1, n_heads=4, n_kv_heads=4, hidden_dim=32, max_positions=64)


def problems(count: int, generator: torch.Generator) -> Tensor:
    """Problems with their answers [count, 2 + 2 * STEPS]."""
    digits = torch.randint(10, (count, STEPS), generator=generator)
    answer, r = [], torch.zeros(count, dtype=torch.int64)
    for i in range(STEPS):
        r = (3 * r + digits[:, i]) % 10
        answer.append(r)
    begin, equals = (torch.full((count, 1), token) for token in (BEGIN, EQUALS))
    return torch.cat([begin, digits, equals, torch.stack(answer, 1)], 1)


def train(config: LlamaConfig, steps: int, seed: int, progress: Progress, name: str) -> Llama:
    """A model that has learnt from ``steps`` batches of problems."""
    torch.manual_seed(seed)
    model, generator = Llama(config), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    task = progress.add_task(name, total=steps)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * (1 - step / steps)
        ids = problems(128, generator)
        logits = model(ids[:, :-1])[:, STEPS + 1 :]  # those that predict the answer
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, STEPS + 2 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.advance(task)
    return model.requires_grad_(False).eval()


def settings(particles: Sequence[int], lookahead: int) -> list[dict[str, Any]]:
    """The target alone, exact speculation, and SMC with cut and with whole blocks."""
    smc = [
        {"method": "smc", "n_particles": n, "lookahead": lookahead, "max_divergence": cut}
        for cut in (0.35, 1.0)
        for n in particles
    ]
    exact = {"method": "speculative", "n_particles": 1, "lookahead": lookahead}
    return [{"method": "autoregressive"}, exact, *smc]


def measured(target: Llama, draft: Llama, ids: Tensor, options: dict[str, Any]) -> list[str]:
    """A row of the table."""
    with torch.compiler.set_stance("force_eager"):
        out = generate(
            target,
            draft,
            ids[:, : STEPS + 2],
            max_new_tokens=STEPS,
            seed=0,
            compiler="eager",
            validate=False,
            **options,
        )
    right = (out.sequences == ids).all(1).double()
    alone = options["method"] == "autoregressive"
    passes = STEPS if alone else float((out.widths > 0).sum(1).double().mean())
    far = out.kl_bound_per_token
    name = {"autoregressive": "one-token loop", "speculative": f"exact speculation, K={options.get('lookahead')}"}
    cut = options.get("max_divergence")
    smc = f"SMC, N={options.get('n_particles')}, K={options.get('lookahead')}, {'whole' if cut == 1 else f'cut {cut}'}"
    return [
        name.get(options["method"], smc),
        f"{right.mean():.1%} ± {right.std() / len(right) ** 0.5:.1%}",
        f"{passes:.2f}",
        "exact" if options["method"] != "smc" else f"{far.mean():.3f} ± {far.std() / len(far) ** 0.5:.3f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target-steps", type=int, default=1500)
    parser.add_argument("--draft-steps", type=int, default=900)
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--n-particles", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--lookahead", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    console = Console()
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    ids = problems(a.problems, torch.Generator().manual_seed(a.seed + 100))
    table = Table(box=None, header_style="bold")
    table.add_column("method")
    for title in ("problems solved", "target passes", "nats a token off"):
        table.add_column(title, justify="right")
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        target = train(TARGET, a.target_steps, a.seed, progress, "training the target")
        draft = train(DRAFT, a.draft_steps, a.seed + 1, progress, "training the draft")
        asked = settings(a.n_particles, a.lookahead)
        task = progress.add_task("solving", total=len(asked))
        for options in asked:
            table.add_row(*measured(target, draft, ids, options))
            progress.advance(task)
    p, q = (model(ids)[:, STEPS + 1 : -1].softmax(-1) for model in (target, draft))
    console.print(f"overlap of target and draft, a token: {torch.minimum(p, q).sum(-1).mean():.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
