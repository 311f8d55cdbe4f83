"""The picture of speed against error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smc_compile.bench.figures import Row
from smc_compile.bench.genealogy import ALIVE, DEAD, INK, MUTED, RETURNED
from smc_compile.bench.plots import STYLE, panels, scale_speed

COLOURS = {"autoregressive": DEAD, "speculative": MUTED, "smc": ALIVE, "auto": RETURNED}
WORDS = {"autoregressive": "one-token loop", "speculative": "exact speculation", "smc": "SMC", "auto": "auto"}
APART = 0.06  # of a speed: nearer labels would overlap
LEAST = 1e-3  # nats a token: nearer ones stand on the left edge with the exact methods


def draw_quality(rows: Sequence[Row], path: str | Path, title: str, subtitle: str) -> None:
    """Write the picture: nats a token from the target on the x axis, tokens/s on the y axis. Rows without a bound,
    whose blocks were dropped, are left out."""
    from matplotlib import rc_context

    shown = [row for row in rows if not math.isnan(row["kl_per_token"])]
    with rc_context(STYLE):
        figure, (panel,) = panels(1)
        scale_speed(panel, [row["tokens_per_second"] for row in shown])
        most = max([0.02, *(row["kl_per_token"] + row["kl_per_token_stderr"] for row in shown)])
        panel.set_xscale("symlog", linthresh=LEAST, linscale=0.3)
        panel.set_xlim(-0.3 * LEAST, 2.2 * most)
        labelled: list[tuple[int, float]] = []
        for cut in sorted({row["max_divergence"] or 1.0 for row in shown if row["method"] == "smc"}):
            own = [r for r in shown if r["method"] == "smc" and (r["max_divergence"] or 1.0) == cut]
            line(panel, own, cut, labelled)
        for row in shown:
            if row["method"] != "smc":
                point(panel, row)
        ticks = [0, *(10.0**e for e in range(-3, 2) if 10.0**e < 2.2 * most)]
        panel.set_xticks(ticks, ["exact", *(f"{tick:g}" for tick in ticks[1:])])
        panel.minorticks_off()
        panel.set_xlabel("nats a token from the target, a bound (further right is worse)")
        panel.set_title("tokens/s", loc="left", size=10, color=INK, pad=10)
        figure.text(0.02, 0.955, title, size=14, weight="bold", va="center")
        figure.text(0.02, 0.895, subtitle, size=9, color=MUTED, va="center")
        figure.savefig(path, dpi=160, facecolor="white")


def line(panel: Any, rows: Sequence[Row], cut: float, labelled: list[tuple[int, float]]) -> None:
    """SMC with more and more particles, whose blocks are cut at one divergence. ``labelled``: which N has a label at
    which speed."""
    rows = sorted(rows, key=lambda row: (row["lookahead"], row["n_particles"]))
    x, y = [max(row["kl_per_token"], 0.0) for row in rows], [row["tokens_per_second"] for row in rows]
    whole = cut >= 1
    panel.plot(x, y, color=ALIVE, lw=1.6, ls=(0, (3, 2)) if whole else "-", zorder=2)
    panel.errorbar(x, y, xerr=[row["kl_per_token_stderr"] for row in rows], fmt="none", ecolor=ALIVE, elinewidth=1)
    panel.plot(x, y, color=ALIVE, marker="o", ms=6, lw=0, mfc="white" if whole else ALIVE, zorder=3)
    for row, a, b in zip(rows, x, y, strict=True):
        if any(abs(b - other) < APART * b for name, other in labelled if name == row["n_particles"]):
            continue  # it would stand on the label of the same N on another line
        labelled.append((row["n_particles"], b))
        panel.annotate(
            f"N={row['n_particles']}" + ("" if len({r["lookahead"] for r in rows}) == 1 else f" K={row['lookahead']}"),
            (a, b), textcoords="offset points", xytext=(0, 9 if whole else -15), ha="center", size=8.5, color=INK,
        )  # fmt: skip
    last = max(zip(x, y, strict=True))
    panel.annotate(
        "SMC, whole blocks" if whole else f"SMC, cut at {cut:g}",
        last, textcoords="offset points", xytext=(10, 0), va="center", size=9.5, color=ALIVE,
    )  # fmt: skip


def point(panel: Any, row: Row) -> None:
    """A way that is exact, or keeps to a floor."""
    x, y, colour = max(row["kl_per_token"], 0.0), row["tokens_per_second"], COLOURS[row["method"]]
    panel.errorbar([x], [y], xerr=[row["kl_per_token_stderr"]], fmt="none", ecolor=colour, elinewidth=1)
    panel.plot([x], [y], color=colour, marker="D", ms=7, zorder=4)
    auto = row["method"] == "auto"
    panel.annotate(
        WORDS[row["method"]], (x, y), textcoords="offset points", xytext=(0, 12) if auto else (10, 0),
        ha="center" if auto else "left", va="center", size=9.5, color=INK,
    )  # fmt: skip
