"""The labels of cells, on small graphs written by hand."""

from __future__ import annotations

import pytest
import torch

from smc_compile.passes.loop.concretise import concretise
from smc_compile.passes.loop.token_labels import Layouts, interpret

B, P = 2, 3


def layouts_of(fn) -> Layouts:
    """Interprets fn(ids [B, P], x [B, 5]); tokens in it are drawn by x.argmax(-1)."""
    found: list[Layouts] = []

    def backend(gm, example_inputs):
        nodes = list(concretise(gm, example_inputs).graph.nodes)
        prompt = next(node for node in nodes if "ids" in node.name)
        found.append(interpret(nodes, prompt))
        return gm.forward

    torch._dynamo.reset()

    def whole(ids, x):
        return fn(ids, x), ids.clone()  # the prompt is in the graph even if fn leaves it aside

    torch.compile(whole, backend=backend, fullgraph=True)(torch.zeros(B, P, dtype=torch.long), torch.randn(B, 5))
    return found[0]


def columns(layouts: Layouts, which: int = 0) -> list[str] | None:
    """The first output in words: prompt column j is ``pj``, a token ``t``, a constant itself."""
    output = layouts.nodes[-1].args[0][which]
    if output not in layouts.outputs:
        return None
    labels = layouts.outputs[output]
    first = layouts.history(())[0]
    rows = []
    for row in labels.reshape(B, -1).tolist():
        rows.append([])
        for cell in row:
            source = layouts.source(cell)
            if source is None:
                rows[-1].append(str(cell))
            elif source is layouts.prompt:
                at = cell - first
                assert at >> 24 == len(rows) - 1
                rows[-1].append(f"p{at & 0xFFFFFF}")
            else:
                rows[-1].append("t" if layouts.is_token(cell & ~(0x3FFF << 24)) else "?")
    assert rows[0] == rows[1]
    return rows[0]


def cat(ids, x):
    return torch.cat([ids, x.argmax(-1, keepdim=True)], 1)


def negative_slices(ids, x):
    return cat(ids, x)[:, -2:], cat(ids, x)[:, :-1]


def view_written_later(ids, x):
    buf = torch.zeros(B, P + 2, dtype=torch.long)
    view = buf[:, 1:]
    buf[:, :P] = ids
    view[:, -1] = x.argmax(-1)
    return buf


def copy_before_write(ids, x):
    buf = ids.clone()
    old = buf.clone()
    buf[:, 0] = 7
    return old


def scatter(ids, x):
    return torch.cat([ids, ids], 1).scatter(1, torch.full((B, 1), 4), x.argmax(-1, keepdim=True))


def scatter_in_place(ids, x):
    buf = ids.new_full((B, 4), 9)
    buf.scatter_(1, torch.tensor([[0], [0]]), x.argmax(-1).unsqueeze(1))
    buf.index_fill_(1, torch.tensor([3]), 5)
    return buf


def through_int32(ids, x):
    return torch.cat([ids.int(), x.argmax(-1).to(torch.int32)[:, None]], 1).long()


def masked(ids, x):
    return torch.where(torch.arange(P) == 1, x.argmax(-1)[:, None], ids)


def part_of_sorted(ids, x):
    return torch.cat([ids, x.sort(descending=True).indices[:, :1]], 1)


def uninitialised(ids, x):
    buf = torch.empty(B, 3, dtype=torch.long)
    buf[:, 1] = x.argmax(-1)
    return buf


def unknown_place(ids, x):
    buf = torch.zeros(B, 3, dtype=torch.long)
    buf[:, x[:, :3].argmax(-1)] = 1
    return buf


def arithmetic(ids, x):
    return torch.cat([ids + 1, ids], 1)


def through_list(ids, x):
    parts = list(ids.split(1, dim=1))
    return torch.stack([part.squeeze(1) for part in reversed(parts)], 1)


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (cat, "p0 p1 p2 t"),
        (view_written_later, "p0 p1 p2 0 t"),
        (copy_before_write, "p0 p1 p2"),
        (scatter, "p0 p1 p2 p0 t p2"),
        (scatter_in_place, "t 9 9 5"),
        (through_int32, "p0 p1 p2 t"),
        (masked, "p0 t p2"),
        (part_of_sorted, "p0 p1 p2 t"),
        (uninitialised, "? t ?"),
        (unknown_place, "? ? ?"),
        (arithmetic, "? ? ? p0 p1 p2"),
        (through_list, "p2 p1 p0"),
    ],
)
def test_cells(fn, expected):
    assert columns(layouts_of(fn)) == expected.split()


def test_several_outputs():
    found = layouts_of(negative_slices)
    assert columns(found, 0) == ["p2", "t"]
    assert columns(found, 1) == ["p0", "p1", "p2"]


def test_a_reading_is_taken_when_the_reader_runs():
    def fn(ids, x):
        buf = torch.zeros(B, P + 1, dtype=torch.long)
        before = buf.float()
        buf[:, :P] = ids
        after = buf.float()
        return before + after

    found = layouts_of(fn)
    readings = [reading for (node, _), reading in found.readings.items() if node.target == "float"]
    assert len(readings) == 1  # nothing to see before the write
    assert readings[0].columns == (*found.history(()), 0)


def test_float_results_carry_no_labels():
    assert columns(layouts_of(lambda ids, x: x.exp())) is None
