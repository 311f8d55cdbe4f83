"""Trace one iteration of a decode loop into a graph of ATen ops with a symbolic sequence length."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch._functorch.compile_utils import fx_graph_cse
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from smc_compile.errors import CacheError
from smc_compile.passes.capture.untouched import untouched
from smc_compile.passes.fx_tools import erase_dead_code
from smc_compile.passes.ir import CausalLM
from smc_compile.passes.length_guards import LONGEST, lengths_off, path_test

TRACE_LENGTH = 7  # any length >= 2: the sequence axis is symbolic
MOST_BELOW = 16  # lengths below the shortest that a trace stands for, at which a step is run
COMPARED = 256  # the longest text on which a step is run to see whether it takes another branch


def export_step(step: nn.Module, ids: Tensor, weights: Sequence[Tensor], symbolic: bool = True) -> ExportedProgram:
    """Export ``step(ids [B, S], *weights) -> [B, ...]``, ATen ops kept whole (so is attention).

    S is symbolic, or as the tracer finds it if not ``symbolic``: a number where the step holds for one length only.
    Branches go as for texts of ``TRACE_LENGTH`` tokens, or as many as ``ids`` has if these are more.

    Raises:
        Exception: of many types, when the tracer fails.
    """
    length = torch.export.Dim.DYNAMIC if symbolic else torch.export.Dim.AUTO
    inputs = (ids.new_zeros(ids.shape[0], max(TRACE_LENGTH, ids.shape[1])), *weights)
    dynamic = ({1: length}, *({} for _ in weights))
    with warnings.catch_warnings(), torch.no_grad(), untouched(step):
        warnings.simplefilter("ignore")
        return torch.export.export(_Positional(step), inputs, dynamic_shapes=(dynamic,), strict=False)


def causal_lm(program: ExportedProgram) -> CausalLM:
    """The program's graph without dead code; its placeholders are the step's own weights, the ids, explicit weights."""
    erase_dead_code(program.graph)
    ids, *explicit = user_inputs(program)
    owned = [node for node in program.graph.find_nodes(op="placeholder") if node not in (ids, *explicit)]
    _note_constants(program)
    batch, length = ids.meta["val"].shape
    bounds = program.range_constraints.get(length.node.expr) if isinstance(length, torch.SymInt) else None
    longest = int(bounds.upper) if bounds is not None and bounds.upper.is_Integer else None
    return CausalLM(program.graph_module, ids, (*owned, *explicit), int(batch), longest)


def _note_constants(program: ExportedProgram) -> None:
    """``meta["constant"]`` of the placeholders of small constants that the forward holds, such as ``[-1]``."""
    placeholders = program.graph.find_nodes(op="placeholder")
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        if spec.kind == InputKind.CONSTANT_TENSOR and program.constants[spec.target or ""].numel() == 1:
            node.meta["constant"] = program.constants[spec.target or ""]


def require_any_length(lm: CausalLM) -> CausalLM:
    """The model itself.

    Raises:
        CacheError: when the trace fixed its length.
    """
    length = lm.ids.meta["val"].shape[1]
    if not isinstance(length, torch.SymInt):
        raise CacheError(
            "the model works for one sequence length only",
            f"tracing fixed the sequence length to {length}",
            "let the forward take any ids[B, S]; a constant mask or position tensor of one length is the usual cause",
        )
    return lm


def share_subexpressions(lm: CausalLM) -> CausalLM:
    """The model with equal values computed once: layers slice the same position tables again and again."""
    graph = fx_graph_cse(lm.graph)
    erase_dead_code(graph)
    copies = dict(zip(lm.graph.find_nodes(op="placeholder"), graph.find_nodes(op="placeholder"), strict=True))
    module = fx.GraphModule(lm.graph_module, graph)
    return replace(lm, graph_module=module, ids=copies[lm.ids], weights=tuple(copies[node] for node in lm.weights))


def lengths_to_compare(program: ExportedProgram) -> list[int]:
    """Lengths at which the step may take another branch than the one that was traced, and is cheap to run.

    Those below the shortest that the trace stands for, some of many; of those at which a guard fails, all that are
    shorter than the usual traced text, and for each guard the first two beyond the traced one.
    """
    bounds = program.range_constraints.get(_length(program))
    fewest = int(bounds.lower) if bounds is not None and bounds.lower.is_Integer else 2
    most = int(bounds.upper) if bounds is not None and bounds.upper.is_Integer else LONGEST
    guards, symbol = _guards(program), _length(program)
    tests = [path_test(guard, symbol) for guard in guards]
    short = {n for n in range(2, TRACE_LENGTH + 1) for holds in tests if not holds(n)}
    far = {n for guard in guards for n in itertools.islice(_lengths_off(program, guard), 2) if n <= most}
    below = {*range(2, fewest, max(1, fewest // MOST_BELOW)), max(2, fewest - 1)} if fewest > 2 else set()
    return sorted({*below, *short, *(n for n in far if n <= COMPARED)})


def longest_comparable(program: ExportedProgram) -> int | None:
    """The longest text below the first one at which a branch may begin that is too long to be compared."""
    far = [next((n for n in _lengths_off(program, guard) if n > COMPARED), None) for guard in _guards(program)]
    return min((n - 1 for n in far if n is not None), default=None)


def _length(program: ExportedProgram) -> Any:
    """The length of the text as the tracer's symbol, or as a number."""
    length = user_inputs(program)[0].meta["val"].shape[1]
    return length.node.expr if isinstance(length, torch.SymInt) else length


