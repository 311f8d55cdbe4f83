"""A model is one node while a loop is traced: its shapes are those of the model, and nothing that it does is lost."""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.toys import TableLM
from torch import Tensor, fx, nn

from smc_compile import decode
from smc_compile.errors import SMCError
from smc_compile.program.capture import Capture
from smc_compile.program.opaque_models import NotOpaque, call_opaque, own_forward, with_models

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
IDS = torch.tensor([[0, 1, 2], [3, 4, 5]])
V = 7


class Around(nn.Module):
    """A model around another one."""

    def __init__(self) -> None:
        super().__init__()
        self.model = TableLM(V)
        self.calls, self.seen = 0, [0]

    def forward(self, ids: Tensor) -> Any:
        return self.model(ids)


def captured(loop: Callable[..., Any], *args: Any, nodes: bool = True) -> fx.GraphModule:
    """The graph of a function, its models as nodes."""
    ids = next(arg for arg in args if isinstance(arg, Tensor))
    torch._dynamo.maybe_mark_dynamic(ids, 1)
    call = Capture(loop, nodes=nodes).captured(*args)  # type: ignore[arg-type]
    assert call is not None
    return call.finder._gm


def nodes_of(gm: fx.GraphModule) -> list[fx.Node]:
    return gm.graph.find_nodes(op="call_function", target=call_opaque)


def inputs_of(gm: fx.GraphModule, ids: Tensor) -> list[Any]:
    """What a graph of the text alone is called with: its length and itself."""
    values = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]
    return [ids.shape[1] if isinstance(value, torch.SymInt) else ids for value in values]


# ---- what a node is --------------------------------------------------------------------------------------------------


def twice(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids)
    return logits[:, logits.shape[1] - 1 :].squeeze(1) + model(ids)[:, -1]


def test_each_call_is_one_node_whose_length_is_that_of_the_text() -> None:
    found = nodes_of(captured(twice, Around(), IDS.clone()))
    assert len(found) == 2
    ((logits,), _) = (node.meta["example_value"] for node in found)
    batch, length, vocabulary = logits.shape
    assert (batch, vocabulary) == (2, V)
    assert str(length.node.expr).startswith("s")


class Structured(Around):
    def forward(self, ids: Tensor, scale: float = 1.0, *, last: int = 0) -> Any:
        logits = self.model(ids) * scale
        return {"logits": logits[:, -last:], "loss": None, "parts": (logits.sum(-1), [logits.exp()])}


def structured(model: nn.Module, ids: Tensor) -> Tensor:
    short, long = model(ids, 2.0, last=1), model(ids, last=2)
    assert short["loss"] is None
    return short["logits"][:, -1] + long["logits"][:, 0] + long["parts"][1][0][:, -1]


@pytest.mark.parametrize(("function", "kind"), [(twice, Around), (structured, Structured)])
def test_with_the_models_in_the_place_of_their_nodes_the_graph_computes_what_the_function_does(function, kind) -> None:
    model = kind()
    gm = captured(function, model, IDS.clone())
    step = with_models(gm)
    assert not nodes_of(step)
    for length in (3, 5):
        ids = torch.arange(2 * length).view(2, length) % V
        assert torch.equal(step(*inputs_of(step, ids))[0], function(model, ids))


def test_arguments_that_are_no_tensors_have_shapes_of_their_own() -> None:
    lengths = [node.meta["example_value"][0].shape[1] for node in nodes_of(captured(structured, Structured(), IDS))]
    assert lengths == [1, 2]


def test_a_node_computes_nothing_itself() -> None:
    gm = captured(twice, Around(), IDS.clone())
    with pytest.raises(NotOpaque):
        call_opaque(nodes_of(gm)[0].args[0], False, IDS)  # type: ignore[arg-type]


# ---- a model is itself -----------------------------------------------------------------------------------------------


def test_a_forward_of_the_instance_is_the_one_that_stands_in_the_place_of_the_node() -> None:
    model = Around()
    model.forward = types.MethodType(lambda self, ids: -self.model(ids), model)  # type: ignore[method-assign]
    own = vars(model)["forward"]
    step = with_models(captured(twice, model, IDS.clone()))
    assert vars(model)["forward"] is own
    assert own_forward(model) is own
    given = inputs_of(step, IDS)
    assert torch.equal(step(*given)[0], twice(model, IDS))


def test_another_dtype_is_another_node() -> None:
    def doubled_where_single(model: nn.Module, ids: Tensor) -> Tensor:
        logits = model(ids)
        return logits * 2 if logits.dtype == torch.float32 else logits

    model, capture = Around(), Capture(doubled_where_single, nodes=True)
    for kind in (torch.float32, torch.float64, torch.float32):
        call = capture.captured(model.to(kind), IDS)
        assert call is not None
        (node,) = nodes_of(call.finder._gm)
        assert node.meta["example_value"][0].dtype == kind
        assert bool(call.finder._gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mul)) is False
        multiplied = any("mul" in str(n.target) for n in call.finder._gm.graph.nodes)
        assert multiplied == (kind == torch.float32)


