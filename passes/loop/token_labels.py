"""Which token stands in which cell: an abstract interpretation of the integer values of a decode loop.

Every cell of an integer tensor is given a *label* that says where its value comes from: a cell of the prompt, a cell of
the result of some node, or a plain constant. Operators that only move cells about (``cat``, slices, ``buf[:, t] = x``,
``stack``, ``where`` with a known mask) are then simply run on the labels, by PyTorch itself; views and in-place writes
keep their meaning because the label tensors alias each other just as the real ones do. Values free of labels are
ordinary constants and are folded. So no style of writing a loop is known here, and all of them are understood.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from smc_compile.passes.fx_tools import call_node, mutated_inputs, op_name
from smc_compile.passes.loop.draws import is_random
from smc_compile.passes.loop.tensor_info import TOKEN_DTYPES, TensorInfo, plain_tensor, tensor_info

# A label: flag, source (number of the node), row, column. Anything below the flag is a constant.
_FLAG = 1 << 62
_SOURCE_SHIFT, _ROW_SHIFT = 38, 24
_SOURCES, _ROWS, _COLUMNS = 1 << 24, 1 << 14, 1 << 24
_ROW_MASK = (_ROWS - 1) << _ROW_SHIFT

_TRACKED_DTYPES = (*TOKEN_DTYPES, torch.bool)
_FOLD_LIMIT = 4096  # constants larger than this, and than a few token buffers, cannot be positions in one

LOOKUPS = frozenset(["index_select", "gather", "take_along_dim", "getitem"])
_CASTS = frozenset(["to", "long", "int", "type", "type_as", "cuda", "cpu"])
_CREATES = frozenset(
    f"{prefix}{name}{suffix}"
    for name in ("zeros", "ones", "full", "empty", "arange", "tensor", "as_tensor", "scalar_tensor")
    for prefix, suffix in (("", ""), ("new_", ""), ("", "_like"))
)

# Operators that move cells: op -> the numbers of the arguments that say *where* cells go, which must be known.
_NOWHERE: frozenset[int] = frozenset()
MOVES: dict[str, frozenset[int]] = {
    **dict.fromkeys(["cat", "concat", "concatenate", "stack", "hstack", "vstack", "column_stack"], _NOWHERE),
    **dict.fromkeys(["unsqueeze", "squeeze", "unsqueeze_", "squeeze_", "flatten", "unflatten", "ravel"], _NOWHERE),
    **dict.fromkeys(["view", "view_as", "reshape", "reshape_as", "expand", "expand_as", "repeat", "tile"], _NOWHERE),
    **dict.fromkeys(["transpose", "t", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "getattr"], _NOWHERE),
    **dict.fromkeys(["chunk", "split", "tensor_split", "unbind", "roll", "flip", "diagonal", "pad"], _NOWHERE),
    **dict.fromkeys(["clone", "contiguous", "detach", "alias", "copy_", "fill_", "zero_"], _NOWHERE),
    **dict.fromkeys(["slice_scatter", "select_scatter"], _NOWHERE),
    **dict.fromkeys(["getitem", "setitem"], frozenset([1])),
    **dict.fromkeys(["select", "index_select", "gather"], frozenset([1, 2])),
    "narrow": frozenset([1, 2, 3]),
    **dict.fromkeys(["scatter", "scatter_", "index_copy", "index_copy_"], frozenset([1, 2])),
    **dict.fromkeys(["index_fill", "index_fill_"], frozenset([1, 2])),
    **dict.fromkeys(["take_along_dim", "masked_fill", "masked_fill_", "masked_scatter"], frozenset([1])),
    **dict.fromkeys(["masked_scatter_", "index_put", "index_put_"], frozenset([1])),
    "where": frozenset([0]),
}
_WHERE_NAMES = frozenset(["index", "indices", "mask", "condition", "dim", "start", "length"])  # the same by keyword


@dataclass(frozen=True)
class Reading:
    """What a node finds in an integer input at the moment it runs.

    Attributes:
        columns: one entry per column, or None if the cells do not form columns over the batch.
        sources: the nodes that the cells come from.
        exact: the value has shape [B, columns] (or [columns] for a batch of one), each column in batch order.
        ndim: how many axes the value has.
    """

    columns: tuple[int, ...] | None
    sources: frozenset[fx.Node]
    exact: bool
    ndim: int


@dataclass(frozen=True)
class LookupIndex:
    """A constant by which a look-up reads.

    Attributes:
        shape: of the index tensor.
        index: the one number that all its cells hold, or None.
        counts: whether it is 0, 1, 2, ...
    """

    shape: tuple[int, ...]
    index: int | None
    counts: bool


@dataclass(frozen=True)
class Layouts:
    """Where the tokens of a graph stand.

    Attributes:
        prompt: the placeholder of the prompt, [B, P] or [P].
        readings: (node, source) -> the labels that the node finds in the source.
        places: (look-up, source) -> the constant by which it reads.
        outputs: the labels of each integer output.
        nodes, order: the nodes of the graph, and the number of each.
    """

    prompt: fx.Node
    batch: int
    prompt_length: int
    readings: dict[tuple[fx.Node, fx.Node], Reading]
    places: dict[tuple[fx.Node, fx.Node], LookupIndex]
    outputs: dict[fx.Node, torch.Tensor]
    nodes: tuple[fx.Node, ...]
    order: dict[fx.Node, int]

    def history(self, tokens: Sequence[fx.Node]) -> tuple[int, ...]:
        """The columns of the prompt followed by these tokens."""
        first = _code(self.order[self.prompt])
        return tuple(range(first, first + self.prompt_length)) + tuple(_code(self.order[token]) for token in tokens)

    def source(self, column: int) -> fx.Node | None:
        """The node a column comes from; None for a constant."""
        return self.nodes[(column >> _SOURCE_SHIFT) & (_SOURCES - 1)] if column >= _FLAG else None

    def is_token(self, column: int) -> bool:
        """True if the column is the whole of one node's [B] or [B, 1] result."""
        source = self.source(column)
        return source is not None and column & (_COLUMNS - 1) == 0 and source.op != "placeholder"

    def labels(self, tokens: Sequence[fx.Node]) -> tuple[torch.Tensor, torch.Tensor]:
        """The labels [B, P] of the prompt and [B, n] of these tokens."""
        rows = torch.arange(self.batch, dtype=torch.int64)[:, None] * (1 << _ROW_SHIFT)
        columns = rows + torch.tensor(self.history(tokens), dtype=torch.int64)[None]
        return columns[:, : self.prompt_length], columns[:, self.prompt_length :]


