"""Tools for graphs, one copy for all passes: what a node is called, reads, writes and computes, and what it reaches.

They work on graphs of Dynamo (torch functions and methods) and of export (ATen ops) alike.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.operator_schemas import normalize_function

from smc_compile.passes.torch_versions import METHODS_OF_OPERATORS, with_symbolic_sizes

# ---- names and places ------------------------------------------------------------------------------------------------

_TORCH_ROOT = os.path.dirname(torch.__file__) + os.sep
_PROGRAM = os.path.join("smc_compile", "program") + os.sep  # stands in for models there
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*(?:\n    ([^\n]*))?')


def op_name(node: fx.Node) -> str:
    """``cat`` for torch.cat, Tensor.cat and aten.cat.default alike; '' for nodes that are not calls."""
    if node.op == "call_method":
        return METHODS_OF_OPERATORS.get(str(node.target), str(node.target))
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.rpartition("::")[2]
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", node.target))
    return ""


def user_line(node: fx.Node) -> str:
    """The source line that made a node, ``file.py:12: code``: the innermost frame that is the user's. '' if unknown."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [f for f in frames if not f[0].startswith(_TORCH_ROOT) and _PROGRAM not in f[0]] or frames
    if not own:
        return ""
    path, number, code = own[-1]
    return f"{os.path.basename(path)}:{number}: {code.strip()}"


def describe(node: fx.Node) -> str:
    """A node for an error message: ```mm_1` (mm) at file.py:12: code``."""
    line = user_line(node)
    return f"`{node.name}` ({op_name(node) or node.op})" + (f" at {line}" if line else "")


# ---- what a node reads and writes ------------------------------------------------------------------------------------


def output_values(graph: fx.Graph) -> list[Any]:
    """The flat list of values that a graph returns."""
    values = graph.output_node().args[0]
    return list(values) if isinstance(values, (list, tuple)) else [values]


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen op by name, defaults filled in. The schema's ``self`` is called ``input``."""
    normalized = normalize_function(node.target, node.args, node.kwargs, normalize_to_only_use_kwargs=True)  # type: ignore[arg-type]
    assert normalized is not None, f"internal: the arguments of {node.target} fit no schema"
    return normalized.kwargs


_INPLACE_OPERATORS = frozenset(
    ["setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ior", "iand", "ixor", "ipow", "imod", "imatmul"]
)
_INPLACE_FLAG = frozenset(["relu", "silu", "relu6", "leaky_relu", "elu", "mish", "dropout", "hardswish", "threshold"])


def mutated_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs that a call writes to."""
    if node.op not in ("call_function", "call_method"):
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema.arguments
        given = {**dict(zip((spec.name for spec in schema), node.args, strict=False)), **node.kwargs}
        return _nodes_in([given.get(spec.name) for spec in schema if spec.is_write])
    name = op_name(node)
    inplace = name in _INPLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
    flagged = node.kwargs.get("inplace") is True or (name in _INPLACE_FLAG and node.args[-1:] == (True,))
    return _nodes_in([*(node.args[:1] if inplace or flagged else ()), node.kwargs.get("out")])


def _nodes_in(values: Any) -> list[fx.Node]:
    """The nodes in nested lists and tuples."""
    found: list[fx.Node] = []
    fx.map_arg(values, found.append)
    return found


def erase_dead_code(graph: fx.Graph) -> bool:
    """Erase the nodes that no output needs; placeholders and writes in place stay. Returns whether any was erased."""
    return graph.eliminate_dead_code(
        is_impure_node=lambda node: node.op in ("placeholder", "output") or bool(mutated_inputs(node))
    )


# ---- what a node computes --------------------------------------------------------------------------------------------


# What changes the state of the process, and computes nothing.
_SWITCHES = frozenset(
    ["_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode",
     "manual_seed", "set_rng_state", "set_default_dtype"]
)  # fmt: skip


def call_node(node: fx.Node, args: Iterable[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the function or method of a node returns for these arguments; a switch of torch's state is not called."""
    if op_name(node) in _SWITCHES:
        return None
    if node.op == "call_method":
        receiver, *rest = args
        return getattr(receiver, str(node.target))(*rest, **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def run_node(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """What a node computes from the values of its inputs."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    return call_node(node, args, kwargs)


def value_without_data(node: fx.Node) -> Any:
    """What a node computes from ``meta["val"]`` of its inputs: fake tensors and symbolic sizes."""
    inputs = (source.meta.get("val") for source in node.graph.find_nodes(op="placeholder"))
    fake = next((value for value in inputs if isinstance(value, FakeTensor)), None)
    with fake.fake_mode if fake is not None else nullcontext(), with_symbolic_sizes():
        return run_node(node, {source: source.meta["val"] for source in node.all_input_nodes})


# ---- what a node reaches ---------------------------------------------------------------------------------------------


def reachable(starts: Iterable[fx.Node], neighbours: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """The starts, and the nodes that ``neighbours`` leads to in any number of steps; ``sorted`` puts them in order."""
    pending = list(starts)
    found = set(pending)
    while pending:
        for node in neighbours(pending.pop()):
            if node not in found:
                found.add(node)
                pending.append(node)
    return found


def ancestors(*nodes: fx.Node) -> set[fx.Node]:
    """The nodes and everything that they are computed from."""
    return reachable(nodes, lambda node: node.all_input_nodes)


def descendants(*nodes: fx.Node) -> set[fx.Node]:
    """The nodes and everything that is computed from them."""
    return reachable(nodes, lambda node: node.users)