# ---- what cannot be a node -------------------------------------------------------------------------------------------

COUNT = 0


class CountsInAttribute(Around):
    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        return self.model(ids)


class CountsInList(Around):
    def forward(self, ids: Tensor) -> Tensor:
        self.seen.append(1)
        return self.model(ids)


class CountsInGlobal(Around):
    def forward(self, ids: Tensor) -> Tensor:
        global COUNT
        COUNT += 1
        return self.model(ids)


class CountsInClass(Around):
    total = 0

    def forward(self, ids: Tensor) -> Tensor:
        type(self).total += 1
        return self.model(ids)


class State:
    def __init__(self) -> None:
        self.calls = 0


class CountsInObject(Around):
    def __init__(self) -> None:
        super().__init__()
        self.state = State()

    def forward(self, ids: Tensor) -> Tensor:
        self.state.calls += 1
        return self.model(ids)


class WritesToItsInput(Around):
    def forward(self, ids: Tensor) -> Tensor:
        logits = self.model(ids)
        ids[:, -1] = 0
        return logits


@pytest.mark.parametrize(
    "kind", [CountsInAttribute, CountsInList, CountsInGlobal, CountsInClass, CountsInObject, WritesToItsInput]
)
def test_a_model_that_changes_something_is_no_node_and_is_left_as_it_was(kind) -> None:
    model = kind()
    for _ in range(2):  # nothing of the first trace is taken for granted
        with pytest.raises(Exception, match=rf"{kind.__name__} \d+ changes"):
            captured(twice, model, IDS.clone())
    state = getattr(model, "state", None)
    assert (model.calls, model.seen, COUNT, CountsInClass.total) == (0, [0], 0, 0)
    assert state is None or state.calls == 0
    assert "forward" not in vars(model)


def sets_a_flag(model: nn.Module, ids: Tensor) -> Tensor:
    model.training = True
    first = model(ids)
    model.training = False
    return first + model(ids)


def swaps_weights(model: nn.Module, ids: Tensor) -> Tensor:
    weights = {name: -weight for name, weight in model.named_parameters()}
    return torch.func.functional_call(model, weights, (ids,))


@pytest.mark.parametrize("loop", [sets_a_flag, swaps_weights])
def test_a_loop_that_changes_what_a_model_reads_has_no_nodes_even_if_all_is_put_back(loop) -> None:
    with pytest.raises(Exception, match=r"the loop changes .*, which a model may read"):
        captured(loop, Around().eval(), IDS.clone())


# ---- results ---------------------------------------------------------------------------------------------------------


class ReturnsItsInput(Around):
    def forward(self, ids: Tensor) -> Any:
        return ids


class ReturnsAPart(Around):
    def forward(self, ids: Tensor) -> Any:
        return ids[:, -1:]


class ReturnsAWeight(Around):
    def forward(self, ids: Tensor) -> Any:
        return self.model.table


class ReturnsOneThingTwice(Around):
    def forward(self, ids: Tensor) -> Any:
        logits = self.model(ids)
        return logits, logits[:, -1]


class ByAFlag(Around):
    def forward(self, ids: Tensor, more: bool = False) -> Any:
        logits = self.model(ids)
        return (logits, logits * 2) if more else logits


@dataclass
class Computing:
    logits: Tensor

    def __post_init__(self) -> None:
        self.logits = -self.logits


class ReturnsWhatComputes(Around):
    def forward(self, ids: Tensor) -> Any:
        return Computing(self.model(ids))


def called(model: nn.Module, ids: Tensor) -> Any:
    found = model(ids)
    return found + 0 if isinstance(found, Tensor) else found


def called_twice(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids) + model(ids, True)[1]


@pytest.mark.parametrize(
    ("kind", "loop"),
    [
        (ReturnsItsInput, called), (ReturnsAPart, called), (ReturnsAWeight, called), (ReturnsOneThingTwice, called),
        (ByAFlag, called_twice), (ReturnsWhatComputes, called),
    ],
)  # fmt: skip
def test_results_that_a_node_could_not_give_back_faithfully(kind, loop) -> None:
    """What shares memory with other tensors may be written to; a node has one form of results."""
    for _ in range(2):
        with pytest.raises(Exception, match=r"returns a part of|results of several forms|a model returns Computing"):
            captured(loop, kind(), IDS.clone())


@functools.cache
def signs(most: int) -> Tensor:
    return torch.where(torch.arange(V) > most, -1.0, 1.0)


class ReadsACache(Around):
    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids) * signs(3)


def test_no_tensor_without_data_is_left_in_a_cache() -> None:
    captured(called, ReadsACache(), IDS.clone())
    assert type(signs(3)) is Tensor


