"""What ``method="auto"`` would choose, and a sentence about what pays on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from smc_compile.auto.choice import Candidate, Choice, choose
from smc_compile.bench.figures import Row
from smc_compile.bench.tables import number
from smc_compile.inputs.processors import sort_processors
from smc_compile.inputs.requests import build_request, request_seeds, settings_of
from smc_compile.options import MAX_KL, Options
from smc_compile.program.from_model import program_for
from smc_compile.runtime.execution.memory import readable

USUAL = (8, 4)  # N and K that are shown where none keeps to the floor


def chosen_for(target: nn.Module, draft: nn.Module, ids: Tensor, new_tokens: int, temperature: float) -> Choice:
    """The choice of ``method="auto"`` for one request. Nothing is compiled for it but the models' graphs."""
    options = Options.parse({"draft": draft, "method": "auto"})
    settings = settings_of(len(ids), temperature=temperature)
    program = program_for(target, sort_processors([], list(settings), 0, device=ids.device), False, options, ids)
    return choose(program, build_request(ids, new_tokens, request_seeds(0, ids), settings=settings))


def of_method(choice: Choice, method: str) -> Candidate | None:
    """The best candidate of a method; None where none keeps to the floor."""
    return next((c for c in choice.candidates if c.method == method), None)


def what_pays(rows: Sequence[Row], choice: Choice, weight_bytes: int) -> list[str]:
    """What is the fastest here, what ``"auto"`` chose, and where that is otherwise. Rows of the one-token loop, exact
    speculation and SMC."""
    speeds = {row["method"]: row["tokens_per_second"] for row in rows}
    loop, exact, smc = speeds["autoregressive"], speeds["speculative"], speeds["smc"]
    far = next(row["kl_per_token"] for row in rows if row["method"] == "smc")
    near = far <= MAX_KL
    names = {"autoregressive": "the one-token loop", "speculative": "exact speculation", "smc": "SMC"}
    fastest = max((m for m in speeds if m in names and (m != "smc" or near)), key=lambda m: speeds[m])
    lines = [
        f"Fastest here within {MAX_KL:g} nats a token of the target: {names[fastest]}, {number(speeds[fastest])} "
        f"tokens/s ({number(speeds[fastest] / loop)}x the one-token loop).",
        f'method="auto" takes {names[choice.chosen.method]}, by a pilot and predicted costs.',
    ]
    if not near:
        lines.append(f"SMC with these N and K is {far:.3f} nats a token off, which is more: raise N or lower K.")
    if loop >= max(exact, smc):
        lines.append(
            f"The target's weights ({readable(weight_bytes)}) are read so fast here that drafting does not pay. It "
            "does where a target is larger, or memory slower: see smc-compile bench."
        )
    elif exact >= smc:
        lines.append("SMC pays more than that where N particles cost little more than one: with larger targets.")
    return lines
