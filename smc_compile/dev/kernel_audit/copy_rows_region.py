"""The Triton kernel that copies rows of caches: in Triton's interpreter against its twin, and as machine code.

It is written by hand, so it is no part of a recorded region: a recorded cycle launches it once for all caches of a
shape.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from smc_compile.dev.kernel_audit.absent_device import Target
from smc_compile.dev.kernel_audit.audited_regions import AuditedKernel, AuditedRegion
from smc_compile.dev.kernel_audit.machine_code import MachineCode, compile_written
from smc_compile.dev.kernel_audit.recorded_sessions import AuditedPair
from smc_compile.dev.kernel_audit.verdict import RegionVerdict
from smc_compile.errors import SMCError
from smc_compile.kernels.copy_rows import BLOCK, copy_group, gather_rows

NAME = "copy_rows"
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def examine_copy_rows(launches: int, runs: int, seed: int, target: Target) -> AuditedRegion:
    """Its row of the table, with so many ``launches`` a cycle."""
    kernel = AuditedKernel(NAME, launches, used=True)
    try:
        verdict = interpreted(runs, seed)
        kernel.used = NAME not in verdict.unused
        kernel.code = machine_code(target)
    except SMCError as error:
        verdict, kernel.problem = RegionVerdict(problem=error.why or error.what), str(error)
    name = f"{NAME}, written by hand"
    return AuditedRegion(name, 1, [kernel], {}, verdict, verdict.agrees(torch.float32), {NAME: NAME})


def machine_code(target: Target) -> MachineCode:
    """For words of eight bytes, which is what the heads of any model consist of."""
    import triton.language as tl

    from smc_compile.kernels.copy_rows_kernel import copy_rows_kernel

    pointers = dict.fromkeys(("addresses", "source", "since", "used"), "*i64")
    numbers = dict.fromkeys(("heads", "head_words", "slot_words"), "i32")
    return compile_written(copy_rows_kernel, pointers | numbers, {"WORD": tl.int64, "BLOCK": BLOCK}, target)


def interpreted(runs: int, seed: int) -> RegionVerdict:
    """What another process found, in which Triton interprets.

    Raises:
        SMCError: when it ended otherwise.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", __name__, str(runs), str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise SMCError(f"{NAME} cannot be interpreted", last)
    beyond, needed = done.stdout.split()
    verdict = RegionVerdict(runs=runs, beyond=float(beyond), launches={NAME: 1})
    verdict.unused = set() if needed == "True" else {NAME}
    return verdict


def compare_with_twin(generator: torch.Generator) -> tuple[float, bool]:
    """One run on random shapes: the share of wrong entries, and whether anything had to change.

    Rows that others take from keep their own; slots before ``since`` and from ``used`` on are not to be touched.
    """

    def drawn(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    rows, heads, slots, width, sites = drawn(2, 9), drawn(1, 4), drawn(1, 300), drawn(1, 24), drawn(1, 4)
    dtype = TYPES[drawn(0, len(TYPES) - 1)]
    before = [torch.randn(rows, heads, slots, width, generator=generator).to(dtype) for _ in range(sites)]
    survives = torch.rand(rows, generator=generator) < 0.5
    survives[0] = True
    survivors = survives.nonzero()[:, 0]
    heirs = survivors[torch.randint(len(survivors), (rows,), generator=generator)]
    source, used = torch.where(survives, torch.arange(rows), heirs), drawn(0, slots)
    since = torch.randint(used + 1, (rows,), generator=generator)
    got, want = ([cache.clone() for cache in before] for _ in range(2))
    addresses = torch.tensor([cache.data_ptr() for cache in got])
    copy_group(got[0], addresses, source, since, torch.tensor(used))
    gather_rows(want, source)
    slot = torch.arange(slots)[:, None]
    moves = (slot >= since[:, None, None, None]) & (slot < used)  # [R, 1, S, 1]
    want = [torch.where(moves, w, b) for w, b in zip(want, before, strict=True)]
    wrong = max(float((g != w).double().mean()) for g, w in zip(got, want, strict=True))
    return wrong, not all(torch.equal(w, b) for w, b in zip(want, before, strict=True))


def main(runs: int, seed: int) -> None:
    """Print the largest share of wrong entries, and whether the kernel was needed in any run."""
    generator = torch.Generator().manual_seed(seed)
    found = [compare_with_twin(generator) for _ in range(runs)]
    print(max(wrong for wrong, _ in found), any(needed for _, needed in found))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))


def cache_shapes(pair: AuditedPair) -> int:
    """How many shapes the caches of target and draft have: keys and values of a model are alike."""
    return len({(c.n_kv_heads, c.dim // c.n_heads) for c in (pair.target, pair.draft)})
