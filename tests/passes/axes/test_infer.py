"""Every axis of every token-dependent value has a role; a reshape only regroups the atoms that axes are made of."""

from __future__ import annotations

import pytest
import sympy
import torch
from helpers.refused_models import REFUSED
from helpers.traces import Last, export_then, op_names, traced

from smc_compile.errors import CacheError
from smc_compile.passes.axes.axis_types import OTHER, REPEAT, Atom, B, K, Q, Typing, split_atoms
from smc_compile.passes.axes.infer import type_axes
from smc_compile.passes.ir import CausalLM
from smc_compile.passes.pipeline import trace_model

S = sympy.Symbol("S", positive=True, integer=True)


def plain(*sizes: int) -> tuple[Atom, ...]:
    return tuple(Atom(OTHER, size) for size in sizes)


# ---- split_atoms -----------------------------------------------------------------------------------------------------


def regroup(atoms, sizes, batch: int = 2):
    typing = Typing(CausalLM(None, None, (), batch, None), S)  # type: ignore[arg-type]
    return split_atoms(list(atoms), [sympy.sympify(size) for size in sizes], typing)


@pytest.mark.parametrize(
    ("atoms", "sizes", "axes"),
    [
        ([B, Q, *plain(12)], [2, S, 12], [(B,), (Q,), plain(12)]),
        ([B, Q, *plain(12)], [2 * S, 12], [(B, Q), plain(12)]),  # view(B*S, D)
        ([B, Q, *plain(12)], [2, S, 3, 4], [(B,), (Q,), plain(3), plain(4)]),  # heads split off
        ([B, Q, *plain(3, 4)], [2, S, 12], [(B,), (Q,), plain(3, 4)]),  # heads merged
        ([B, Q, *plain(12)], [2, S, 1, 12], [(B,), (Q,), (), plain(12)]),  # an axis of one has no atoms
        ([B, *plain(2), Atom(REPEAT, 3), Q], [2, 6, S], [(B,), (Atom(OTHER, 2), Atom(REPEAT, 3)), (Q,)]),
        ([B, *plain(4), Q], [4, 2, S], [(B, *plain(2)), plain(2), (Q,)]),  # a plain atom splits, others do not
        ([Q, *plain(4)], [2 * S, 2], [(Q, *plain(2)), plain(2)]),  # a position's features split
        ([Atom("key", 1)], [S + 1], [(Atom("key", 1),)]),  # keys and one sink column
    ],
)
def test_atoms_regroup(atoms, sizes, axes) -> None:
    assert regroup(atoms, sizes) == axes


def test_a_batch_of_one_goes_with_the_first_axis() -> None:
    assert regroup([B, Q, *plain(4)], [S, 4], batch=1) == [(B, Q), plain(4)]


@pytest.mark.parametrize(
    ("atoms", "sizes"),
    [
        ([B, Q, *plain(4)], [2, 4, S]),  # a transpose written as a view
        ([B, Q], [S, 2]),
        ([B, Q], [2, S, 2]),
        ([B, Q, *plain(6)], [2, S, 4]),
        ([B, Q, *plain(6)], [2, S, 3]),
    ],
)
def test_what_cuts_across_positions_does_not_fit(atoms, sizes) -> None:
    assert regroup(atoms, sizes) is None


# ---- graphs ----------------------------------------------------------------------------------------------------------


def axes_of(then, op: str, batch: int = 2):
    """Axes of the last node of an op in ``then`` over [B, S, 8]."""
    typing = type_axes(export_then(then, batch))
    return [typing.of(node) for node in typing.axes if op_names_match(node, op)][-1]


def op_names_match(node, op: str) -> bool:
    return getattr(node.target, "__name__", "").partition(".")[0] == op


def heads(x):
    return x.view(*x.shape[:2], 2, 4).transpose(1, 2)  # [B, 2, S, 4]


@pytest.mark.parametrize("batch", [1, 2])
def test_batch_and_positions_merge_and_part(batch: int) -> None:
    def flat(x):
        y = x.view(x.shape[0] * x.shape[1], 8)
        return torch.tanh(y).view(*x.shape)[:, -1]

    assert axes_of(flat, "tanh", batch) == ((B, Q), plain(8))
    assert axes_of(flat, "select", batch) == ((B,), plain(8))


