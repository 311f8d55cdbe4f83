import pytest
import torch
from helpers.model_parts import perturbed
from helpers.models import CACHEABLE
from helpers.refused_models import REFUSED
from helpers.toys import GRUStep, TableLM, TinyTransformerLM
from torch.export import Dim, export

TOYS = {"table": TableLM, "tiny_transformer": TinyTransformerLM, "gru_step": GRUStep}
MIXING = ["bidirectional", "bidirectional_eager", "peeking_mask", "flipped", "future_shift", "sequence_mean"]
CAUSAL_BUT_MIXING = ["causal_convolution", "gru_lm", "cumulative_mean"]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def random_ids(model, rows=2, length=12):
    return torch.randint(model.vocab, (rows, length), generator=torch.Generator().manual_seed(0))


def change_at(model, j=5):
    """How much the logits move, per position, when token j changes."""
    ids = random_ids(model)
    other = ids.clone()
    other[:, j] = (ids[:, j] + 1) % model.vocab
    return (model(ids) - model(other)).abs().amax(dim=(0, 2))


def has_symbolic_length(program):
    (ids,) = (n for n in program.graph.nodes if n.name == "ids")
    return not str(ids.meta["val"].shape[1]).isdigit()


@pytest.mark.parametrize("name", [*CACHEABLE, *TOYS])
def test_is_causal(name):
    model = {**CACHEABLE, **TOYS}[name]().double()
    change = change_at(model)
    assert change[:5].max() < 1e-12
    assert change[5] > 1e-3
    if name != "table":
        assert change[6] > 1e-4, "history does not matter"


@pytest.mark.parametrize("name", CACHEABLE)
def test_rows_and_lengths_do_not_matter(name):
    model = CACHEABLE[name]().double()
    ids = random_ids(model)
    torch.testing.assert_close(model(ids)[:1, :7], model(ids[:1, :7]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CACHEABLE)
def test_distributions_are_not_trivial(name):
    model = CACHEABLE[name]()
    logits = model(random_ids(model, rows=8))
    assert logits.dtype == torch.float32
    assert 0.4 < logits.std(-1).mean() < 2.5
    assert not torch.allclose(logits, CACHEABLE[name](seed=1)(random_ids(model, rows=8)), atol=0.1)
    assert torch.equal(logits, CACHEABLE[name]()(random_ids(model, rows=8)))


@pytest.mark.parametrize("name", ["eager", "table", "tiny_transformer"])
def test_exports_with_a_symbolic_length(name):
    """One with a mask buffer, and two toys; passes/cache/test_synthesize.py exports all that are cacheable."""
    model = {**CACHEABLE, **TOYS}[name]()
    ids = random_ids(model)
    # One below the maximum: cutting the two equal axes of a mask buffer adds a guard that S is not the whole of it.
    length = Dim("S", min=2, max=getattr(model, "max_positions", 64) - 1)
    program = export(model, (ids,), dynamic_shapes=({1: length},), strict=False)
    assert has_symbolic_length(program)
    exported = program.module()
    for n in 2, 7, length.max:
        ids = random_ids(model, length=n)
        torch.testing.assert_close(exported(ids), model(ids))


@pytest.mark.filterwarnings("ignore:The tensor attributes self.layer._flat_weights")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_exports_with_the_op_to_name(name):
    constructor, word = REFUSED[name]
    model = constructor()
    program = export(model, (random_ids(model),), dynamic_shapes=({1: Dim.AUTO},), strict=False)
    assert any(word in str(n.target) for n in program.graph.nodes if n.op == "call_function")
    assert has_symbolic_length(program) == (name != "gru_lm")  # nn.GRU specialises on the length


@pytest.mark.parametrize("name", MIXING)
def test_refused_sees_the_future(name):
    assert change_at(REFUSED[name][0]().double(), 8)[:8].max() > 1e-4


@pytest.mark.parametrize("name", CAUSAL_BUT_MIXING)
def test_refused_mixes_positions(name):
    change = change_at(REFUSED[name][0]().double())
    assert change[:5].max() < 1e-12
    assert change[6] > 1e-4


def test_batch_mean_mixes_rows():
    model = REFUSED["batch_mean"][0]().double()
    ids = random_ids(model)
    assert (model(ids)[:1] - model(ids[:1])).abs().max() > 1e-3


def test_every_refused_model_is_tested():
    assert {*MIXING, *CAUSAL_BUT_MIXING, "batch_mean"} == {*REFUSED}


def test_tiny_transformer_remembers_its_first_token():
    model = TinyTransformerLM()
    ids = random_ids(model, rows=64, length=6)
    other = torch.cat([(ids[:, :1] + 1) % model.vocab, ids[:, 1:]], dim=1)
    p, q = (model(x)[:, -1].softmax(-1) for x in (ids, other))
    assert 0.5 * (p - q).abs().sum(-1).mean() > 0.05


def test_second_order_table_reads_two_tokens():
    model = TableLM(vocab=3, order=2)
    torch.testing.assert_close(model(torch.tensor([[2, 1]]))[0], torch.stack([model.table[0, 2], model.table[2, 1]]))


def test_gru_step_in_blocks_equals_forward():
    model = GRUStep().double()
    ids, state, blocks = random_ids(model), model.initial_state(2), []
    for start, stop in (0, 1), (1, 6), (6, 12):
        logits, state = model.step(ids[:, start:stop], start, state)
        blocks.append(logits)
    torch.testing.assert_close(torch.cat(blocks, dim=1), model(ids))


def test_perturbed_is_near_but_not_equal():
    model = CACHEABLE["gpt"]()
    draft = perturbed(model, scale=0.1)
    p, q = (m(random_ids(model)).softmax(-1) for m in (model, draft))
    assert 0.005 < 0.5 * (p - q).abs().sum(-1).mean() < 0.3
