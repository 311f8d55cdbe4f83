"""``smc-compile models``: which decoders of the transformers library compile, found out by trying each of them."""

from __future__ import annotations

import argparse
import contextlib
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from smc_compile.compile import TRACE_BATCH, LastLogits
from smc_compile.errors import OptionError, SMCError
from smc_compile.logits import logits_of, traceable
from smc_compile.measure import check_json_path, number, progress_bar, write_json
from smc_compile.passes.pipeline import Traced, trace_model

HELP = """\
Try to compile the decoders of the transformers library.

For each family a tiny model with random weights is built from the family's own configuration (two layers, a window of
six positions where it has windows), traced, given a cache, and compared with the original in float64. Nothing is
downloaded. The default is a list of common families; --all tries every causal language model that the installed
transformers knows, which takes a quarter of an hour.

  smc-compile models
  smc-compile models --only llama gemma2 --attention both
  smc-compile models --all --json models.json
"""
COMMON = """
    llama mistral qwen2 qwen3 gemma2 gemma3_text phi3 gpt2 gpt_neo gptj falcon bloom opt starcoder2 olmo2 smollm3
    granite cohere2 stablelm gpt_oss mixtral qwen3_moe
"""

# Configurations are shrunk by the names of their attributes, where they hold an integer.
SMALL = {
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers": 2,
    "hidden_size n_embd n_embed d_model dim hidden_dim embed_dim word_embed_proj_dim embedding_size": 32,
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads": 4,
    "num_key_value_heads num_kv_heads n_head_kv num_global_key_value_heads": 2,
    "head_dim global_head_dim kv_channels attention_head_dim d_kv qk_rope_head_dim qk_nope_head_dim v_head_dim": 8,
    "qk_head_dim q_lora_rank kv_lora_rank": 16,
    "rotary_dim": 4,
    "intermediate_size n_inner ffn_dim d_ff dim_ff decoder_ffn_dim encoder_ffn_dim moe_intermediate_size": 48,
    "shared_expert_intermediate_size ffn_hidden_size expert_ffn_hidden_size intermediate_size_mlp": 48,
    "moe_shared_expert_intermediate_size shared_intermediate_size": 48,
    "hidden_size_per_layer_input": 8,
    "num_experts num_local_experts n_routed_experts moe_num_experts": 4,
    "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts": 2,
    "n_shared_experts num_shared_experts n_group topk_group num_expert_group first_k_dense_replace": 1,
    "vocab_size vocab_size_per_layer_input": 97,
    "sliding_window window_size attention_window_size attention_chunk_size local_attention": 6,
    "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length max_target_positions seq_length": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIZES = {name: value for names, value in SMALL.items() for name in names.split()}
# Left unset these are derived, or the configuration does not build.
UNSET = ("head_dim", "num_key_value_heads", "n_group", "topk_group", "num_experts_per_tok", "n_routed_experts")
CONTEXT = 16  # positions at which masks are read
ATTENTION = {"sdpa": (None,), "eager": ("eager",), "both": (None, "eager")}


@dataclass(frozen=True)
class Row:
    """One family with one implementation of attention.

    ``status`` is "compiled", "refused" (with our reason), "failed" (an error of another kind: a defect of ours) or
    "not built" (no tiny model came out of the configuration). What follows ``reason`` is None unless compiled.
    """

    family: str
    attention: str
    status: str
    reason: str | None = None
    attention_ops: str | None = None
    windows: list[int] | None = None
    tables: int | None = None
    error: float | None = None
    bytes_per_token: int | None = None
    seconds: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``models``."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", metavar="FAMILY", default=COMMON.split(), help="families by model type")
    which.add_argument("--all", action="store_true", help="every causal language model of transformers")
    parser.add_argument(
        "--attention",
        choices=sorted(ATTENTION),
        default="sdpa",
        help="fused attention, where a family offers it, or matmul and softmax",
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Try each family, print what came out; after Ctrl-C what came out so far."""
    check_json_path(arguments.json)
    known = families()
    names = known if arguments.all else arguments.only
    unknown = [name for name in names if name not in known]
    if unknown:
        raise OptionError(f"unknown family {unknown[0]!r}", f"transformers has {', '.join(known)}")
    rows: list[Row] = []
    try:
        with progress_bar(console) as progress:
            task = progress.add_task("", total=len(names))
            for name in names:
                progress.update(task, description=name)
                rows.extend(try_family(name, ATTENTION[arguments.attention]))
                progress.advance(task)
    finally:
        show(rows, console)
        if arguments.json:
            stored = {key: value for key, value in vars(arguments).items() if key != "run"}
            version = _transformers().__version__
            write_json(arguments.json, "models", stored, [asdict(row) for row in rows], transformers=version)
            console.print(f"rows in {arguments.json}", style="dim", highlight=False)


def families() -> list[str]:
    """The model types that transformers maps to a causal language model.

    Raises:
        OptionError: when transformers is not installed.
    """
    _transformers()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise OptionError(
            "transformers is not installed", "the models come from it", 'pip install "smc_compile[transformers]"'
        ) from None
    return transformers


# ---- one family -----------------------------------------------------------------------------------------------------


def try_family(family: str, implementations: Sequence[str | None]) -> list[Row]:
    """A row for each implementation of attention; one that the family does not offer gives no row of its own."""
    rows: list[Row] = []
    for implementation in implementations:
        row = try_model(family, implementation)
        if all(row.attention != other.attention for other in rows):
            rows.append(row)
    return rows


def try_model(family: str, implementation: str | None) -> Row:
    """Build, run and compile one tiny model."""
    try:
        with _quiet():
            model = build(family, implementation)
        with _quiet(), traceable(model):
            logits_of(model, torch.zeros(1, 2, dtype=torch.int64))
    except Exception as error:  # a configuration that does not fit our sizes can fail in any way
        return Row(family, implementation or "-", "not built", _first_line(error))
    attention = getattr(model.config, "_attn_implementation", None) or "-"
    start = time.perf_counter()
    try:
        with _quiet():
            ids = torch.zeros(TRACE_BATCH, 2, dtype=torch.int64)
            traced = trace_model(LastLogits64(model), ids, (), check=True, sampled=False)
    except SMCError as error:
        why = error.why.splitlines()[0] if error.why else ""
        what = error.what.removeprefix("no cache can be synthesized: ")
        return Row(family, attention, "refused", f"{what} ({why})")
    except Exception as error:  # the table is there to find these
        return Row(family, attention, "failed", _first_line(error))
    return Row(
        family,
        attention,
        "compiled",
        attention_ops=attention_ops(traced),
        windows=windows(traced),
        tables=len(traced.cached.table_axes),
        error=traced.error,
        bytes_per_token=sum(site.bytes_per_token for site in traced.cached.sites),
        seconds=time.perf_counter() - start,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes of transformers on configurations and kernels."""
    logging = _transformers().utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def attention_ops(traced: Traced) -> str:
    """How many attentions were found, and whether fused ("sdpa") or written out ("matmul")."""
    roles = list(traced.cached.attention)
    found = {"sdpa": roles.count("sdpa"), "matmul": roles.count("score")}
    return " + ".join(f"{count} {name}" for name, count in found.items() if count) or "none"


def windows(traced: Traced) -> list[int]:
    """How many positions a query sees at most, for each mask that hides earlier ones."""
    tables = traced.cached.tables(CONTEXT, *traced.owned())
    seen = [_visible(table) for table, axes in zip(tables, traced.cached.table_axes, strict=True) if len(axes) == 2]
    return sorted({count for count in seen if count < CONTEXT})


def _visible(mask: Tensor) -> int:
    """The largest number of keys that a row of a mask [..., Q, K] lets through; float masks hide with huge numbers."""
    shown = mask if mask.dtype == torch.bool else mask > -1e4
    return int(shown.sum(-1).max())


# ---- tiny models ----------------------------------------------------------------------------------------------------


def build(family: str, attention: str | None = None, dtype: torch.dtype = torch.float64, **sizes: Any) -> nn.Module:
    """A tiny causal language model of a family, with random weights, in eval mode; ``sizes`` override the small ones.

    ``attention`` None takes "sdpa" where the family offers it.
    """
    transformers = _transformers()
    default = transformers.AutoConfig.for_model(family)
    config = type(default)(**{**small(default), **sizes})
    choice = {"attn_implementation": attention} if attention else {}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, **choice)
    shake(model)
    return model.to(dtype).eval()