def test_transpose_moves_axes() -> None:
    assert axes_of(lambda x: torch.tanh(heads(x))[:, :, -1], "tanh") == ((B,), plain(2), (Q,), plain(4))


def expanded(x):
    k = heads(x)[:, :, None].expand(-1, 2, 3, -1, 4)
    return torch.tanh(k.reshape(x.shape[0], 6, x.shape[1], 4))


def test_expanded_heads_are_repeats_of_a_head() -> None:
    repeated = (Atom(OTHER, 2), Atom(REPEAT, 3))
    assert axes_of(lambda x: expanded(x)[:, :, -1], "tanh") == ((B,), repeated, (Q,), plain(4))
    assert axes_of(lambda x: torch.tanh(heads(x).repeat_interleave(3, 1))[:, :, -1], "tanh")[1] == repeated


def test_tiled_heads_repeat_all_heads() -> None:
    """`repeat` is not `repeat_interleave`: the copies stand outside."""
    assert axes_of(lambda x: torch.tanh(heads(x).repeat(1, 3, 1, 1))[:, :, -1], "tanh")[1] == (
        Atom(REPEAT, 3),
        Atom(OTHER, 2),
    )


def attend(x, probs):
    q = heads(x)
    return (probs(q @ q.mT) @ q)[:, :, -1]


def test_scores_run_over_queries_and_keys() -> None:
    typing = type_axes(export_then(lambda x: attend(x, lambda s: s.softmax(-1))))
    assert list(typing.attention.values()) == ["score", "mix"]
    score, mix = typing.attention
    assert typing.of(score) == ((B,), plain(2), (Q,), (K,))
    assert typing.of(mix) == ((B,), plain(2), (Q,), plain(4))


@pytest.mark.parametrize("before", [False, True])
def test_a_sink_column_widens_the_keys_until_it_is_cut_off(before: bool) -> None:
    def probs(s):
        sink = torch.zeros(*s.shape[:3], 1, dtype=s.dtype)
        wide = torch.cat([sink, s] if before else [s, sink], -1).softmax(-1)
        return wide[..., 1:] if before else wide[..., :-1]

    assert axes_of(lambda x: attend(x, probs), "cat")[-1] == (Atom("key", -1 if before else 1),)
    assert axes_of(lambda x: attend(x, probs), "slice")[-1] == (K,)


@pytest.mark.parametrize(
    ("last", "axes"),
    [
        (lambda x: x[:, -1], ((B,), plain(8))),
        (lambda x: x[:, -1, :], ((B,), plain(8))),
        (lambda x: x[:, -1:], ((B,), (), plain(8))),
        (lambda x: x[:, x.shape[1] - 1], ((B,), plain(8))),
        (lambda x: x.transpose(0, 1)[-1], ((B,), plain(8))),
    ],
)
def test_the_last_position_is_found(last, axes) -> None:
    typing = type_axes(export_then(lambda x: torch.tanh(last(x)) * 2))
    (selected,) = typing.last
    assert typing.of(selected) == axes
    assert {node.name.partition("_")[0] for node in typing.after_last} == {
        selected.name.partition("_")[0],
        "tanh",
        "mul",
    }


def test_values_without_tokens_are_not_typed() -> None:
    """Masks, rotary tables and position embeddings depend on the length only."""
    typing = type_axes(traced("llama")[0])
    free = [n for n in typing.lm.graph.nodes if n.op == "call_function" and n not in typing.dependent]
    assert {"arange.default", "cos.default", "sin.default"} <= set(op_names(typing.lm.graph))
    assert {"arange", "cos", "sin"} <= {node.name for node in free}
    assert typing.lm.ids in typing.dependent


# ---- refused models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_mix_positions_are_refused_by_op_and_line(name: str) -> None:
    build, word = REFUSED[name]
    with pytest.raises(CacheError, match=word) as caught:
        trace_model(Last(build()), torch.zeros(2, 2, dtype=torch.long), (), check=True, sampled=False)
    assert "models.py:" in str(caught.value)
    assert "self.mix(x)" in str(caught.value)
    assert caught.value.fix
