"""What ``smc-compile kernels`` prints: a table of kernels for each region, times with --device, and a last line."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from smc_compile.dev.kernel_audit.audited_regions import AuditedKernel, AuditedRegion, compared, short_name
from smc_compile.dev.kernel_audit.time_regions import Timed
from smc_compile.dev.kernel_audit.written_kernels import KernelCheck

TIMED_NAME = 60  # columns of a kernel's name beside its time
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
        table.add_row(short_name(name, TIMED_NAME), f"{us:.1f}", f"{us / total:.0%}")
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


LISTED_NAME = 43  # columns of a kernel's name beside its machine code


def show_region(region: AuditedRegion, console: Console) -> None:
    """The region's heading, table and notes."""
    console.print()
    console.print(compared(region.name, region.calls, region.verdict, region.agrees), highlight=False)
    console.print(region_table(region))
    for line in notes(region):
        console.print(f"  {line}", highlight=False, markup=False)


def region_table(region: AuditedRegion) -> Table:
    """One row a kernel, and one for each op of a library."""
    compiled = any(kernel.code for kernel in region.kernels)
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for name, justify in (("kernel", "left"), ("a cycle", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name in ("regs", "spills", "shared", "loads", "stores") if compiled else ():
        table.add_column(name, justify="right")
    table.add_column("used", no_wrap=True)
    for kernel in region.kernels:
        numbers = machine_numbers(kernel) if compiled else []
        table.add_row(short_name(kernel.name, LISTED_NAME), str(kernel.launches), *numbers, checked(kernel))
    for name, count in region.library.items():
        table.add_row(f"library  {name}", str(count), *([""] * 5 if compiled else []), "")
    return table


def machine_numbers(kernel: AuditedKernel) -> list[str]:
    code = kernel.code
    if code is None:
        return [""] * 5
    return [str(n) for n in (code.registers, code.spills, code.shared, code.loads, code.stores)]


def checked(kernel: AuditedKernel) -> str:
    if kernel.problem:
        return "[red]does not compile[/red]"
    if kernel.launches == 0:
        return "first cycle" if kernel.used else "[red]never launched[/red]"
    return "yes" if kernel.used else "[red]output unused[/red]"


def hand_table(outcomes: list[KernelCheck]) -> Table:
    """One row a kernel."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("kernel", no_wrap=True)
    for name in ("runs", "error", "us", "Inductor", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("timed at", no_wrap=True)
    for o in outcomes:
        error = f"{o.error:.0e}" if o.passes else f"[red]{o.error:.0e}, not {o.allowed:.0e}[/red]"
        ratio = f"{o.compiled_us / o.kernel_us:.1f}x"
        table.add_row(o.name, str(o.runs), error, f"{o.kernel_us:.0f}", f"{o.compiled_us:.0f}", ratio, o.where)
    return table


def notes(region: AuditedRegion) -> list[str]:
    """Why a kernel did not compile."""
    return [f"{short_name(k.name, LISTED_NAME)}: {k.problem}" for k in region.kernels if k.problem]


def summary(regions: list[AuditedRegion], outcomes: list[KernelCheck], seconds: float) -> str:
    """One line about everything."""
    kernels = [kernel for region in regions for kernel in region.kernels]
    unique = {source for region in regions for source in region.sources.values()}
    failed = [r.name for r in regions if not r.passes] + [o.name for o in outcomes if not o.passes]
    codes = [kernel.code for kernel in kernels if kernel.code]
    launches, calls = sum(k.launches for k in kernels), sum(sum(r.library.values()) for r in regions)
    parts = [
        f"{len(regions)} regions, {len(kernels)} kernels ({len(unique)} different), "
        f"{launches} launches and {calls} library calls a cycle"
    ]
    if codes:
        parts.append(f"at most {max(c.registers for c in codes)} registers, {sum(c.spills > 0 for c in codes)} spill")
    parts.append(f"[red]failed: {', '.join(failed)}[/red]" if failed else "[green]all checks pass[/green]")
    return "; ".join([*parts, f"{seconds:.0f} s"])
