"""The torch.compile backend: ``torch.compile(decode, backend="smc", options={...})``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from smc_compile.errors import LoopError, OptionError, SMCError
from smc_compile.options import Options
from smc_compile.passes.recover_loop import DecodeLoop, is_draw, recover_loop
from smc_compile.recovered import program_for

log = logging.getLogger(__name__)
NO_LOOP = (
    "no decode loop in this graph (%d nodes): compiled by Inductor unchanged. If you wrote one, Dynamo could not trace it "
    "whole (a branch on a token?): compile with fullgraph=True or @smc_compile.decode to see why"
)


def smc(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Any = None, mode: str | None = None
) -> Callable[..., Any]:
    """Compile the decode loop in ``gm``; a graph without sampling goes to Inductor unchanged, with one logged line.

    Errors are raised when the compiled function is called, as themselves: Dynamo would wrap what a backend raises.
    """
    try:
        if mode is not None:
            raise OptionError(f"backend 'smc' has no mode {mode!r}", "modes belong to Inductor", "pass options={...}")
        parsed = Options.parse(options)
        loop = find_loop(gm, example_inputs)
    except SMCError as error:
        return _raiser(error)
    if loop is None:
        log.warning(NO_LOOP, len(gm.graph.nodes))
        return torch._dynamo.lookup_backend("inductor")(gm, list(example_inputs))

    def run(*arguments: Any) -> Any:
        outputs, _ = program_for(loop, arguments, parsed).run(loop, arguments, loop.trips)
        return outputs

    return run


def find_loop(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> DecodeLoop | None:
    """Recover the loop; a draw in a graph that Dynamo had to break is an error, not a graph without a loop."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    loop = recover_loop(gm, example_inputs)
    if loop is None and getattr(reason, "graph_break", False) and any(is_draw(node) for node in gm.graph.nodes):
        raise LoopError(
            "the decode loop has Python control flow that depends on data, or code that Dynamo cannot trace",
            str(reason.reason).strip().splitlines()[0] if reason else "",
            "remove the branch: pass eos_token_id instead of `if token == eos: break`, and keep prints and .item() outside",
        )
    return loop


def _raiser(error: SMCError) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail
