"""Trace one iteration of a decode loop into a functional ATen graph with a symbolic sequence length."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx, nn
from torch._functorch.compile_utils import fx_graph_cse
from torch.export.graph_signature import InputKind

from smc_compile.errors import CacheError, SMCError
from smc_compile.passes.axes.axis_types import refuse
from smc_compile.passes.axes.helpers import op_name
from smc_compile.passes.axes.infer import type_axes
from smc_compile.passes.axes.key_selection import choose_at_most_all
from smc_compile.passes.capture.decompositions import COUNTING, DECOMPOSED
from smc_compile.passes.capture.length_bound import bound_length
from smc_compile.passes.capture.picked_rows import handle_all_rows
from smc_compile.passes.capture.shape_only import forget_values
from smc_compile.passes.ir import CausalLM

log = logging.getLogger(__name__)

TRACE_LENGTH = 7  # any length >= 2: the sequence axis is symbolic


def export_lm(step: nn.Module, ids: Tensor, weights: Sequence[Tensor] = ()) -> tuple[CausalLM, OwnedWeights]:
    """Export ``step(ids [B, S], *weights) -> [B, ...]`` with S symbolic, ATen ops kept whole (so is attention).

    Returns the graph and the weights that ``step`` owns itself (parameters, buffers, constants); they precede the
    explicit ``weights`` in the order of ``CausalLM.weights``.

    Raises:
        CacheError: when the step cannot be traced for a symbolic length, with the tracer's reason.
    """
    example = ids.new_zeros(ids.shape[0], TRACE_LENGTH)
    try:
        program = _export(step, (example, *weights), torch.export.Dim.DYNAMIC)
    except SMCError:  # the step itself refused
        raise
    except Exception as error:  # the tracer raises many types; all mean the same to the user
        _name_the_culprit(step, (example, *weights))
        raise _untraceable(error) from error
    graph_module = program.graph_module
    forget_values(graph_module.graph)
    choose_at_most_all(graph_module.graph)
    graph_module.graph = fx_graph_cse(graph_module.graph)  # layers slice the same position tables again and again
    graph_module.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    graph_module.recompile()
    lm = _causal_lm(program, graph_module, ids.shape[0])
    handle_all_rows(lm.graph, set(_token_dependent(lm.graph, lm.ids)))
    graph_module.recompile()
    lm.verify()
    log.debug("exported step\n%s", graph_module.print_readable(print_output=False))
    owned = OwnedWeights(step, program)
    _check_short(step, lm, _fewest(program), [*owned(), *weights], weights)
    return lm, owned


def _export(step: nn.Module, inputs: tuple[Tensor, ...], length: object) -> torch.export.ExportedProgram:
    dynamic = ({1: length}, *({} for _ in inputs[1:]))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(_Positional(step), inputs, dynamic_shapes=(dynamic,), strict=False)
        dependent = _token_dependent(program.graph, _user_inputs(program)[0])
        counts = any(_is_count(node) for node in _reads_tokens(dependent))
        if _is_functional(program.graph) and not counts:
            return program  # decomposing traces everything again, which costs as much as the export
        _refuse_convolutions(dependent)
        return program.run_decompositions(DECOMPOSED | (COUNTING if counts else {}))


def _fewest(program: torch.export.ExportedProgram) -> int:
    """The shortest sequence that the trace stands for: a branch on the length excludes those that go the other way."""
    length = _user_inputs(program)[0].meta["val"].shape[1]
    bounds = program.range_constraints.get(length.node.expr)
    return int(bounds.lower) if bounds is not None and bounds.lower.is_Integer else 2


def _check_short(
    step: nn.Module, lm: CausalLM, fewest: int, weights: Sequence[Tensor], explicit: Sequence[Tensor]
) -> None:
    """Below ``fewest`` positions the step takes another branch; what it computes there must be the same.

    Raises:
        CacheError: when it is not, or when the graph cannot compute it.
    """
    ids = torch.arange(lm.batch * fewest).view(lm.batch, fewest) % 2
    ids = ids.to(next((w.device for w in weights), ids.device))
    arguments = dict(zip(lm.weights, weights, strict=True))
    for length in range(2, fewest):
        arguments[lm.ids] = ids[:, :length]
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            expected = step(arguments[lm.ids], *explicit)
            torch.manual_seed(0)
            inputs = [arguments[node] for node in lm.graph.nodes if node.op == "placeholder"]
            try:
                actual = fx.Interpreter(lm.graph_module).run(*inputs)[0]
            except RuntimeError as error:
                raise _branches(length, f"the branch of longer ones fails: {str(error).splitlines()[0]}") from error
        if not torch.allclose(actual.double(), expected.double(), rtol=1e-3, atol=1e-4, equal_nan=True):
            raise _branches(length, "the branch of longer ones computes something else")


def _branches(length: int, why: str) -> CacheError:
    return CacheError(
        "the model takes another branch for short sequences",
        f"at {length} positions {why}",
        "make the forward tensor code without a Python branch on ids.shape (masks and windows by comparing positions)",
    )


def _token_dependent(graph: fx.Graph, ids: fx.Node) -> dict[fx.Node, None]:
    """The nodes that read the tokens, or what was computed from them, in order."""
    dependent = {ids: None}
    for node in graph.nodes:
        if any(source in dependent for source in node.all_input_nodes):
            dependent[node] = None
    return dependent


def _reads_tokens(dependent: Iterable[fx.Node]) -> list[fx.Node]:
    """Of nodes that depend on tokens, in order, those that depend on more than how many tokens there are."""
    nodes = list(dependent)
    found = set(nodes[:1])  # the tokens themselves
    for node in nodes[1:]:
        if node.target is not torch.ops.aten.sym_size.int and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return [node for node in nodes if node in found]


def _is_count(node: fx.Node) -> bool:
    """A running sum of integers along an axis that grows with the sequence."""
    if node.target is not torch.ops.aten.cumsum.default:
        return False
    source, dim = node.args[:2]
    value = source.meta["val"]  # type: ignore[union-attr]
    return not value.is_floating_point() and not isinstance(value.shape[dim], int)


def _refuse_convolutions(dependent: Iterable[fx.Node]) -> None:
    """Refuse before minutes go by what will be refused anyway: such models often unroll to very long graphs.

    Raises:
        CacheError: naming a convolution of values that depend on tokens.
    """
    for node in dependent:
        if str(node.target).startswith("aten.conv"):
            raise refuse(node, f"{op_name(node)} has no position-by-position form")


def _is_functional(graph: fx.Graph) -> bool:
    """No op writes in place, and none is left to decompose or inline (`with torch.no_grad()` makes a nested graph)."""
    ops = [node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    nested = any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in graph.nodes)
    return not nested and not any(op._schema.is_mutable or op in DECOMPOSED for op in ops)


def _name_the_culprit(step: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """A recurrent op pins the length: trace for that one length and let the axis analysis name the op."""
    try:
        program = _export(step, inputs, torch.export.Dim.AUTO)
    except SMCError:
        raise
    except Exception as error:
        raise _untraceable(error) from error
    type_axes(_causal_lm(program, program.graph_module, inputs[0].shape[0], require_symbolic=False))


def _untraceable(error: Exception) -> CacheError:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return CacheError(
        "the model cannot be traced for a symbolic sequence length",
        (lines[0] if lines else type(error).__name__)[:300],
        "the forward must be tensor code whose shapes depend on ids.shape only (no Python branch on values or lengths)",
    )


class OwnedWeights:
    """The tensors that a traced module owns, looked up by name at every call: a replaced parameter is seen too."""

    def __init__(self, step: nn.Module, program: torch.export.ExportedProgram) -> None:
        self._step = step
        self._names: list[str] = []
        self._constants: dict[str, Tensor] = {}
        for spec in program.graph_signature.input_specs:
            if spec.kind == InputKind.USER_INPUT:
                continue
            name = (spec.target or "").removeprefix("step.")
            self._names.append(name)
            if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
                self._constants[name] = program.constants[spec.target or ""]

    def __call__(self) -> list[Tensor]:
        return [self._constants[n] if n in self._constants else self._lookup(n) for n in self._names]

    def _lookup(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        return getattr(self._step.get_submodule(path), leaf)


class _Positional(nn.Module):
    """Hands (ids, *weights) on; one signature for modules and for graph modules."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.step(*inputs)


def _user_inputs(program: torch.export.ExportedProgram) -> list[fx.Node]:
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    specs = program.graph_signature.input_specs
    return [node for node, spec in zip(placeholders, specs, strict=True) if spec.kind == InputKind.USER_INPUT]


def _causal_lm(
    program: torch.export.ExportedProgram, graph_module: fx.GraphModule, batch: int, require_symbolic: bool = True
) -> CausalLM:
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    user = _user_inputs(program)
    owned = [node for node in placeholders if node not in user]
    ids = user[0]
    length = ids.meta["val"].shape[1]
    symbolic = isinstance(length, torch.SymInt)
    if require_symbolic and not symbolic:
        raise CacheError(
            "the model works for one sequence length only",
            f"tracing fixed the sequence length to {length}",
            "let the forward take any ids[B, S]; a constant mask or position tensor of one length is the usual cause",
        )
    bounds = program.range_constraints.get(length.node.expr) if symbolic else None
    limits = [int(bounds.upper)] if bounds is not None and bounds.upper.is_Integer else []
    found = bound_length(graph_module.graph, length) if symbolic else None
    limit = min([*limits, *([found] if found else [])], default=None)
    return CausalLM(graph_module, ids, tuple(owned + user[1:]), batch, limit)
