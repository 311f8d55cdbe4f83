"""What ``kernels --device`` prints: each region beside eager PyTorch and plain Inductor, kernel by kernel."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from smc_compile.dev.kernel_audit.regions import compared, short_name
from smc_compile.dev.kernel_audit.timing import Timed

NAME = 60  # columns of a kernel's name
SHOWN = 0.01  # share of a region's time from which on a kernel has a line of its own


def show_timed(timed: Timed, console: Console) -> None:
    """The region's heading, its three times, and its kernels."""
    console.print()
    console.print(compared(timed.name, timed.calls, timed.verdict, timed.agrees), highlight=False)
    if timed.kernels:
        console.print(times_line(timed), highlight=False)
        console.print(kernels_table(timed))


def times_line(timed: Timed) -> str:
    """What the region takes a call."""
    return (
        f"eager {timed.eager:.0f} us, plain Inductor {timed.inductor:.0f} us, ours [bold]{timed.ours:.0f} us[/bold]: "
        f"{timed.eager / timed.ours:.2f}x eager, {timed.inductor / timed.ours:.2f}x Inductor"
    )


def kernels_table(timed: Timed) -> Table:
    """One row for each kernel that counts, and one for the rest."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("kernel or op", no_wrap=True)
    for name in ("us a call", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    total = sum(timed.kernels.values())
    shown = {name: us for name, us in timed.kernels.items() if us >= SHOWN * total}
    for name, us in shown.items():
        table.add_row(short_name(name, NAME), f"{us:.1f}", f"{us / total:.0%}")
    if rest := total - sum(shown.values()):
        table.add_row(f"{len(timed.kernels) - len(shown)} more", f"{rest:.1f}", f"{rest / total:.0%}")
    return table


def timed_summary(regions: Sequence[Timed], seconds: float) -> str:
    """One line about a cycle: its regions one after the other."""
    ways = [[r.calls * us / 1e3 for us in (r.eager, r.inductor, r.ours)] for r in regions]
    eager, inductor, ours = map(sum, zip(*ways, strict=True)) if ways else (0.0, 0.0, 0.0)
    failed = [r.name for r in regions if not r.passes]
    parts = [
        f"{len(regions)} regions; those of a cycle: eager {eager:.2f} ms, Inductor {inductor:.2f}, ours {ours:.2f}"
    ]
    if ours:
        parts.append(f"{eager / ours:.2f}x eager and {inductor / ours:.2f}x Inductor")
    parts.append(f"[red]failed: {', '.join(failed)}[/red]" if failed else "[green]all results as eager[/green]")
    return "; ".join([*parts, f"{seconds:.0f} s"])
