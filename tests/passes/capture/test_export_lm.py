"""A step becomes one functional graph: symbolic length, attention kept whole, weights looked up at call time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.refused_models import REFUSED
from helpers.traces import Last, Step, export, export_then, model, op_names, rows_of, tokens, traced
from torch import nn

from smc_compile.errors import CacheError
from smc_compile.passes.capture.decompositions import einsum_as_matmul
from smc_compile.passes.pipeline import capture

# ---- the graph -------------------------------------------------------------------------------------------------------


def test_the_length_is_symbolic_and_the_batch_is_not() -> None:
    lm = traced("gpt")[0]
    batch, length = lm.ids.meta["val"].shape
    assert (batch, lm.batch) == (2, 2)
    assert isinstance(length, torch.SymInt)


@pytest.mark.parametrize("length", [1, 2, 7, 23])
def test_the_graph_computes_the_step_at_every_length(length: int) -> None:
    lm, _, owned = traced("llama")
    ids = tokens(2, length)
    torch.testing.assert_close(rows_of(lm, ids, owned()), model("llama")(ids)[:, -1])


def test_attention_stays_one_op_a_layer() -> None:
    names = op_names(traced("gpt")[0].graph)
    assert names.count("scaled_dot_product_attention.default") == 2
    assert not any("softmax" in name for name in names)


def test_einsum_becomes_a_matmul() -> None:
    names = op_names(traced("eager_where")[0].graph)
    assert names.count("matmul.default") == 4
    assert not any("einsum" in name for name in names)


def test_dead_code_is_gone_and_placeholders_stay() -> None:
    def step(x):
        x.cumsum(1)
        return x[:, -1]

    lm = export_then(step)
    assert "cumsum" not in str(lm.graph)
    assert len(lm.weights) == 1


def test_code_under_no_grad_is_inlined() -> None:
    def step(x):
        with torch.no_grad():
            return torch.tanh(x)[:, -1]

    assert op_names(export_then(step).graph)[-2:] == ["tanh.default", "select.int"]


@pytest.mark.parametrize(
    ("name", "limit"), [("gpt_sliced_positions", 64), ("llama_buffered", 64), ("eager", 64), ("llama", None)]
)
def test_max_positions_is_the_length_of_sliced_buffers(name: str, limit: int | None) -> None:
    assert traced(name)[0].max_positions == limit


# ---- weights ---------------------------------------------------------------------------------------------------------


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.scale = nn.Embedding(11, 4), nn.Linear(4, 4)
        self.register_buffer("shift", torch.ones(4), persistent=False)

    def forward(self, ids, *weights):
        x = self.scale(self.embed(ids)) + self.shift + torch.tensor([1.0, 2.0, 3.0, 4.0])
        return sum(weights, x)[:, -1]


def test_owned_weights_are_looked_up_at_every_call() -> None:
    step = Affine()
    lm, owned = capture(step, torch.zeros(2, 2, dtype=torch.long))
    ids = tokens(2, 3)
    with torch.no_grad():
        step.embed.weight = nn.Parameter(torch.randn(11, 4))  # replaced
        step.scale.bias.add_(1.0)  # updated in place
    step.shift = torch.full((4,), -3.0)
    torch.testing.assert_close(rows_of(lm, ids, owned()), step(ids))


def test_owned_weights_are_not_copies() -> None:
    step = Affine()
    owned = capture(step, torch.zeros(2, 2, dtype=torch.long))[1]
    assert any(w is step.embed.weight for w in owned())


def test_explicit_weights_follow_the_owned_ones() -> None:
    step, extra = Affine(), torch.randn(4)
    lm, owned = capture(step, torch.zeros(2, 2, dtype=torch.long), [extra])
    ids = tokens(2, 3)
    assert len(lm.weights) == len(owned()) + 1
    torch.testing.assert_close(rows_of(lm, ids, [*owned(), 2 * extra]), step(ids, 2 * extra))


# ---- einsum ----------------------------------------------------------------------------------------------------------

EQUATIONS = [
    "bhqd,bhkd->bhqk",
    "bqhd,bkhd->bhqk",
    "bhqk,bkhd->bqhd",
    "bhqk,bhkd->bhqd",
    "bqhgd,bkhd->bhgqk",
    "bhgqk,bkhd->bqhgd",
    "bqd,bkd->bqk",
    "bsd,dhk->bhsk",
    "bshk,hkd->bsd",
    "bsd,vd->bsv",
    "bsd, vd -> bvs",
    "bd,bd->b",
    "bi,bj",
]


@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum_as_matmul_equals_einsum(equation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {c: n for n, c in enumerate(sorted(set(equation) - set("->, ")), start=2)}
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    x, y = (torch.randn([sizes[c] for c in term], generator=generator, dtype=torch.float64) for term in terms)
    torch.testing.assert_close(einsum_as_matmul(equation, [x, y]), torch.einsum(equation, x, y))


@pytest.mark.parametrize("equation", ["bii,bi->bi", "bi,bi,bi->b", "bi,bj->b", "...i,...i->..."])
def test_einsum_in_another_form_is_left_to_torch(equation: str) -> None:
    operands = [torch.ones(2, 3, 3) if term == "bii" else torch.ones(2, 3) for term in equation[:-3].split(",")]
    assert einsum_as_matmul(equation, operands) is NotImplemented


# ---- refused ---------------------------------------------------------------------------------------------------------


def branch_on_data(x):
    return x[:, -1] if x.sum() > 0 else x[:, 0]


def branch_on_item(x):
    return x[:, -1] * x.abs().max().item() if x[0, -1, 0].item() > 0 else x[:, -1]


def one_length_only(x):
    return (x + torch.ones(7, 8, dtype=x.dtype))[:, -1]  # 7: the length of the trace


@pytest.mark.parametrize("then", [branch_on_data, branch_on_item])
def test_a_branch_on_data_is_refused(then) -> None:
    with pytest.raises(CacheError, match="cannot be traced") as caught:
        export_then(then)
    assert "no Python branch on values or lengths" in caught.value.fix
    assert caught.value.why


def test_a_step_of_one_length_is_refused() -> None:
    with pytest.raises(CacheError, match="length"):
        export_then(one_length_only)


def test_gru_is_refused_by_name() -> None:
    with pytest.raises(CacheError, match="gru has no position-by-position form"):
        export(Last(REFUSED["gru_lm"][0]()))


def test_an_error_of_the_model_itself_is_told() -> None:
    with pytest.raises(CacheError, match="a message of the model"):
        export(Step(lambda x: F.linear(x, _fail())))


def _fail():
    raise RuntimeError("a message of the model")
