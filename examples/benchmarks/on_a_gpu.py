"""Measure everything that needs a GPU, in one go: results, times of kernels, speed of whole generations.

    python examples/benchmarks/on_a_gpu.py FOLDER [--minutes 9]

Each step is a command of its own, ended when its time is over; one that fails does not hold up the rest. What it
printed and its rows are kept in FOLDER, with ``steps.json``: date, device, commands, exit status and seconds.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

LLAMA = "--device cuda --preset llama-8b-1b --dtype bfloat16 --prompt-length 256"
STEPS = {  # what matters most comes first
    "kernels_small": "kernels --device cuda",
    "bench_336m": "bench --device cuda --repeats 2",
    "bench_llama": f"bench {LLAMA} --n-particles 8 8 32 --lookahead 8 4 4 --skip-assisted --repeats 2",
    "kernels_llama": "kernels --device cuda --preset llama-8b --dtype bfloat16 --n-particles 8 --lookahead 8",
    "sweep_llama": f"sweep {LLAMA.replace(' --prompt-length 256', '')} --lookahead 4",
    "bench_llama_autotuned": f"bench {LLAMA} --n-particles 8 --lookahead 8 --compiler max-autotune --skip-eager "
    "--skip-transformers --skip-speculative",
    "kernels_llama_autotuned": "kernels --device cuda --preset llama-8b --dtype bfloat16 --n-particles 8 --lookahead 8 "
    "--compiler max-autotune",
}


def run_step(name: str, options: str, folder: Path, seconds: float) -> dict[str, object]:
    """One command: its exit status (None when its time was over) and how long it took."""
    command = [sys.executable, "-m", "smc_compile", *options.split(), "--json", str(folder / f"{name}.json")]
    start = time.perf_counter()
    with (folder / f"{name}.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
            end(process)
    return {"command": f"smc-compile {options}", "status": status, "seconds": round(time.perf_counter() - start, 1)}


def end(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does, upon which commands keep what they have measured; if that does not help, at once."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main(given: Sequence[str] | None = None) -> int:
    """Run all steps; 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where results go; made where it is missing")
    parser.add_argument("--minutes", type=float, default=9, help="for all steps together")
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS), help="these steps")
    arguments = parser.parse_args(given)
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * arguments.minutes
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "steps": {},
    }
    for name in arguments.only:
        left = deadline - time.monotonic()
        if left <= 0:
            print(f"{name}: not begun, the time is over")
            continue
        print(f"{name}: {STEPS[name]}", flush=True)
        report["steps"][name] = run_step(name, STEPS[name], arguments.folder, left)
        (arguments.folder / "steps.json").write_text(json.dumps(report, indent=1) + "\n")
        print((arguments.folder / f"{name}.txt").read_text()[-4000:], flush=True)
    return int(
        any(step["status"] != 0 for step in report["steps"].values()) or len(report["steps"]) < len(arguments.only)
    )


if __name__ == "__main__":
    raise SystemExit(main())
