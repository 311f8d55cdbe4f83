"""What the commands share: options of a random pair of models, and checks of options before anything is built."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from smc_compile.errors import InputError, OptionError
from smc_compile.pairs.presets import DEFAULT, DTYPES, PRESETS

SHAPES = (  # option, what it is
    ("layers", "L", "layers"),
    ("dim", "D", "width"),
    ("heads", "H", "attention heads"),
    ("kv-heads", "H", "heads of keys and values"),
    ("hidden", "D", "width inside the MLP"),
)


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say which pair, of which type, where."""
    pair = parser.add_argument_group("pair")
    pair.add_argument(
        "--preset", default=DEFAULT, metavar="NAME", help=f"shapes that single options change: {', '.join(PRESETS)}"
    )
    pair.add_argument(
        "--acceptance",
        type=acceptance,
        default=0.7,
        metavar="A",
        help="share of drafted tokens that exact speculation accepts; none: unrelated random weights",
    )
    pair.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        default="bfloat16",
        help="type of the weights",
    )
    pair.add_argument("--device", default="cpu", help="cpu or cuda")
    pair.add_argument("--seed", type=int, default=0, metavar="S", help="seed of weights, prompt and sampling")
    for title, prefix in (("target", ""), ("draft", "draft-")):
        group = parser.add_argument_group(f"{title} (default: the preset's)")
        for name, letter, meaning in SHAPES:
            group.add_argument(f"--{prefix}{name}", type=int, metavar=letter, help=meaning)
        if title == "target":
            group.add_argument("--vocab", type=int, metavar="V", help="vocabulary, shared with the draft")


def acceptance(text: str) -> float | None:
    """A share between 0 and 1, or None for "none"."""
    if text.lower() == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a share between 0 and 1 nor none")
    return value


def check_arguments(arguments: argparse.Namespace, counts: Sequence[str] = ("chains", "assistant_tokens")) -> None:
    """Refuse what no model or measurement can have; what concerns generation is left to the library.

    Args:
        counts: further options that must be at least 1.

    Raises:
        OptionError: for the first option that is out of range, by its name.
    """
    sizes = ("layers", "dim", "heads", "kv_heads", "hidden", "vocab")
    names = [*sizes, *(f"draft_{size}" for size in sizes if size != "vocab"), "prompt_length", "new_tokens", "repeats"]
    for name in (*names, *counts, "threads"):
        value = getattr(arguments, name)
        least = min(value) if isinstance(value, list) else value
        if least is not None and least < 1:
            raise OptionError(f"--{name.replace('_', '-')} must be at least 1.", f"got {least}")
    if arguments.temperature <= 0:
        raise OptionError(
            "--temperature must be above 0.",
            f"got {arguments.temperature:g}",
            "all rows sample from the same distribution",
        )
    for prefix in ("", "draft_"):
        dim, heads, kv_heads = (getattr(arguments, prefix + size) for size in ("dim", "heads", "kv_heads"))
        option = "--" + prefix.replace("_", "-")
        if dim % (2 * heads):
            raise OptionError(f"{option}dim must be a multiple of 2 {option}heads.", f"got {dim} and {heads}")
        if heads % kv_heads:
            raise OptionError(f"{option}heads must be a multiple of {option}kv-heads.", f"got {heads} and {kv_heads}")
    check_device(arguments.device)


def check_device(name: str) -> None:
    """Raise OptionError unless it is a processor or a GPU that is there."""
    try:
        kind = torch.device(name).type
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise OptionError(f"Cannot use --device {name}.", why, "leave --device out to use cpu") from error
    if kind not in ("cpu", "cuda"):
        raise OptionError(f"Cannot use --device {name}.", "it is neither cpu nor cuda", "leave --device out to use cpu")


def check_least(arguments: argparse.Namespace, **least: int) -> None:
    """Raise OptionError for the first option that is below what is given as its ``least`` value."""
    for name, low in least.items():
        if getattr(arguments, name) < low:
            raise OptionError(f"--{name.replace('_', '-')} must be at least {low}.", f"got {getattr(arguments, name)}")


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> Tensor:
    """A prompt's tokens [1, P]. Raises InputError where there are none."""
    ids = tokenizer.encode(prompt).ids
    if not ids:
        raise InputError("The prompt is empty.", "a model needs at least one token to start from")
    return torch.tensor([ids])


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
