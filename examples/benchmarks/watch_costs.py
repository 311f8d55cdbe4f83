"""What it costs to see, at every call, whether a model has changed: a share of the shortest call there is.

    python examples/benchmarks/watch_costs.py [--hidden 960] [--layers 32]

A Llama of transformers with random weights (by default the shape of a model with 360 million parameters) generates one
token after a prompt of eight, in the one-token loop: no call is shorter. Processor time of this process, least of 20.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import smc_compile
from smc_compile.fingerprint import StateWalk
from smc_compile.program.guards import model_state


def seconds(function: Callable[[], object], times: int = 20) -> float:
    """The least processor time of a call."""
    found = []
    for _ in range(times):
        start = time.process_time()
        function()
        found.append(time.process_time() - start)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=960)
    parser.add_argument("--layers", type=int, default=32)
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = LlamaConfig(
        hidden_size=given.hidden,
        intermediate_size=given.hidden * 8 // 3,
        num_hidden_layers=given.layers,
        num_attention_heads=given.hidden // 64,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(1000, (1, 8))

    def generate() -> object:
        return smc_compile.generate(
            model, input_ids=ids, max_new_tokens=1, method="autoregressive", compiler="eager", seed=0
        )

    generate()
    call, watch = seconds(generate), seconds(lambda: model_state(model))
    walk = seconds(lambda: StateWalk().visit(model), 5)
    print(f"{given.layers} layers, {sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters")
    print(f"shortest call    {call * 1e3:9.2f} ms")
    print(f"nothing changed  {watch * 1e3:9.2f} ms   {watch / call:.2%} of the call")
    print(f"a new state      {walk * 1e3:9.2f} ms   {walk / call:.2%} of the call, besides compilation")


if __name__ == "__main__":
    main()
