"""``smc-compile bench``: what each method costs on random weights of given shapes."""

from __future__ import annotations

import argparse
import importlib.metadata
from dataclasses import asdict

import torch
from rich.console import Console
from torch import Tensor

from smc_compile.bounds import Ceilings, costs, measure_ceilings, product_seconds
from smc_compile.errors import OptionError
from smc_compile.llama import Llama, LlamaConfig
from smc_compile.measure import (
    Contestant,
    Row,
    check_json_path,
    compile_line,
    contest,
    cpu_name,
    make_rows,
    measure,
    rows_table,
    write_json,
)
from smc_compile.passes.few_rows import EMULATED as EMULATED_BF16
from smc_compile.peers import has_library, library_twin

HELP = """\
Measure cost on random weights of given shapes.

Four methods generate from the same prompt in one run: the plain loop in eager mode, transformers with its own cache
(where it is installed), the compiled one-token loop, and SMC at each pair of --n-particles and --lookahead. They take
turns, and the table shows medians, with the share of what the machine's memory and arithmetic allow. Random weights
measure cost only: they say nothing about text. The defaults are a Llama-shaped target of 336M parameters and a draft
of 31M, in bfloat16, or in float32 on a processor without instructions for it.

  smc-compile bench
  smc-compile bench --n-particles 8 16 --lookahead 6 --json rows.json
  smc-compile bench --layers 4 --dim 256 --heads 4 --kv-heads 4 --hidden 704 --vocab 4096 --dtype float32
"""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
EMULATED_RATIO = 1.5  # a narrow type should be at least as fast as float32
EAGER_TOKENS = 4  # a forward over the whole prompt for each


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench``."""
    target = parser.add_argument_group("target")
    target.add_argument("--layers", type=int, default=24, metavar="L", help="layers")
    target.add_argument("--dim", type=int, default=1024, metavar="D", help="width")
    target.add_argument("--heads", type=int, default=16, metavar="H", help="attention heads")
    target.add_argument("--kv-heads", type=int, default=16, metavar="H", help="heads of keys and values")
    target.add_argument("--hidden", type=int, default=2752, metavar="D", help="width inside the MLP")
    target.add_argument("--vocab", type=int, default=32000, metavar="V", help="vocabulary, shared with the draft")
    draft = parser.add_argument_group("draft")
    draft.add_argument("--draft-layers", type=int, default=4, metavar="L", help="layers")
    draft.add_argument("--draft-dim", type=int, default=512, metavar="D", help="width")
    draft.add_argument("--draft-heads", type=int, default=8, metavar="H", help="attention heads")
    draft.add_argument("--draft-kv-heads", type=int, default=8, metavar="H", help="heads of keys and values")
    draft.add_argument("--draft-hidden", type=int, default=1664, metavar="D", help="width inside the MLP")
    request = parser.add_argument_group("request")
    request.add_argument("--prompt-length", type=int, default=128, metavar="P", help="tokens of the prompt")
    request.add_argument("--new-tokens", type=int, default=256, metavar="T", help="tokens to generate")
    request.add_argument("--temperature", type=float, default=0.8, metavar="T", help="temperature")
    request.add_argument("--n-particles", type=int, nargs="+", default=[4, 2], metavar="N", help="particles")
    request.add_argument(
        "--lookahead", type=int, nargs="+", default=[8], metavar="K", help="draft tokens a cycle; one, or one per N"
    )
    run_ = parser.add_argument_group("measurement")
    run_.add_argument(
        "--dtype",
        choices=["auto", *sorted(DTYPES)],
        default="auto",
        help="type of the weights; auto: bfloat16, or float32 on a processor that emulates it",
    )
    run_.add_argument("--device", default="cpu", help="device, such as cpu or cuda")
    run_.add_argument("--repeats", type=int, default=3, metavar="R", help="timed rounds")
    run_.add_argument("--threads", type=int, metavar="T", help="CPU threads (default: torch's choice)")
    run_.add_argument("--seed", type=int, default=0, metavar="S", help="seed of weights, prompt and sampling")
    run_.add_argument("--skip-eager", action="store_true", help="leave the eager loop out")
    run_.add_argument("--skip-transformers", action="store_true", help="leave the loop of transformers out")
    run_.add_argument("--json", metavar="FILE", help="write the rows to FILE")


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Measure, print the table, write the JSON file."""
    shapes = pair_shapes(arguments.n_particles, arguments.lookahead)
    check_arguments(arguments)
    check_json_path(arguments.json)
    if arguments.dtype == "auto":
        arguments.dtype = own_dtype(torch.device(arguments.device))
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    target_config, draft_config = configs(arguments, max(k for _, k in shapes))
    target, draft, ids = build_models(target_config, draft_config, arguments)
    counts = {"target_parameters": parameter_count(target), "draft_parameters": parameter_count(draft)}
    console.print(describe("target", target_config, counts["target_parameters"]), highlight=False)
    console.print(describe("draft ", draft_config, counts["draft_parameters"]), highlight=False)
    console.print(where(arguments), highlight=False, style="dim")
    for line in emulated_dtype(DTYPES[arguments.dtype], torch.device(arguments.device)):
        console.print(line, highlight=False, style="yellow")
    console.print()

    contestants = contest(
        target,
        draft,
        ids,
        max_new_tokens=arguments.new_tokens,
        temperature=arguments.temperature,
        shapes=shapes,
        eager_tokens=None if arguments.skip_eager else min(EAGER_TOKENS, arguments.new_tokens),
        sizes=(costs(target, cache_numbers(target_config)), costs(draft, cache_numbers(draft_config))),
    )
    if not arguments.skip_transformers and has_library():
        contestants.insert(0 if arguments.skip_eager else 1, library_loop(target, ids, arguments))
    place = DTYPES[arguments.dtype], torch.device(arguments.device)
    before = measure_ceilings(*place)
    results = measure(contestants, arguments.repeats, arguments.seed, console)
    ceilings = before.better(measure_ceilings(*place))
    rows = make_rows(results, ceilings)
    console.print(rows_table(rows, [result.contestant.name for result in results], console.width))
    console.print()
    if not arguments.skip_transformers and not has_library():
        console.print('transformers is not installed: its row is left out (pip install "smc_compile[transformers]")')
    for line in [*footnotes(contestants, rows, arguments.repeats), ceilings_line(ceilings)]:
        console.print(line, style="dim", highlight=False)
    console.print(compile_line(results), style="dim", highlight=False)
    if arguments.json:
        stored = {name: value for name, value in vars(arguments).items() if name != "run"}
        write_json(arguments.json, "bench", stored, rows, **counts, ceilings=asdict(ceilings))
        console.print(f"rows in {arguments.json}", style="dim", highlight=False)


