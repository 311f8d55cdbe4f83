"""Sizes become numbers: a copy of Dynamo's graph with one static path, in which `torch.while_loop` is unrolled."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from smc_compile.passes.fx_tools import op_name
from smc_compile.passes.loop.needs_value import NeedsValue
from smc_compile.passes.loop.tensor_info import TensorInfo, plain_tensor
from smc_compile.passes.loop.while_loops import Counted, decode_body, evaluate_constants

UNROLLED = 3  # iterations of a while_loop that are copied: two make an affine fit, the third checks it


@dataclass(frozen=True)
class Concrete:
    """A graph of concrete sizes; nodes know their ``meta["tensor"]``.

    Attributes:
        fixed_floats: (number of the placeholder, value) of the Python floats that became constants.
        unrolled: iterations of a while_loop that are in the graph; their nodes know ``meta["iteration"]``.
        remaining: iterations of that while_loop that are not in the graph; they are proved to be like those that are.
    """

    graph: fx.Graph
    fixed_floats: tuple[tuple[int, float], ...]
    unrolled: int = 0
    remaining: int = 0


def concretise(
    gm: fx.GraphModule, example_inputs: Sequence[Any], sizes: dict[sympy.Expr, int] | None = None
) -> Concrete:
    """Copy the graph with the sizes of `example_inputs`; a while_loop that draws tokens becomes its first iterations.

    Args:
        sizes: values of symbolic sizes that replace those of the inputs.

    Raises:
        LoopError: a while_loop draws tokens, but is not bounded by a counter alone.
    """
    copier = _Copier(gm, example_inputs)
    copier.sizes.values.update({symbol: sympy.Integer(size) for symbol, size in (sizes or {}).items()})
    copier.run()
    fixed = tuple(sorted(copier.fixed.items()))
    return Concrete(copier.graph, fixed, copier.unrolled, copier.remaining)


class _Sizes:
    """Values of symbolic sizes, taken from the inputs at hand."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self.values: dict[sympy.Expr, sympy.Integer] = {}
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        for node, real in zip(placeholders, example_inputs, strict=False):
            symbolic = node.meta.get("example_value")
            if isinstance(symbolic, torch.SymInt):
                self.bind(symbolic, real)
            elif isinstance(symbolic, torch.Tensor) and isinstance(real, torch.Tensor):
                for size, real_size in zip(symbolic.shape, real.shape, strict=True):
                    self.bind(size, real_size)

    def bind(self, symbolic: Any, real: Any) -> None:
        if isinstance(symbolic, torch.SymInt) and isinstance(real, int) and not isinstance(real, torch.SymInt):
            self.values[symbolic.node.expr] = sympy.Integer(real)

    def __call__(self, value: Any) -> Any:
        """A plain int or bool for a symbolic one."""
        if not isinstance(value, torch.SymInt | torch.SymBool):
            return value
        known = sympy.sympify(value.node.expr).xreplace(self.values)
        plain = known if known.is_number or known in (sympy.true, sympy.false) else value.node.hint
        if plain is None:
            raise NeedsValue(
                "A number of the decode loop depends on the values of a tensor.",
                f"{value} is read from a tensor or counted in one (.item(), .tolist(), unique(), nonzero(), x[mask])",
                "keep the loop in tensors of fixed shapes; what reads the text before it draws goes to "
                "generate(..., logits_processor=[...])",
            )
        return bool(plain) if isinstance(value, torch.SymBool) else int(plain)

    def constant(self, value: Any) -> tuple[bool, Any]:
        """(True, v) if a node's example value is a size, a shape or a truth value."""
        if isinstance(value, int | torch.SymInt | torch.SymBool):
            return True, self(value)
        if isinstance(value, tuple | list) and all(isinstance(v, int | torch.SymInt) for v in value):
            return True, tuple(self(v) for v in value)
        return False, None


