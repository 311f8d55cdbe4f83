"""Run the test suite with several versions of Python and torch, each in an environment of its own.

    python examples/version_matrix.py python3.11=2.13.0 python3.12=2.11.0 python3.13=2.14.1 [-- pytest arguments]

Each pair is an interpreter and a version of torch. The table says how the suite ended. An environment takes 4 GB where
torch is a CUDA build; it is removed when its run has ended.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
SHOW = "import sys, torch; print(sys.version.split()[0], torch.__version__)"


def run_suite(interpreter: str, torch: str, arguments: list[str]) -> tuple[str, str, float]:
    """What ran, how the suite ended, and after how many seconds, installation included."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder, "bin", "python")
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
        for wanted in ([f"torch=={torch}"], ["-e", f"{ROOT}[test]"]):
            subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True)
        found = subprocess.run([python, "-c", SHOW], capture_output=True, text=True, check=True).stdout.strip()
        done = subprocess.run([python, "-m", "pytest", *arguments], cwd=ROOT, capture_output=True, text=True)
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        print("\n".join(failed), flush=True)
    return found, done.stdout.strip().splitlines()[-1], time.monotonic() - start


def main() -> None:
    given, _, arguments = (" ".join(sys.argv[1:])).partition(" -- ")
    pairs = [pair.split("=", 1) for pair in given.split()]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise SystemExit(__doc__)
    table = Table("Python, torch", "the suite", "minutes")
    for interpreter, torch in pairs:
        print(f"{interpreter}, torch {torch} ...", flush=True)
        what, end, seconds = run_suite(interpreter, torch, arguments.split())
        table.add_row(what, end, f"{seconds / 60:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
