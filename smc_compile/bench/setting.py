"""What a measurement sets up and prints before anything is timed: threads, the pair of models, the machine."""

from __future__ import annotations

import argparse

import torch
from rich.console import Console

from smc_compile.bench.ceilings import Ceilings, product_seconds
from smc_compile.bench.report import device_name
from smc_compile.pairs.llama import Llama, LlamaConfig
from smc_compile.pairs.nested import Tuned
from smc_compile.pairs.presets import DTYPES, check_memory, weight_count
from smc_compile.pairs.random_weights import build_models
from smc_compile.passes.lower.skinny_products import ROWS

EMULATED_RATIO = 1.5  # a narrow type should be at least as fast as float32


def set_threads(arguments: argparse.Namespace) -> None:
    """As many threads as --threads says; torch's own choice without it."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)


def build_pair(
    arguments: argparse.Namespace,
    target_config: LlamaConfig,
    draft_config: LlamaConfig,
    console: Console,
) -> tuple[Llama, Llama, Tuned | None]:
    """Build both models, if they fit in memory, and print what they are.

    Raises:
        OptionError: where memory, shapes or the acceptance rate do not allow it.
    """
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    counts = weight_count(target_config), weight_count(draft_config)
    check_memory(sum(counts), dtype, device)
    target, draft, tuned = build_models(
        target_config,
        draft_config,
        dtype=dtype,
        device=device,
        seed=arguments.seed,
        acceptance=arguments.acceptance,
        temperature=arguments.temperature,
    )
    console.print(describe("target", target_config, counts[0]), highlight=False)
    console.print(describe("draft ", draft_config, counts[1]), highlight=False)
    console.print(pair_line(tuned, arguments.temperature), highlight=False)
    return target, draft, tuned


def warn_of_emulation(arguments: argparse.Namespace, console: Console) -> None:
    """Print a warning where the processor has no instructions for the type of the weights."""
    for line in emulated_dtype(DTYPES[arguments.dtype], torch.device(arguments.device)):
        console.print(line, highlight=False, style="yellow")


def describe(name: str, config: LlamaConfig, count: int) -> str:
    """One line about a model."""
    return (
        f"[bold]{name}[/bold]  {count / 1e6:.1f}M parameters: {config.n_layers} layers, dim {config.dim}, "
        f"{config.n_heads} heads ({config.n_kv_heads} kv), hidden {config.hidden_dim}, vocab {config.vocab_size}"
    )


def pair_line(tuned: Tuned | None, temperature: float) -> str:
    """One line about how well the draft predicts the target."""
    if tuned is None:
        return "[bold]pair[/bold]    unrelated random weights, whatever share of drafted tokens that accepts"
    return (
        f"[bold]pair[/bold]    the target contains the draft: acceptance {tuned.acceptance:.2f} (--acceptance), "
        f"{tuned.entropy:.1f} nats at temperature {temperature:g}"
    )


def where(arguments: argparse.Namespace) -> str:
    """One line about the run."""
    device = device_name(torch.device(arguments.device))
    return (
        f"{arguments.dtype}, prompt of {arguments.prompt_length} tokens, {arguments.new_tokens} new tokens, "
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def rates(ceilings: Ceilings) -> str:
    """One line about the rates that were measured on this machine."""
    return (
        f"this machine reads {ceilings.bytes_per_second / 1e9:.0f} GB/s and multiplies "
        f"{ceilings.operations_per_second / 1e9:.0f} GFLOP/s"
    )


def emulated_dtype(dtype: torch.dtype, device: torch.device) -> list[str]:
    """A warning where torch's products in ``dtype`` run slower than in float32, for want of instructions for it."""
    if dtype == torch.float32 or device.type != "cpu":
        return []
    ratio = product_seconds(dtype, device) / product_seconds(torch.float32, device)
    if ratio < EMULATED_RATIO:
        return []
    name = str(dtype).removeprefix("torch.")
    ours = "ours do not" if dtype in ROWS else "ours too"
    return [
        f"this processor emulates {name}: torch's products take {ratio:.1f} times what float32 takes, {ours} (--dtype "
        "float32 may be faster for others)"
    ]