def small(config: Any) -> dict[str, Any]:
    """Arguments that make a configuration like ``config`` small, each kind of layer kept."""
    chosen: dict[str, Any] = {}
    for name, value in SIZES.items():
        current = _setting(config, name)
        is_unset = current is None and name in vars(config) and name in UNSET
        if is_unset or (isinstance(current, int) and not isinstance(current, bool)):
            chosen[name] = value
    if "kv_lora_rank" in chosen:  # keys made from a latent have as many heads as queries
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
    kinds = list(dict.fromkeys(_setting(config, "layer_types") or []))
    if kinds:
        shared = bool(_setting(config, "num_kv_shared_layers"))
        chosen["layer_types"] = kinds * (2 if len(kinds) == 1 or shared else 1)
        chosen["num_hidden_layers"] = len(chosen["layer_types"])
        if shared:  # the second half of the layers reads the keys of the first
            chosen["num_kv_shared_layers"] = len(kinds)
    if _setting(config, "is_decoder") is False:
        chosen["is_decoder"] = True
    if _setting(config, "attention_types"):  # [[kinds, times], ...]
        chosen["attention_types"] = [[config.attention_types[0][0], 1]]
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            chosen[name] = type(getattr(config, name))(**small(getattr(config, name)))
    return chosen


def _setting(config: Any, name: str) -> Any:
    """A configuration's attribute, None where it has none, derives it, or gives each layer its own."""
    if isinstance(getattr(type(config), getattr(config, "attribute_map", {}).get(name, name), None), property):
        return None
    try:
        return getattr(config, name, None)
    except Exception:  # transformers raises a type of its own for what differs between layers
        return None


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Replace the cautious initial weights: all parameters must matter, biases and norms too."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.2)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))


