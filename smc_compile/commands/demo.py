"""``smc-compile demo``: the shipped pair of models writes Python four ways."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from tokenizers import Tokenizer

from smc_compile.bench.contestants import contest
from smc_compile.bench.figures import make_rows
from smc_compile.bench.genealogy import check_picture_path, draw_ancestry
from smc_compile.bench.measure import Result, measure
from smc_compile.bench.report import check_json_path, write_json
from smc_compile.bench.tables import compile_line, number, rows_table
from smc_compile.bench.text_quality import TEXT_TITLES, Scores, add_scores, score_methods
from smc_compile.bench.what_pays import USUAL, chosen_for, of_method, what_pays
from smc_compile.commands.arguments import check_least, prompt_ids
from smc_compile.pairs.shipped import END, PROMPT, load_pair
from smc_compile.result import Generation

HELP = """\
Write Python with the shipped pair of models, four ways.

The plain loop in eager mode, the same loop compiled with a cache, exact speculation, and SMC, with the N and K that
method="auto" would take: their texts, their speed, how far each is from the target, and what pays on this machine. The
text of SMC is scored under the target beside true samples of it. A picture shows how the particles descend from each
other. Takes two to four minutes, compilation included.

  smc-compile demo
  smc-compile demo --n-particles 32 --lookahead 6
  smc-compile demo --prompt 'class Stack:'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``demo``."""
    parser.add_argument("--prompt", metavar="TEXT", help="text to continue (default: the head of a function)")
    parser.add_argument("--n-particles", type=int, metavar="N", help='particles (default: what "auto" takes)')
    parser.add_argument("--lookahead", type=int, metavar="K", help="draft tokens a cycle (default: the same)")
    parser.add_argument("--max-new-tokens", type=int, default=96, metavar="T", help="tokens to generate")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="temperature")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed")
    parser.add_argument("--repeats", type=int, default=3, metavar="R", help="timed rounds")
    parser.add_argument("--samples", type=int, default=128, metavar="M", help="sequences scored per method")
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--picture", default="demo-ancestry.svg", metavar="FILE", help="picture of the particles")


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Generate, measure, score, print, draw."""
    check_arguments(arguments)
    if arguments.prompt is None:
        arguments.prompt = PROMPT
    target, draft, tokenizer, _ = load_pair()
    ids = prompt_ids(tokenizer, arguments.prompt)
    choice = chosen_for(target, draft, ids, arguments.max_new_tokens, arguments.temperature)
    exact, smc = of_method(choice, "speculative"), of_method(choice, "smc")
    usual = (smc.n_particles, smc.lookahead) if smc else USUAL
    arguments.n_particles = usual[0] if arguments.n_particles is None else arguments.n_particles
    arguments.lookahead = usual[1] if arguments.lookahead is None else arguments.lookahead
    assert exact is not None
    contestants = contest(
        target,
        draft,
        ids,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        shapes=[(arguments.n_particles, arguments.lookahead)],
        eager_tokens=arguments.max_new_tokens,
        speculative=[(1, exact.lookahead)],
    )
    measured = measure(contestants, arguments.repeats, arguments.seed, console)
    if measured.interrupted:
        raise KeyboardInterrupt
    results = measured.results
    scores = score_methods(target, draft, ids, arguments, console)
    rows = add_scores(make_rows(results), scores)

    show_texts(results, arguments.prompt, ids.shape[1], tokenizer, console)
    console.print(rows_table(rows, [result.contestant.name for result in results], console.width))
    console.print()
    for line in [*what_pays(rows, choice, sum(w.nbytes for w in target.parameters())), "", *quality_lines(scores)]:
        console.print(line, highlight=False)
    console.print(compile_line(results), style="dim", highlight=False)
    picture = draw(results[-1].runs[0].generation, arguments, ids.shape[1], tokenizer)
    console.print(f"genealogy of the particles in {picture}", style="dim", highlight=False)
    if arguments.json:
        stored = {name: value for name, value in vars(arguments).items() if name != "run"}
        write_json(arguments.json, "demo", stored, rows)
        console.print(f"rows in {arguments.json}", style="dim", highlight=False)


def check_arguments(arguments: argparse.Namespace) -> None:
    """What the library does not check for us."""
    check_least(arguments, repeats=1, samples=2, max_new_tokens=2)
    check_json_path(arguments.json)
    check_picture_path(arguments.picture)


def quality_lines(scores: Scores) -> list[str]:
    """The comparison with true samples, in words and numbers."""
    smc, true = scores["smc"], scores["autoregressive"]
    difference = 100 * (smc.mean - true.mean) / abs(true.mean)
    error = 100 * (smc.stderr**2 + true.stderr**2) ** 0.5 / abs(true.mean)
    return [
        f"mean log-probability of a token under the target, {smc.sequences} sequences each: "
        f"SMC {smc.mean:.3f} ± {smc.stderr:.3f},",
        f"true target samples {true.mean:.3f} ± {true.stderr:.3f}, difference {difference:+.1f}% ± {number(error)}%",
    ]


def show_texts(
    results: Sequence[Result], prompt: str, prompt_length: int, tokenizer: Tokenizer, console: Console
) -> None:
    """A panel for each method's first timed sequence, the prompt dimmed, up to the end mark if there is one."""
    end = tokenizer.token_to_id(END)
    for result in results:
        tokens = result.runs[0].sequences[0, prompt_length:].tolist()
        written = tokenizer.decode(tokens[: tokens.index(end)] if end in tokens else tokens)
        text = Text(prompt.lstrip("\n"), style="dim").append(written.rstrip(), style="not dim")
        title = TEXT_TITLES[result.contestant.method]
        console.print(Panel(text, title=title, title_align="left", border_style="dim", width=min(100, console.width)))


def draw(
    generation: Generation | None, arguments: argparse.Namespace, prompt_length: int, tokenizer: Tokenizer
) -> Path:
    """The genealogy of the SMC text on show."""
    assert generation is not None  # SMC returns a Generation
    pieces = [tokenizer.decode([token]) for token in generation.sequences[0, prompt_length:].tolist()]
    return draw_ancestry(generation, arguments.picture, tokens=pieces)