def pair_shapes(n_particles: list[int], lookahead: list[int]) -> list[tuple[int, int]]:
    """(N, K) pairs; a single value on either side goes with every value on the other."""
    if len(lookahead) == 1:
        lookahead = lookahead * len(n_particles)
    if len(n_particles) == 1:
        n_particles = n_particles * len(lookahead)
    if len(n_particles) != len(lookahead):
        raise OptionError(
            "--n-particles and --lookahead do not pair up.",
            f"{len(n_particles)} values against {len(lookahead)}",
            "give one value, or as many as the other has",
        )
    return list(zip(n_particles, lookahead, strict=True))


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse shapes no model can have. What concerns generation is left to the library."""
    sizes = ("layers", "dim", "heads", "kv_heads", "hidden", "vocab")
    names = [*sizes, *(f"draft_{size}" for size in sizes if size != "vocab"), "prompt_length", "new_tokens", "repeats"]
    for name in names:
        if getattr(arguments, name) < 1:
            raise OptionError(f"--{name.replace('_', '-')} must be at least 1.", f"got {getattr(arguments, name)}")
    if arguments.threads is not None and arguments.threads < 1:
        raise OptionError("--threads must be at least 1.", f"got {arguments.threads}")
    for prefix in ("", "draft_"):
        dim, heads, kv_heads = (getattr(arguments, prefix + size) for size in ("dim", "heads", "kv_heads"))
        option = "--" + prefix.replace("_", "-")
        if dim % (2 * heads):
            raise OptionError(f"{option}dim must be a multiple of 2 {option}heads.", f"got {dim} and {heads}")
        if heads % kv_heads:
            raise OptionError(f"{option}heads must be a multiple of {option}kv-heads.", f"got {heads} and {kv_heads}")
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(
            f"Cannot use --device {arguments.device}.", reason, "leave --device out to use cpu"
        ) from error


def configs(arguments: argparse.Namespace, lookahead: int) -> tuple[LlamaConfig, LlamaConfig]:
    """Shapes of target and draft, with room for a cycle past the end."""
    a = arguments
    positions = a.prompt_length + a.new_tokens + 2 * (max(lookahead, 0) + 1)
    return (
        LlamaConfig(a.vocab, a.dim, a.layers, a.heads, a.kv_heads, a.hidden, positions),
        LlamaConfig(a.vocab, a.draft_dim, a.draft_layers, a.draft_heads, a.draft_kv_heads, a.draft_hidden, positions),
    )


def build_models(target: LlamaConfig, draft: LlamaConfig, arguments: argparse.Namespace) -> tuple[Llama, Llama, Tensor]:
    """Random target, random draft and a random prompt [1, P]."""
    torch.manual_seed(arguments.seed)
    dtype, device = DTYPES[arguments.dtype], arguments.device
    models = [Llama(config).to(dtype).to(device).eval().requires_grad_(False) for config in (target, draft)]
    ids = torch.randint(0, target.vocab_size, (1, arguments.prompt_length)).to(device)
    return models[0], models[1], ids


def library_loop(target: Llama, ids: Tensor, arguments: argparse.Namespace) -> Contestant:
    """``generate`` of transformers, with its own cache, on the same weights."""
    twin = library_twin(target)

    def run(seed: int, tokens: int = arguments.new_tokens) -> Tensor:
        torch.manual_seed(seed)
        settings = {"do_sample": True, "temperature": arguments.temperature, "top_k": 0}
        ids_and_text: Tensor = twin.generate(ids, max_new_tokens=tokens, **settings)
        return ids_and_text

    note = f"generate of transformers {importlib.metadata.version('transformers')}, its own cache, not compiled"
    return Contestant("transformers", run, arguments.new_tokens, note=note, warm_up=lambda seed: run(seed, 2))


def parameter_count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def describe(name: str, config: LlamaConfig, count: int) -> str:
    """One line about a model."""
    return (
        f"[bold]{name}[/bold]  {count / 1e6:.1f}M parameters: {config.n_layers} layers, dim {config.dim}, "
        f"{config.n_heads} heads ({config.n_kv_heads} kv), hidden {config.hidden_dim}, vocab {config.vocab_size}"
    )


def where(arguments: argparse.Namespace) -> str:
    """One line about the run."""
    device = cpu_name() if torch.device(arguments.device).type == "cpu" else torch.cuda.get_device_name()
    return (
        f"{arguments.dtype}, prompt of {arguments.prompt_length} tokens, {arguments.new_tokens} new tokens, "
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def own_dtype(device: torch.device) -> str:
    """bfloat16 where the device has instructions for it."""
    return "float32" if device.type == "cpu" and EMULATED_BF16 else "bfloat16"


def cache_numbers(config: LlamaConfig) -> int:
    """Numbers of keys and values that a token leaves in the cache."""
    return 2 * config.n_layers * config.n_kv_heads * (config.dim // config.n_heads)


def ceilings_line(ceilings: Ceilings) -> str:
    """What the bound is made of."""
    return (
        f"this machine reads {ceilings.bytes_per_second / 1e9:.0f} GB/s and multiplies "
        f"{ceilings.operations_per_second / 1e9:.0f} GFLOP/s; bound: for each pass of a model "
        "the longer of reading what it reads and multiplying what it multiplies"
    )


def emulated_dtype(dtype: torch.dtype, device: torch.device) -> list[str]:
    """A warning where products in ``dtype`` run slower than in float32: the processor has no instructions for it."""
    if dtype == torch.float32 or device.type != "cpu":
        return []
    ratio = product_seconds(dtype, device) / product_seconds(torch.float32, device)
    if ratio < EMULATED_RATIO:
        return []
    name = str(dtype).removeprefix("torch.")
    return [f"this processor emulates {name}: a product takes {ratio:.1f} times what float32 takes (--dtype float32)"]


def footnotes(contestants: list[Contestant], rows: list[Row], repeats: int) -> list[str]:
    """How to read the table."""
    notes = [f"{contestant.name}: {contestant.note}" for contestant in contestants if contestant.note]
    rounds = "one round" if repeats == 1 else f"medians of {repeats} interleaved rounds"
    tokens = " to ".join(str(n) for n in sorted({row["tokens"] for row in rows if row["method"] != "eager"}))
    notes.append(f"{rounds} of {tokens} tokens, prompt included; a cycle of a loop is one token")
    notes.append("random weights: this measures cost, not the quality of text")
    return notes