class LastLogits64(LastLogits):
    """``LastLogits`` in float64 throughout: what a model casts to float32 inside is cast to float64.

    The cached form repeats the model's operations, so a difference above 1e-9 is then a mistake and not rounding.
    """

    def forward(self, ids: Tensor) -> Tensor:
        with Float64Throughout():
            return super().forward(ids)


class Float64Throughout(TorchFunctionMode):
    """Inside, a cast to float32 is one to float64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            return args[0].double()
        wide = {torch.float32: torch.float64}
        args = tuple(wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {k: wide.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return function(*args, **kwargs)


# ---- showing --------------------------------------------------------------------------------------------------------


def show(rows: Sequence[Row], console: Console) -> None:
    """The compiled families as a table, the others with their reason, and a count."""
    compiled = [row for row in rows if row.status == "compiled"]
    others = [row for row in rows if row.status != "compiled"]
    if compiled:
        console.print(compiled_table(compiled))
        console.print()
    if others:
        console.print(others_table(others))
        console.print()
    counts = {status: sum(row.status == status for row in rows) for status in dict.fromkeys(r.status for r in rows)}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items()) or "nothing tried")


def compiled_table(rows: Sequence[Row]) -> Table:
    """What was found in each family that compiled, and how far the cached form is from the original in float64."""
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    table.add_column("family", no_wrap=True)
    for title in ("attention", "window", "tables", "largest\nerror", "bytes per\ntoken", "seconds"):
        table.add_column(title, justify="left" if title == "attention" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            escape(row.family),
            row.attention_ops,
            ", ".join(map(str, row.windows or [])) or "[dim]-[/dim]",
            str(row.tables),
            f"{row.error:.0e}",
            str(row.bytes_per_token),
            number(row.seconds),
        )
    return table


def others_table(rows: Sequence[Row]) -> Table:
    """Why the others did not compile, one line each."""
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    for title, width in (("family", 24), ("attention", 9), ("", 9), ("reason", 52)):
        table.add_column(title, width=width, no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(escape(row.family), row.attention, row.status, escape(row.reason or ""))
    return table
