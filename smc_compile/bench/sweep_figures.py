"""The figures of a sweep: one row per point, in the words of the JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median, median_low

from smc_compile.bench.ceilings import Ceilings, ModelSize, cycle_passes, least_seconds
from smc_compile.bench.figures import Row
from smc_compile.bench.sweep_axes import LETTERS
from smc_compile.bench.sweep_points import PARTS, Measured, Point, Timing


def sweep_rows(
    points: Sequence[Point], measured: Measured, sizes: tuple[ModelSize, ModelSize], ceilings: Ceilings
) -> list[Row]:
    """One row a point, in the words of the JSON file. The parts are those of the median round."""
    return [sweep_row(point, measured.timings, sizes, ceilings) for point in points]


def sweep_row(
    point: Point, timings: dict[Point, list[Timing]], sizes: tuple[ModelSize, ModelSize], ceilings: Ceilings
) -> Row:
    """The figures of one point; tokens/s count all requests together."""
    rounds = timings[point]
    middle = median_low(timing.seconds for timing in rounds)
    typical = next(timing for timing in rounds if timing.seconds == middle)
    batch, tokens = point.requests, point.requests * (point.lookahead + 1)
    rows, prompts = batch * point.n_particles, batch * point.prompt_length
    passes = cycle_passes(*sizes, rows, point.lookahead, prompts, point.new_tokens)
    bound = least_seconds(ceilings, passes)
    loops = timings.get(point.loop, [])
    loop = batch / median_low(timing.seconds for timing in loops) if loops else None
    return {
        **point._asdict(),
        "repeats": len(rounds),
        "cycles": typical.cycles,
        "tokens_per_second": tokens / middle,
        "tokens_per_second_min": tokens / max(timing.seconds for timing in rounds),
        "tokens_per_second_max": tokens / min(timing.seconds for timing in rounds),
        "bound_tokens_per_second": tokens / bound,
        "loop_tokens_per_second": loop,
        "ms_per_cycle": 1e3 * middle,
        "predicted_ms_per_cycle": None if typical.predicted is None else 1e3 * typical.predicted,
        **{f"{part}_ms": 1e3 * typical.parts[part] if typical.parts else None for part in PARTS},
        "bound_ms_per_cycle": 1e3 * bound,
        "share_of_bound": bound / middle,
        "bytes_per_cycle": sum(one.bytes for one in passes),
        "prompt_cache_bytes": typical.prompt_bytes,
        "suffix_cache_bytes": typical.suffix_bytes,
        "resamplings_per_cycle": median(timing.resamplings / timing.cycles for timing in rounds),
        "compile_seconds": rounds[0].compile_seconds,
    }


def best_lookaheads(rows: Sequence[Row]) -> list[str]:
    """The K with the most tokens a second as predicted and as measured, for each set of rows with several K."""

    def fastest(mine: Sequence[Row], milliseconds: str) -> int:
        return int(max(mine, key=lambda row: (row["lookahead"] + 1) / row[milliseconds])["lookahead"])

    others = [name for name in Point._fields if name != "lookahead"]
    moving = [name for name in others if len({row[name] for row in rows}) > 1]
    groups: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in moving), []).append(row)
    return [
        " ".join(f"{LETTERS[name]}={value}" for name, value in zip(moving, key, strict=True))
        + f"{' ' if key else ''}{fastest(mine, 'predicted_ms_per_cycle')} and {fastest(mine, 'ms_per_cycle')}"
        for key, mine in groups.items()
        if len(mine) > 1 and len({row["lookahead"] for row in mine}) > 1
    ]