class _Copier:
    """Copies a graph node by node: sizes are computed, while_loops unrolled, all else is copied."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self.gm, self.sizes, self.graph = gm, _Sizes(gm, example_inputs), fx.Graph()
        self.placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        self.inputs = dict(zip(self.placeholders, example_inputs, strict=False))
        self.known: dict[fx.Node, Any] = {}  # node -> its copy, the number that it is, or what a while_loop carries
        self.floats: dict[fx.Node, fx.Node] = {}  # a float read from a tensor -> the tensor
        self.fixed: dict[int, float] = {}
        self.unrolled = self.remaining = 0

    def run(self) -> None:
        for node in self.gm.graph.nodes:
            body = decode_body(self.gm, node)
            if body is not None:
                self.unroll(node, body)
            elif op_name(node) == "getitem" and isinstance(self.known.get(node.args[0]), list):
                self.known[node] = self.known[node.args[0]][node.args[1]]
            else:
                self.copy(node)

    def copy(self, node: fx.Node, path: str = "", storage: Callable[[int], int] = int) -> None:
        value = node.meta.get("example_value")
        is_constant, constant = self.sizes.constant(value)
        if is_constant and node.op not in ("placeholder", "output"):
            self.known[node] = constant
            return
        args, kwargs = fx.map_arg(_with_tensor_floats(node, self.floats), self.operand)
        target = path + str(node.target) if node.op == "get_attr" else node.target
        copy = self.graph.create_node(node.op, target, args, kwargs, node.name)
        copy.meta = dict(node.meta)
        self.known[node] = constant if is_constant else copy
        if isinstance(value, torch.SymFloat) and node.target == "item":
            self.floats[node] = node.args[0]  # type: ignore[assignment]
        if isinstance(value, torch.Tensor):
            shape = tuple(self.sizes(size) for size in value.shape)
            copy.meta["tensor"] = TensorInfo(shape, value.dtype, storage(value.untyped_storage()._cdata))
        if node.op == "get_attr":
            copy.meta["constant"] = operator.attrgetter(str(target))(self.gm)

    def operand(self, source: fx.Node) -> Any:
        """The copy of a node or the number that it is; a lifted float that must be a number becomes one."""
        value = plain_tensor(self.inputs.get(self.floats[source])) if source in self.floats else None
        if value is None:
            return self.known[source]
        self.fixed[self.placeholders.index(self.floats[source])] = value.item()
        return value.item()

    def unroll(self, node: fx.Node, body: fx.GraphModule) -> None:
        """Copies the first iterations of a while_loop; the others are proved to go on in the same way."""
        carried, constants = node.args[2], node.args[3]
        assert isinstance(carried, tuple | list)
        assert isinstance(constants, tuple | list)
        sources = [*carried, *constants]
        operands = [self.known[s] if isinstance(s, fx.Node) else s for s in sources]
        folded = evaluate_constants(self.graph.nodes, {})
        values = [folded.get(o) if isinstance(o, fx.Node) else o for o in operands]
        cond = operator.attrgetter(str(node.args[0].target))(self.gm)  # type: ignore[union-attr]
        iterations = Counted(node, cond, body, values, len(carried)).iterations()
        inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
        for inner, outer in zip(inputs, sources, strict=True):
            if outer in self.floats:
                self.floats[inner] = self.floats[outer]  # type: ignore[index]
        path = f"{node.args[1].target}."  # type: ignore[union-attr]
        for iteration in range(min(iterations, UNROLLED)):
            operands[: len(carried)] = self.copy_iteration(body, operands, path, self.unrolled + iteration)
        self.known[node] = operands[: len(carried)]
        self.remaining += max(iterations - UNROLLED, 0)
        self.unrolled += min(iterations, UNROLLED)

    def copy_iteration(self, body: fx.GraphModule, operands: Sequence[Any], path: str, iteration: int) -> list[Any]:
        """Copies the body once and returns what it carries on; every iteration has storages of its own."""
        before = len(self.graph.nodes)
        storages: dict[int, int] = {}
        inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
        for node, operand in zip(inputs, operands, strict=True):
            value = node.meta.get("example_value")
            self.known[node] = operand
            self.sizes.bind(value, operand)
            if isinstance(value, torch.Tensor) and isinstance(operand, fx.Node):
                storages[value.untyped_storage()._cdata] = operand.meta["tensor"].storage
        for node in body.graph.nodes:
            if node.op not in ("placeholder", "output"):
                self.copy(node, path, lambda cdata: storages.setdefault(cdata, hash((iteration, cdata))))
        for copy in list(self.graph.nodes)[before:]:
            copy.meta["iteration"] = iteration
        carried = next(iter(reversed(body.graph.nodes))).args[0]
        return [self.known[out] if isinstance(out, fx.Node) else out for out in carried]  # type: ignore[union-attr]


_TENSOR_ARITHMETIC = frozenset(["add", "sub", "mul", "truediv", "div", "pow", "rsub", "lt", "le", "gt", "ge", "clamp"])


def _with_tensor_floats(node: fx.Node, floats: dict[fx.Node, fx.Node]) -> tuple[Any, Any]:
    """Reads a lifted Python float as the 0-dim tensor that holds it, so that its value stays an input of `step`."""
    if not floats or not any(source in floats for source in node.all_input_nodes):
        return node.args, node.kwargs
    name, args = op_name(node), node.args
    if name == "embedding" and len(args) > 4 and args[3] is None:
        return (*args[:4], 2.0, *args[5:]), node.kwargs  # norm_type counts only with max_norm
    if name == "dropout" and len(args) > 2 and args[2] is False:
        return (args[0], 0.0, *args[2:]), node.kwargs
    if name in _TENSOR_ARITHMETIC and isinstance(node.meta.get("example_value"), torch.Tensor):
        return fx.map_arg((args, node.kwargs), lambda source: floats.get(source, source))
    return args, node.kwargs
