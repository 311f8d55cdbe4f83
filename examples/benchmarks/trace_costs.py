"""How long the first call of a decode loop takes beside that of ``generate``, nothing compiled to machine code.

    python examples/benchmarks/trace_costs.py [--layers 4 24]

A Llama of transformers with few weights and random ones: what is timed is tracing, not computing. Each row is measured
in a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import smc_compile

WAYS = ("decode", "generate")


def loop(model: nn.Module, ids: Tensor, n: int) -> Tensor:
    for _ in range(n):
        logits = model(ids).logits[:, -1]
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], 1)
    return ids


def first_call(way: str, layers: int) -> float:
    """Seconds of the first call of a process."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4
    )
    model, ids = LlamaForCausalLM(config).eval(), torch.randint(512, (1, 9))
    options = {"method": "autoregressive", "compiler": "eager", "seed": 0}
    start = time.perf_counter()
    if way == "decode":
        smc_compile.decode(loop, **options)(model, ids, 12)
    else:
        smc_compile.generate(model, input_ids=ids, max_new_tokens=12, **options)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 24])
    layers = parser.parse_args().layers
    runs = [(way, count) for count in layers for way in WAYS]
    context = multiprocessing.get_context("spawn")
    found = {}
    for run in track(runs, "first calls", transient=True):
        with context.Pool(1) as pool:
            found[run] = pool.apply(first_call, run)
    table = Table("layers", *WAYS, "ratio", title="seconds of the first call")
    for count in layers:
        seconds = [found[way, count] for way in WAYS]
        table.add_row(str(count), *(f"{s:.1f}" for s in seconds), f"{seconds[0] / seconds[1]:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
