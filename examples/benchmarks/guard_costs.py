"""What Dynamo's guards cost a decode step, and what each way around them risks.

    python examples/benchmarks/guard_costs.py [--layers 2 12 24] [--whole] [--backend inductor]

One thread runs a step of a tiny decoder under each way in turn, round after round, so that whatever else the machine
does meets all ways alike. The table shows the median over the rounds of the processor time of a step. Layers are so
small that little but the calls is left. As in sessions, a few layers are one region that has all weights and caches as
arguments (``whole``); from six on, one compiled layer is called once for each (``layered``).
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional as F

from smc_compile.bench.report import cpu_name
from smc_compile.passes.lower.outline_layers import MIN_REPEATS
from smc_compile.runtime.algorithms.tensors import mark_dynamic
from smc_compile.runtime.execution.admitted_code import with_own_code
from smc_compile.runtime.execution.region import begin_run, compile_function
from smc_compile.runtime.state.region_types import Places, unify

ROWS, HEADS, WIDTH, HIDDEN_WIDTH, VOCABULARY = 4, 2, 16, 64, 64  # R, H, d, width of the MLP, V; one request
PROMPT, SUFFIX = 16, 24  # P, S

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


class Way(NamedTuple):
    """One way to call compiled code."""

    compile: Compile
    unguarded_run: bool = False  # the stance holds for all timed calls, as it would for the cycles of a run


def compiled(backend: str, **options: Any) -> Compile:
    """torch.compile of a copy: Dynamo keeps its code by code object, and the ways must not share it."""

    def compile_copy(function: Callable[..., Any]) -> Callable[..., Any]:
        own = with_own_code(function, "step")
        return torch.compile(own, backend=backend, fullgraph=True, dynamic=False, options=dict(options) or None)

    return compile_copy


def stance_each_call(backend: str) -> Compile:
    def compile_unguarded(function: Callable[..., Any]) -> Callable[..., Any]:
        guarded, warm = compiled(backend)(function), []

        def call(*arguments: Any) -> Any:
            if not warm:
                warm.append(True)
                return guarded(*arguments)
            with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
                return guarded(*arguments)

        return call

    return compile_unguarded


def ways(backend: str) -> dict[str, Way]:
    """Every way by its name in the table."""
    return {
        "not compiled": Way(lambda function: function),
        "guards": Way(compiled(backend)),
        "stance, each call": Way(stance_each_call(backend)),
        "stance, whole run": Way(compiled(backend), unguarded_run=True),
        "filter: no modules": Way(
            compiled(backend, guard_filter_fn=torch.compiler.skip_guard_on_all_nn_modules_unsafe)
        ),
        "filter: tensors only": Way(compiled(backend, guard_filter_fn=torch.compiler.keep_tensor_guards_unsafe)),
        "filter: no guards": Way(compiled(backend, guard_filter_fn=torch.compiler.skip_all_guards_unsafe)),
        "admitted code": Way(lambda function: compile_function(function, "step", backend)),
    }


# ---- a step of a decoder, with arguments as sessions have them -------------------------------------------------------


def layer(
    x: Tensor,  # [R, 1, H*d]
    positions: Tensor,  # [1, 1]
    slots: Tensor,  # [1]
    keys: Tensor,  # [1, P+S]
    prompt_keys: Tensor,  # [1, H, P, d]
    prompt_values: Tensor,
    suffix_keys: Tensor,  # [R, H, S, d], changed in place
    suffix_values: Tensor,
    *weights: Tensor,
) -> Tensor:
    """Attention over prompt and suffix, then an MLP, as a Llama has them without rotation: [R, 1, H*d]."""
    norm, to_query, to_key, to_value, to_out, mlp_norm, gate, up, down = weights
    heads = [
        F.linear(F.rms_norm(x, x.shape[-1:], norm), w).view(ROWS, HEADS, 1, WIDTH) for w in (to_query, to_key, to_value)
    ]
    suffix_keys.index_copy_(2, slots, heads[1])
    suffix_values.index_copy_(2, slots, heads[2])
    all_keys = torch.cat([prompt_keys.expand(ROWS, -1, -1, -1), suffix_keys], 2)
    all_values = torch.cat([prompt_values.expand(ROWS, -1, -1, -1), suffix_values], 2)
    hidden = keys[:, None] > positions[..., None]  # [1, 1, P+S]
    scores = (heads[0] @ all_keys.transpose(2, 3)).masked_fill(hidden, float("-inf"))
    x = x + F.linear((scores.softmax(-1) @ all_values).reshape(ROWS, 1, -1), to_out)
    inner = F.rms_norm(x, x.shape[-1:], mlp_norm)
    return x + F.linear(F.silu(F.linear(inner, gate)) * F.linear(inner, up), down)


WEIGHTS = 9  # of a layer


def head(tokens: Tensor, embedding: Tensor) -> Tensor:
    return F.embedding(tokens, embedding)


def tail(x: Tensor, embedding: Tensor) -> Tensor:
    return F.linear(x[:, -1], embedding)


def of_layer(
    i: int, places: Places, prompts: Sequence[Tensor], state: Sequence[Tensor], weights: Sequence[Tensor]
) -> Any:
    """What layer i reads besides x."""
    own = weights[1 + i * WEIGHTS : 1 + (i + 1) * WEIGHTS]
    return *places, *prompts[2 * i : 2 * i + 2], *state[2 * i : 2 * i + 2], *own


def whole(way: Compile) -> Callable[..., Tensor]:
    """The step as one region."""

    def step(tokens: Tensor, places: Places, state: list[Tensor], context: Any) -> Tensor:
        prompts, weights = context
        unify(prompts, 2)
        unify(state, 2)
        x = head(tokens, weights[0])
        for i in range(len(state) // 2):
            x = layer(x, *of_layer(i, places, prompts, state, weights))
        return tail(x, weights[0])

    return way(step)


def layered(way: Compile) -> Callable[..., Tensor]:
    """The step as compiled pieces."""
    first, repeated, last = way(head), way(layer), way(tail)

    def step(tokens: Tensor, places: Places, state: list[Tensor], context: Any) -> Tensor:
        prompts, weights = context
        x = first(tokens, weights[0])
        for i in range(len(state) // 2):
            x = repeated(x, *of_layer(i, places, prompts, state, weights))
        return last(x, weights[0])

    return step


def arguments_of(layers: int) -> tuple[Any, ...]:
    """Tokens, places, suffixes, and what particles share: prompts and weights."""
    model = HEADS * WIDTH
    shapes = [(model,), *[(model, model)] * 4, (model,), *[(HIDDEN_WIDTH, model)] * 2, (model, HIDDEN_WIDTH)]
    weights = [torch.randn(VOCABULARY, model)] + [torch.randn(shape) / 8 for _ in range(layers) for shape in shapes]
    prompts = [mark_dynamic(torch.randn(1, HEADS, PROMPT, WIDTH), 2) for _ in range(2 * layers)]
    state = [mark_dynamic(torch.zeros(ROWS, HEADS, SUFFIX, WIDTH), 2) for _ in range(2 * layers)]
    keys = mark_dynamic(torch.arange(PROMPT + SUFFIX)[None], 1)
    places = Places(torch.tensor([[PROMPT]]), torch.tensor([0]), keys)
    return torch.zeros(ROWS, 1, dtype=torch.int64), places, state, (prompts, weights)


# ---- seconds ---------------------------------------------------------------------------------------------------------


def measured(
    form: Callable[[Compile], Callable[..., Tensor]],
    layers: int,
    backend: str,
    rounds: int,
    calls: int,
    console: Console,
) -> dict[str, float]:
    """Median microseconds of a step under each way."""
    arguments, found = arguments_of(layers), ways(backend)
    title = f"{layers} layers, {form.__name__}"
    steps: dict[str, Callable[..., Tensor]] = {}
    expected = form(found["not compiled"].compile)(*arguments)
    torch.compiler.reset()
    begin_run()
    for name, way in track(found.items(), f"{title}: compiling", console=console, transient=True):
        steps[name] = form(way.compile)
        for _ in range(3):
            torch.testing.assert_close(steps[name](*arguments), expected, msg=name)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in track(range(rounds), f"{title}: timing", console=console, transient=True):
        for name, step in steps.items():
            with unguarded(found[name].unguarded_run):
                start = time.thread_time()
                for _ in range(calls):
                    step(*arguments)
                seconds[name].append((time.thread_time() - start) / calls)
    return {name: 1e6 * statistics.median(times) for name, times in seconds.items()}


@contextlib.contextmanager
def unguarded(holds: bool) -> Iterator[None]:
    with torch.compiler.set_stance(skip_guard_eval_unsafe=True) if holds else contextlib.nullcontext():
        yield


# ---- hazards ---------------------------------------------------------------------------------------------------------


def double(x: Tensor) -> Tensor:
    return x * 2


def changes() -> dict[str, Tensor]:
    """What a caller may hand over after float32 [4, 8] in rows, whose second axis is marked dynamic."""
    return {
        "other length": mark_dynamic(torch.randn(4, 12), 1),
        "more rows": torch.randn(5, 8),
        "other strides": torch.randn(8, 4).t(),
        "float64": torch.randn(4, 8, dtype=torch.float64),
    }


def outcome(way: Way, x: Tensor) -> str:
    """What becomes of a call with ``x`` after one that compiled for other arguments."""
    torch.compiler.reset()
    begin_run()
    function = way.compile(double)
    for _ in range(2):
        function(mark_dynamic(torch.randn(4, 8), 1))
    before = counters["stats"]["unique_graphs"]
    with unguarded(way.unguarded_run):
        try:
            result = function(x)
        except Exception as error:
            return type(error).__name__
    again = counters["stats"]["unique_graphs"] != before
    right = result.shape == x.shape and result.dtype == x.dtype and torch.equal(result, 2 * x)
    return ("right" if right else "WRONG") + (", again" if again else "")


def hazards(backend: str) -> Table:
    """One row a way: what becomes of each change. "again" stands for another compilation."""
    table = plain_table("way", *changes())
    for name, way in ways(backend).items():
        table.add_row(name, *(outcome(way, x) for x in changes().values()))
    return table


@torch.no_grad()
def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 12, 24])
    parser.add_argument("--whole", action="store_true", help="one region, however many layers")
    parser.add_argument("--backend", default="inductor", help="of torch.compile: inductor, aot_eager, eager")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=40, help="in a round, of each way")
    arguments = parser.parse_args(given)
    console = Console()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64
    columns = {}
    for layers in arguments.layers:
        form = whole if arguments.whole or layers < MIN_REPEATS else layered
        found = measured(form, layers, arguments.backend, arguments.rounds, arguments.calls, console)
        columns[f"{layers} layers,\n{form.__name__}"] = found
    where = f"{cpu_name()}, 1 thread, torch {torch.__version__}, {arguments.backend}, {datetime.now(UTC):%Y-%m-%d}"
    console.print(f"Microseconds of a step: {where}", seconds_table(columns), sep="\n")
    console.print("A call with other arguments than those compiled for:", hazards(arguments.backend), sep="\n")


def seconds_table(columns: dict[str, dict[str, float]]) -> Table:
    """One row a way; ``columns`` gives microseconds by title and way."""
    table = plain_table("way", *columns)
    for name in next(iter(columns.values())):
        table.add_row(name, *(f"{column[name]:,.0f}" for column in columns.values()))
    return table


def plain_table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for title in others:
        table.add_column(title, justify="right")
    return table


if __name__ == "__main__":
    main()
