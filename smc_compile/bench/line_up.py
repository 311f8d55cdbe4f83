"""Who takes part in a bench: ours, the loops of transformers where they can be built, and further peers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial

from rich.console import Console
from torch import Tensor

from smc_compile.bench.ceilings import ModelSize, PassCost, costs, loop_passes
from smc_compile.bench.contestants import contest
from smc_compile.bench.measure import Contestant, reason
from smc_compile.bench.peer_transformers import assisted_loop, library_loop
from smc_compile.pairs.llama import Llama, cache_numbers

EAGER_TOKENS = 4  # a forward over the whole prompt for each
# (target, ids [1, P], arguments, what a token must read and multiply) -> somebody else's loop on the target's weights
Peer = Callable[[Llama, Tensor, argparse.Namespace, list[PassCost]], Contestant]
Builder = Callable[[], Contestant]


def all_contestants(
    target: Llama,
    draft: Llama,
    ids: Tensor,
    arguments: argparse.Namespace,
    shapes: list[tuple[int, int]],
    console: Console,
    further_peers: Mapping[str, Peer],
) -> tuple[list[Contestant], dict[str, str]]:
    """Everything that takes part, in the order of the table, and the peers that cannot, with the reason."""
    sizes = costs(target, cache_numbers(target.config)), costs(draft, cache_numbers(draft.config))
    lengths = sorted({k for _, k in shapes}, reverse=True)
    ours = contest(
        target,
        draft,
        ids,
        max_new_tokens=arguments.new_tokens,
        temperature=arguments.temperature,
        shapes=shapes,
        eager_tokens=None if arguments.skip_eager else min(EAGER_TOKENS, arguments.new_tokens),
        speculative=[] if arguments.skip_speculative else [(n, k) for k in lengths for n in arguments.chains],
        sizes=sizes,
        compiler=arguments.compiler,
        auto=not arguments.skip_auto,
    )
    peers, missing = build_peers(peer_builders(target, draft, ids, arguments, sizes[0], further_peers), console)
    first = 0 if arguments.skip_eager else 1
    return [*ours[:first], *peers, *ours[first:]], missing


def peer_builders(
    target: Llama,
    draft: Llama,
    ids: Tensor,
    arguments: argparse.Namespace,
    size: ModelSize,
    further_peers: Mapping[str, Peer],
) -> dict[str, Builder]:
    """How to build the loops of others that were asked for, by name."""
    request = {"new_tokens": arguments.new_tokens, "temperature": arguments.temperature}
    passes = loop_passes(size, ids.shape[1], arguments.new_tokens)
    builders: dict[str, Builder] = {}
    if not arguments.skip_transformers:
        builders["transformers"] = lambda: library_loop(target, ids, **request, passes=passes)
        if not arguments.skip_assisted:
            tokens = arguments.assistant_tokens
            builders["assisted"] = lambda: assisted_loop(target, draft, ids, **request, assistant_tokens=tokens)
    return builders | {name: partial(peer, target, ids, arguments, passes) for name, peer in further_peers.items()}


def build_peers(builders: dict[str, Builder], console: Console) -> tuple[list[Contestant], dict[str, str]]:
    """The peers that could be built, and why the others could not."""
    peers: list[Contestant] = []
    missing: dict[str, str] = {}
    for name, build in builders.items():
        with console.status(f"preparing {name}"):
            try:
                peers.append(build())
            except Exception as error:  # whatever somebody else's code raises
                missing[name] = reason(error)
    return peers, missing