def test_a_model_of_transformers_is_a_node() -> None:
    """A guard on speed: the results of the library are rebuilt from their tensors."""
    library = pytest.importorskip("transformers", minversion="5")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = library.LlamaForCausalLM(library.LlamaConfig(vocab_size=V, use_cache=False, **sizes)).eval()
    assert len(nodes_of(captured(lambda model, ids: model(ids).logits[:, -1], model, IDS.clone()))) == 1


def by_one_name(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids, last=1)["logits"][:, 0] + model(ids, scale=1)["logits"][:, -1]


def test_arguments_are_told_apart_by_their_names() -> None:
    """``last=1`` gives one position, ``scale=1`` all of them."""
    lengths = [node.meta["example_value"][0].shape[1] for node in nodes_of(captured(by_one_name, Structured(), IDS))]
    assert lengths[0] == 1
    assert lengths[1] != 1


class ForOneLength(Around):
    def forward(self, ids: Tensor) -> Tensor:
        if ids.shape[1] != 3:
            raise ValueError("three tokens")
        return self.model(ids)


def test_a_model_that_shows_one_length_alone_is_no_node() -> None:
    with pytest.raises(Exception, match="three tokens"):
        captured(twice, ForOneLength(), IDS.clone())


# ---- a loop that is compiled with nodes ----------------------------------------------------------------------------


class Gradients(Around):
    """A model that computes something else where gradients are on."""

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.model(ids)
        return -logits if torch.is_grad_enabled() else logits


def greedy(model: nn.Module, ids: Tensor, n: int) -> Tensor:
    for _ in range(n):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def greedy_without_gradients(model: nn.Module, ids: Tensor, n: int) -> Tensor:
    for _ in range(n):
        with torch.no_grad():
            logits = model(ids)[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize(
    ("loop", "gradients"),
    [(greedy, False), (greedy_without_gradients, True), (torch.no_grad()(greedy), True)],
)
def test_a_model_may_ask_for_gradients_where_the_loop_has_none(loop: Callable[..., Tensor], gradients: bool) -> None:
    model = Gradients()
    with torch.set_grad_enabled(gradients):
        found = decode(loop, method="autoregressive", compiler="eager")(model, IDS, 5)
        assert torch.equal(found, loop(model, IDS, 5))


def test_where_the_loop_has_them_it_is_refused_also_after_calls_without() -> None:
    compiled, model = decode(greedy, method="autoregressive", compiler="eager"), Gradients()
    with torch.no_grad():
        compiled(model, IDS, 5)
    with pytest.raises(SMCError, match="something else while it is traced"):
        compiled(model, IDS, 5)


class OtherForms(Around):
    """A model whose results have another form at some lengths of the text."""

    def __init__(self, form: Callable[[Tensor], Any], at: Callable[[Any], Any]) -> None:
        super().__init__()
        self.form, self.at = form, at

    def forward(self, ids: Tensor) -> Any:
        logits = self.model(ids)
        return self.form(logits) if self.at(ids.shape[1]) else logits


def by_form(model: nn.Module, ids: Tensor, n: int) -> Tensor:
    for _ in range(n):
        logits = model(ids)
        if isinstance(logits, tuple):
            logits = -logits[0]
        elif logits.dtype == torch.float64 or logits.shape[-1] != V or logits.shape[1] != ids.shape[1]:
            logits = -logits
        ids = torch.cat([ids, logits[:, -1, :V].argmax(-1, keepdim=True)], 1)
    return ids


LENGTHS: dict[str, Callable[[Any], Any]] = {
    "from ten on": lambda length: length >= 10,
    "one": lambda length: length == 11,
    "some": lambda length: length in (10, 11, 12),
    "by a table": lambda length: {10: True, 11: True}.get(length, False),
    "by a list": lambda length: ([False] * 10 + [True] * 30)[length],
    "by remainders": lambda length: length % 7 == 4,
    "as a text": lambda length: len(str(length)) == 2,
}
FORMS: dict[str, Callable[[Tensor], Any]] = {
    "dtype": lambda logits: logits.double(),
    "vocabulary": lambda logits: torch.cat([logits, logits[..., :1] - 100], -1),
    "positions": lambda logits: logits[:, -1:],
    "structure": lambda logits: (logits,),
    "none": lambda logits: -logits,
}


@pytest.mark.parametrize(("form", "at"), [*zip(itertools.cycle(FORMS), LENGTHS), ("none", "by a table")])
def test_a_form_that_changes_with_the_length_is_never_lost(form: str, at: str) -> None:
    model = OtherForms(FORMS[form], LENGTHS[at])
    compiled = decode(by_form, method="autoregressive", compiler="eager")
    try:
        found = compiled(model, IDS, 12)
    except SMCError:
        return
    assert torch.equal(found, by_form(model, IDS, 12))