def _guards(program: ExportedProgram) -> list[sympy.Basic]:
    """What the tracer noted of branches on the length, each once."""
    length = user_inputs(program)[0].meta["val"].shape[1]
    if not isinstance(_length(program), sympy.Symbol):
        return []
    return list(dict.fromkeys(guard.expr for guard in length.node.shape_env.guards))


def _lengths_off(program: ExportedProgram, guard: sympy.Basic) -> Iterator[int]:
    """The lengths beyond the traced one at which a guard fails."""
    return lengths_off(guard, _length(program), user_inputs(program)[0].meta["val"].shape[1].node.hint)


def user_inputs(program: ExportedProgram) -> list[fx.Node]:
    """The placeholders of the token ids and of the explicit weights."""
    placeholders = program.graph.find_nodes(op="placeholder")
    specs = program.graph_signature.input_specs
    return [node for node, spec in zip(placeholders, specs, strict=True) if spec.kind == InputKind.USER_INPUT]


def untraceable(error: Exception) -> CacheError:
    """The error for a step that the tracer refuses, with the tracer's reason."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return CacheError(
        "the model cannot be traced for a symbolic sequence length",
        (lines[0] if lines else type(error).__name__)[:300],
        "the forward must be tensor code whose shapes depend on ids.shape only (no Python branch on values or lengths)",
    )


class OwnedWeights:
    """The tensors that a traced module owns, looked up by name at every call: a replaced parameter is seen too."""

    def __init__(self, step: nn.Module, program: ExportedProgram) -> None:
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
        if "parametrizations." in name and (part := PART_OF_WEIGHT.fullmatch(name)):
            weight: Tensor = getattr(self._module(part["path"] or ""), part["leaf"])
            parts = list(plain_tensors(weight))
            if parts[0] is not weight:
                return parts[int(part["number"])]
        path, _, leaf = name.rpartition(".")
        found: Tensor = getattr(self._module(path), leaf)
        return found

    def _module(self, path: str) -> nn.Module:
        """As ``get_submodule``, which takes ten times as long."""
        module = self._step
        for name in path.split(".") if path else ():
            module = module._modules[name]  # type: ignore[assignment]
        return module


# How the exporter names the tensors that a weight of a tensor subclass, such as a quantised one, is made of.
PART_OF_WEIGHT = re.compile(r"(?:(?P<path>.+)\.)?parametrizations\.(?P<leaf>\w+)\.original(?P<number>\d+)")


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a tensor subclass is made of, in the order in which it names them."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(getattr(tensor, name))


class _Positional(nn.Module):
    """Hands (ids, *weights) on; one signature for modules and for graph modules."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.step(*inputs)
