"""One rule a family of ops: which axes come out, and which mixtures of positions or requests are refused by name."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from helpers.traces import Step, export, export_then
from torch import fx, nn

from smc_compile.errors import CacheError
from smc_compile.passes.axes.axis_types import OTHER, REPEAT, Atom, B, K, Q
from smc_compile.passes.axes.infer import type_axes
from smc_compile.passes.axes.pointwise import RULES, rule_for

D8, D4, D2 = (Atom(OTHER, 8),), (Atom(OTHER, 4),), (Atom(OTHER, 2),)
WEIGHT = torch.randn(8, 8, dtype=torch.float64)


def chosen(x):
    """A matrix [8, 8] for each token: [B*S, 8, 8]."""
    return torch.stack([WEIGHT, WEIGHT.T])[(x[..., 0] > 0).long().flatten()]


def last_axes(then, batch: int = 2):
    """Axes of what ``then`` makes of x [B, S, 8]; the graph returns it unselected."""
    lm = export_then(then, batch)
    return type_axes(lm).of(lm.graph.output_node().args[0][0])


CARRIED = {
    "a product with a weight": (lambda x: x @ WEIGHT, ((B,), (Q,), D8)),
    "a weight of features": (lambda x: x * WEIGHT[0], ((B,), (Q,), D8)),
    "a table over positions": (lambda x: x + torch.arange(x.shape[1])[:, None], ((B,), (Q,), D8)),
    "a reduction over features": (lambda x: x.pow(2).mean(-1, keepdim=True), ((B,), (Q,), ())),
    "one feature": (lambda x: x[..., 3], ((B,), (Q,))),
    "some features": (lambda x: x[..., 2:4], ((B,), (Q,), D2)),
    "every other feature": (lambda x: x[..., ::2], ((B,), (Q,), D4)),
    "features by index": (lambda x: x[..., torch.tensor([1, 0])], ((B,), (Q,), D2)),
    "halves joined": (lambda x: torch.cat([-x[..., 4:], x[..., :4]], -1), ((B,), (Q,), D8)),
    "chunks stacked": (lambda x: torch.stack(x.chunk(2, -1), 2), ((B,), (Q,), D2, D4)),
    "features unbound": (lambda x: x.unflatten(-1, (2, 4)).unbind(2)[1], ((B,), (Q,), D4)),
    "best features": (lambda x: x.topk(2, -1).values, ((B,), (Q,), D2)),
    "features sorted": (lambda x: x.sort(-1).indices, ((B,), (Q,), D8)),
    "a padded feature axis": (lambda x: F.pad(x[..., :6], (1, 1)), ((B,), (Q,), D8)),
    "a layer norm": (lambda x: F.layer_norm(x, (8,)), ((B,), (Q,), D8)),
    "positions first": (lambda x: x.permute(1, 0, 2), ((Q,), (B,), D8)),
    "features moved": (lambda x: x.movedim(-1, 1), ((B,), D8, (Q,))),
    "one-hot of the best": (lambda x: F.one_hot(x.argmax(-1), 8), ((B,), (Q,), D8)),
    "features tiled": (lambda x: x.repeat(1, 1, 2), ((B,), (Q,), (Atom(REPEAT, 2), *D8))),
    "tokens copied": (lambda x: x.flatten(0, 1).repeat_interleave(2, 0), ((B, Q, Atom(REPEAT, 2)), D8)),
    "all tokens tiled": (lambda x: x.flatten(0, 1).repeat(2, 1), ((Atom(REPEAT, 2), B, Q), D8)),
    "a matrix for each token": (lambda x: (chosen(x) @ x.flatten(0, 1)[..., None])[..., 0], ((B, Q), D8)),
    "entries scattered": (lambda x: torch.zeros_like(x).scatter(-1, x.topk(2, -1).indices, 1.0), ((B,), (Q,), D8)),
    "entries scattered into zeros": (
        lambda x: x.new_zeros(x.shape[0], x.shape[1], 4).scatter(-1, x[..., :4].argsort(-1)[..., :2], x[..., :2]),
        ((B,), (Q,), D4),
    ),
    "a slice written": (lambda x: x.slice_scatter(x[..., :2], -1, 6, 8), ((B,), (Q,), D8)),
    "one feature written": (lambda x: x.select_scatter(x[..., 0], -1, 7), ((B,), (Q,), D8)),
    "pairs as complex numbers": (lambda x: torch.view_as_complex(x.unflatten(-1, (4, 2))).conj(), ((B,), (Q,), D4)),
    "complex numbers as pairs": (
        lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2)))),
        ((B,), (Q,), D4, D2),
    ),
    "an alias of a pointwise op": (lambda x: torch.multiply(x, x) | x.long(), ((B,), (Q,), D8)),
    "a repeated value meets one that varies": (
        lambda x: x[..., None, :1].expand(-1, -1, 4, -1) * x[..., :4, None],
        ((B,), (Q,), D4, ()),
    ),
    "nothing joined along positions": (lambda x: torch.cat([torch.empty(0, dtype=x.dtype), x], 1), ((B,), (Q,), D8)),
    "nothing joined": (lambda x: torch.cat([torch.empty(0, dtype=x.dtype), x], -1), ((B,), (Q,), D8)),
    "scores of one head": (lambda x: (x @ x.mT).softmax(-1), ((B,), (Q,), (K,))),
    "scores with positions before heads": (
        lambda x: x.unflatten(-1, (2, 4)) @ x[..., :4].mT.unsqueeze(1),
        ((B,), (Q,), D2, (K,)),
    ),
    "features spread over queries": (
        lambda x: x.mT.unsqueeze(2).expand(-1, -1, x.shape[1], -1),
        ((B,), D8, (Q,), (K,)),
    ),
    "a statistic of scores": (lambda x: (x @ x.mT).amax(-1, keepdim=True), ((B,), (Q,), ())),
}


@pytest.mark.parametrize(("then", "axes"), CARRIED.values(), ids=CARRIED)
def test_axes_are_carried(then, axes) -> None:
    assert last_axes(then) == axes


MIXES_POSITIONS = [
    ("softmax mixes positions", lambda x: x.softmax(1)),
    ("cumsum mixes positions", lambda x: x.cumsum(1)),
    ("sort mixes positions", lambda x: x.sort(1).values),
    ("roll mixes positions", lambda x: x.roll(1, 1)),
    ("amax mixes positions", lambda x: x.amax(1, keepdim=True)),
    ("logsumexp mixes positions", lambda x: x.logsumexp(1)),
    ("layer_norm mixes positions", lambda x: F.layer_norm(x.mT, (x.shape[1],)).mT),
    ("topk mixes positions", lambda x: x.topk(2, 1).values),
    ("stack|cat.*mixes positions", lambda x: torch.cat([x, x], 1)),
    ("constant_pad_nd mixes positions|pad mixes positions", lambda x: F.pad(x, (0, 0, 1, 0))),
    ("a slice reads some positions only", lambda x: x[:, :-1]),
    ("a slice reads some positions only", lambda x: x[:, ::2]),
    ("a position that is not the last", lambda x: x[:, 0]),
    ("a position that is not the last", lambda x: x[:, -2]),
    ("a product with a table|matrix product with a table", lambda x: torch.ones(1, x.shape[1]).double() @ x),
    ("matmul mixes positions|bmm mixes positions", lambda x: x.mT @ x),
    ("cuts across positions", lambda x: x.reshape(x.shape[0], 8, x.shape[1])),
    ("conv1d has no position-by-position form", lambda x: F.conv1d(x.mT, WEIGHT[:, :, None])),
    ("a value is expanded over positions", lambda x: x[:, -1:].expand(-1, x.shape[1], -1)),
    ("combined with the positions that attention reads|do not line up", lambda x: (x @ x.mT) * x[..., 0:1].mT),
    ("some of the keys only", lambda x: (x @ x.mT)[..., 1:]),
    ("cumsum mixes the positions that attention reads", lambda x: (x @ x.mT).cumsum(-1)),
    ("topk mixes positions", lambda x: x.topk(1, 1).values),
    ("keys are chosen by scores that no mask over positions hides", lambda x: (x @ x.mT).topk(1, -1).values),
    ("kthvalue mixes positions", lambda x: x.kthvalue(1, 1).values),
    ("as many entries are chosen as the length", lambda x: x.topk(x.shape[1] - x.shape[1] // 2, -1).values),
    ("positions that attention reads are repeated", lambda x: (x @ x.mT).repeat_interleave(2, -1)),
    ("positions that attention reads are repeated", lambda x: (x @ x.mT).repeat(1, 1, 2)),
    ("scatter mixes positions", lambda x: torch.zeros_like(x).scatter(1, x.argsort(-1), x)),
    ("slice_scatter mixes positions", lambda x: x.slice_scatter(x[:, -1:], 1, 0, 1)),
    ("once for each position", lambda x: pairwise(x) @ pairwise(x).mT),
    ("not through scores of each query", lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=x[..., :1].mT)),
    ("a value is expanded over positions", lambda x: x.flatten(1)[:, None, :].expand(-1, x.shape[1], -1)),
]


def pairwise(x):
    """[S, B, S, 8]: for each position, attention from there."""
    return x.permute(1, 0, 2)[:, :, None] * x[None]


MIXES_REQUESTS = [
    ("mean mixes requests", lambda x: x - x.mean(0)),
    ("softmax mixes requests", lambda x: x.softmax(0)),
    ("flip mixes requests", lambda x: x.flip(0)),
    ("select mixes requests", lambda x: x[0]),
    ("cat mixes requests", lambda x: torch.cat([x, x], 0)),
    ("slice mixes requests", lambda x: x[1:]),
    ("sum mixes", lambda x: x / x.sum()),
    ("std mixes requests", lambda x: x.std(0)),
    ("scatter mixes requests", lambda x: torch.zeros_like(x).scatter(0, x.argsort(-1), x)),
    ("index mixes requests", lambda x: x[torch.tensor([1, 0])]),
    ("attention does not run over", lambda x: F.scaled_dot_product_attention(*[x.transpose(0, 1)] * 3)),
]


@pytest.mark.parametrize(("message", "then"), [*MIXES_POSITIONS, *MIXES_REQUESTS])
def test_mixtures_are_refused_by_name(message: str, then) -> None:
    with pytest.raises(CacheError, match=message) as caught:
        type_axes(export_then(then))
    assert "traces.py:" in caught.value.why


def test_requests_are_kept_apart_at_batch_one_too() -> None:
    with pytest.raises(CacheError, match="mean mixes requests"):
        type_axes(export_then(lambda x: x - x.mean(0), batch=1))


@pytest.mark.parametrize(
    "then",
    [
        lambda x: F.dropout(x, 0.1, training=True),
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1, is_causal=True),
    ],
)
def test_active_dropout_asks_for_eval(then) -> None:
    with pytest.raises(CacheError, match="training mode with dropout") as caught:
        type_axes(export_then(then))
    assert caught.value.fix == "call model.eval() first"


def test_dropout_that_does_nothing_is_fine() -> None:
    module = Step(lambda x: x)
    module.then = nn.Dropout(0.5).eval()
    typing = type_axes(export(module))
    (dropout,) = (node for node in typing.dependent if "dropout" in node.name)
    assert typing.of(dropout) == typing.of(dropout.args[0]), "the axes pass through"


def test_an_op_without_a_rule_is_refused_unless_it_is_pointwise() -> None:
    node = fx.Graph().call_function(torch.ops.aten.fft_fft.default)
    with pytest.raises(CacheError, match="fft_fft has no position-by-position form"):
        rule_for(node)
    assert rule_for(fx.Graph().call_function(torch.ops.aten.erfinv.default)) is RULES["clone"]
    assert rule_for(fx.Graph().call_function(operator.getitem)) is not RULES["clone"]