def may_be_prompt(node: fx.Node) -> bool:
    """Whether an input holds token ids [B, P] or [P] that something reads."""
    info = tensor_info(node)
    if node.op != "placeholder" or info is None or info.dtype not in TOKEN_DTYPES:
        return False
    return len(info.shape) in (1, 2) and info.numel > 0 and bool(node.users)


def interpret(nodes: Sequence[fx.Node], prompt: fx.Node) -> Layouts:
    """Label the cells of all integer values of a graph of concrete shapes, in which `prompt` is [B, P] or [P]."""
    info = tensor_info(prompt)
    assert info is not None
    rows, length = (1, info.shape[0]) if len(info.shape) == 1 else (info.shape[0], info.shape[1])
    interpreter = TokenInterpreter(nodes, prompt, rows, length)
    with _disable_current_modes(), torch.no_grad(), torch.device("cpu"):
        interpreter.run()
    found = (interpreter.readings, interpreter.places, interpreter.outputs)
    return Layouts(prompt, rows, length, *found, tuple(nodes), interpreter.order)


class TokenInterpreter:
    """Runs a graph on labels; a value that it does not know is a source of labels of its own."""

    def __init__(self, nodes: Sequence[fx.Node], prompt: fx.Node, batch: int, length: int) -> None:
        self.nodes, self.prompt, self.batch, self.length = nodes, prompt, batch, length
        self.order = {node: i for i, node in enumerate(nodes)}
        self.values: dict[fx.Node, Any] = {}
        self.readings: dict[tuple[fx.Node, fx.Node], Reading] = {}
        self.places: dict[tuple[fx.Node, fx.Node], LookupIndex] = {}
        self.outputs: dict[fx.Node, torch.Tensor] = {}
        self.lost: list[torch.Tensor] = []  # truth values that such a write may have changed
        self.fold_limit = max(_FOLD_LIMIT, 4 * batch * (length + len(nodes)))

    def run(self) -> None:
        last_use = {source: node for node in self.nodes for source in node.all_input_nodes}
        for node in self.nodes:
            self.step(node)
            for source in node.all_input_nodes:
                if last_use[source] is node:
                    self.values.pop(source, None)

    def step(self, node: fx.Node) -> None:
        if node is self.prompt:
            info = tensor_info(node)
            assert info is not None
            self.values[node] = self.labels(node, (self.batch, self.length)).reshape(info.shape)
        elif node.op == "get_attr":
            self.constant(node)
        elif node.op in ("call_function", "call_method"):
            self.record_readings(node)
            self.call(node)
        elif node.op == "output":
            found = {source: self.value(source, materialise=True) for source in node.all_input_nodes}
            self.outputs = {source: value for source, value in found.items() if isinstance(value, torch.Tensor)}

    def call(self, node: fx.Node) -> None:
        handled, value = self.evaluate(node)
        if handled:
            if value is not None:
                self.values[node] = value
            return
        for target in mutated_inputs(node):
            self.poison(node, target)

    def evaluate(self, node: fx.Node) -> tuple[bool, Any]:
        """(True, value) if the node is understood; value None then means that it is a source of its own."""
        name = op_name(node)
        if is_random(node):
            return False, None
        if name in _CREATES:
            return self.create(node, name)
        if name in _CASTS:
            return self.cast(node)
        info = tensor_info(node)
        if info is not None and info.dtype not in _TRACKED_DTYPES:
            return False, None
        moves = name in MOVES
        where = MOVES.get(name, frozenset())
        if name == "where" and node.op == "call_method":
            where = frozenset([1])
        if not self.operands_known(node, moves, where, mutates=bool(mutated_inputs(node))):
            return False, None
        if not moves and info is not None and info.numel > self.fold_limit:
            return False, None
        return self.execute(node, materialise=moves)

    def operands_known(self, node: fx.Node, moves: bool, where: frozenset[int], mutates: bool) -> bool:
        """Whether a call can be run on labels.

        Arguments that say where cells go must be constants, and so must all operands of a call that computes.
        """
        several = len(node.all_input_nodes) > 1 or mutates
        for source, is_place in _operands(node, where):
            value = self.value(source)
            if value is None:
                info = tensor_info(source)
                # A part of a larger result (such as one column of sorted indices) is a source of its own.
                movable = moves and not is_place and info is not None and info.dtype in TOKEN_DTYPES
                if not movable or info is None or not (several or info.numel == self.batch):
                    return False
            elif (is_place or not moves) and _has_labels(value):
                return False
        return True

    def execute(self, node: fx.Node, materialise: bool) -> tuple[bool, Any]:
        def operand(source: fx.Node) -> Any:
            return self.value(source, materialise)

        args = on_cpu(fx.map_arg(node.args, operand))
        kwargs = on_cpu(fx.map_arg(dict(node.kwargs), operand))
        try:
            result = call_node(node, args, kwargs)
        except Exception:  # labels are no values that this op takes
            return False, None
        if isinstance(result, torch.Tensor):
            result = result.to(torch.int64) if result.dtype == torch.int32 else result
            info = tensor_info(node)
            tracked = result.dtype in _TRACKED_DTYPES and (info is None or tuple(result.shape) == info.shape)
            return tracked, result if tracked else None
        return (True, result) if isinstance(result, tuple | list) else (result is None, None)

    def create(self, node: fx.Node, name: str) -> tuple[bool, Any]:
        info = tensor_info(node)
        if info is None or info.dtype not in _TRACKED_DTYPES:
            return False, None
        if "empty" in name and info.dtype in TOKEN_DTYPES:
            return True, self.labels(node, info.shape, uninitialised=True)
        if name.endswith("_like") or name.startswith("new_"):
            return True, self.filled(node, name, info)
        return self.execute(node, materialise=False)

    def filled(self, node: fx.Node, name: str, info: TensorInfo) -> torch.Tensor | None:
        """``zeros_like(x)``, ``x.new_ones(...)`` and the like: of x only the shape matters."""
        dtype = torch.bool if info.dtype == torch.bool else torch.int64
        fill: Any = {"zeros": 0, "ones": 1}.get(name.removeprefix("new_").removesuffix("_like"))
        if fill is None:
            last = node.kwargs.get("fill_value", node.args[-1])
            fill = last if isinstance(last, int) else None
        return None if fill is None else torch.full(info.shape, fill, dtype=dtype)

    def cast(self, node: fx.Node) -> tuple[bool, Any]:
        source, info = node.args[0], tensor_info(node)
        if not isinstance(source, fx.Node) or info is None or info.dtype not in TOKEN_DTYPES:
            return False, None
        before = tensor_info(source)
        if before is None or before.dtype not in _TRACKED_DTYPES:
            return False, None
        value = self.value(source, materialise=before.dtype in TOKEN_DTYPES and before.numel == self.batch)
        if not isinstance(value, torch.Tensor):
            return False, None
        return True, value if before.dtype == info.dtype else value.to(torch.int64, copy=True)

    def constant(self, node: fx.Node) -> None:
        value = plain_tensor(node.meta.get("constant"))
        if value is not None and value.dtype in _TRACKED_DTYPES and value.numel() <= self.fold_limit:
            self.values[node] = value.to("cpu", torch.bool if value.dtype == torch.bool else torch.int64, copy=True)

    def value(self, node: fx.Node, materialise: bool = False) -> Any:
        """The labels or constants of a node, or None; with ``materialise`` a node of integers gets its own labels."""
        value = self.values.get(node)
        if isinstance(value, torch.Tensor) and self.is_lost(value):
            return None
        info = tensor_info(node)
        if value is not None or not materialise or info is None or info.dtype not in TOKEN_DTYPES:
            return value
        self.values[node] = self.labels(node, info.shape)
        return self.values[node]

    def constant_value(self, node: fx.Node) -> torch.Tensor | None:
        """The integers of a node, if none of them comes from a token or the prompt."""
        value = self.value(node)
        return value if isinstance(value, torch.Tensor) and not _has_labels(value) else None

    def labels(self, node: fx.Node, shape: tuple[int, ...], uninitialised: bool = False) -> torch.Tensor:
        base = _code(self.order[node])
        size = torch.Size(shape).numel()
        cells = torch.arange(size, dtype=torch.int64)
        if node is self.prompt:
            codes = base + (cells // self.length) * (1 << _ROW_SHIFT) + cells % self.length
        elif size == self.batch and not uninitialised:
            codes = base + cells * (1 << _ROW_SHIFT)
        else:  # a column other than 0 never passes for a token
            codes = base + 1 + cells % (_COLUMNS - 1)
        return codes.reshape(shape)

    def poison(self, node: fx.Node, target: fx.Node) -> None:
        """After a write that is not understood, every cell of its target comes from the writing node."""
        value = self.value(target, materialise=True)
        if not isinstance(value, torch.Tensor):
            return
        if value.dtype == torch.int64:
            value.copy_(self.labels(node, tuple(value.shape)))
        else:
            self.lost.append(value)

    def is_lost(self, value: torch.Tensor) -> bool:
        pointer = value.untyped_storage().data_ptr() if self.lost else 0
        return any(pointer == gone.untyped_storage().data_ptr() for gone in self.lost)

    def record_readings(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            value = self.value(source)
            if value is None:
                info = tensor_info(source)
                small = info is not None and info.dtype in TOKEN_DTYPES and info.numel == self.batch
                if small and source.op != "placeholder":
                    value = self.labels(source, info.shape)  # type: ignore[union-attr]
            if isinstance(value, torch.Tensor) and _has_labels(value):
                self.readings[node, source] = self.read_columns(value)
            elif op_name(node) in LOOKUPS and isinstance(value, torch.Tensor) and value.dtype == torch.int64:
                flat = value.flatten()
                index = int(flat[0]) if len(flat) and bool((flat == flat[0]).all()) else None
                counts = value.ndim == 1 and torch.equal(flat, torch.arange(len(flat)))
                self.places[node, source] = LookupIndex(tuple(value.shape), index, counts)

    def read_columns(self, value: torch.Tensor) -> Reading:
        """An integer tensor as columns over the batch, if it consists of such."""
        batch = self.batch
        by_row = (value.ndim == 2 and value.shape[0] == batch) or (value.ndim == 1 and batch == 1)
        if by_row:
            cells = value.reshape(batch, -1)
            first = cells[0]
            steps = torch.where(first >= _FLAG, 1 << _ROW_SHIFT, 0)
            in_order = torch.equal(cells, first + torch.arange(batch)[:, None] * steps)
            if in_order and not ((first >= _FLAG) & ((first & _ROW_MASK) != 0)).any():
                return Reading(tuple(first.tolist()), self.sources(first), True, value.ndim)
        flat = value.flatten()
        cells, counts = torch.unique(torch.where(flat >= _FLAG, flat & ~_ROW_MASK, flat), return_counts=True)
        distinct = torch.unique(flat).numel() == flat.numel()
        whole = distinct and bool((cells >= _FLAG).all()) and bool((counts == batch).all())
        return Reading(tuple(cells.tolist()) if whole else None, self.sources(cells), False, value.ndim)

    def sources(self, cells: torch.Tensor) -> frozenset[fx.Node]:
        numbers = (cells[cells >= _FLAG] - _FLAG) >> _SOURCE_SHIFT
        return frozenset(self.nodes[number] for number in numbers.unique().tolist())


def _code(source: int) -> int:
    return _FLAG | source << _SOURCE_SHIFT


def _has_labels(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_has_labels(item) for item in value)
    return isinstance(value, torch.Tensor) and value.dtype == torch.int64 and bool((value >= _FLAG).any())


def _operands(node: fx.Node, where: frozenset[int]) -> Iterator[tuple[fx.Node, bool]]:
    """Each tensor operand and whether it says where cells go."""
    places = [(arg, i in where) for i, arg in enumerate(node.args)]
    places += [(arg, name in _WHERE_NAMES) for name, arg in node.kwargs.items()]
    for arg, is_place in places:
        found: list[fx.Node] = []
        fx.map_arg(arg, found.append)
        for source in found:
            yield source, is_place


def on_cpu(args: Any) -> Any:
    """The arguments of a call with int64 for int32 and the CPU for any device: that is where label tensors live."""
    if isinstance(args, torch.device):
        return torch.device("cpu")
    if args is torch.int32:
        return torch.int64
    if isinstance(args, slice):
        return slice(on_cpu(args.start), on_cpu(args.stop), on_cpu(args.step))
    if isinstance(args, dict):
        return {key: "cpu" if key == "device" else on_cpu(item) for key, item in args.items()}
    if type(args) in (tuple, list, fx.immutable_collections.immutable_list):
        return (tuple if isinstance(args, tuple) else list)(on_cpu(item) for item in args)
    return args
