"""The first iteration of a loop with a cache, without the cache: keys and values, not a buffer that they fill.

    buffer[:, :, 0:S] = k        attention over `buffer` [B, H, M, d], masked behind S
    becomes                      attention over `k` [B, H, S, d]

S is the length of the text that the iteration reads, M that of the buffer. Values that had an axis of M now have one of
S; a mask of M columns that meets them loses its columns behind S. A concatenation of `k` with an empty cache becomes
`k`. The step is run on fake tensors at a length S that is no other size of the model, so that shapes tell S and M from
all other sizes. That the result is the same is not proved but measured: see `as_written.CachedIterations`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from smc_compile.errors import LoopError
from smc_compile.passes.fx_tools import call_node, describe, erase_dead_code, mutated_inputs, op_name
from smc_compile.passes.loop.buffer_writes import as_write, index_per_axis
from smc_compile.passes.loop.draws import is_random
from smc_compile.passes.loop.leaves import flatten, replace_leaves
from smc_compile.passes.loop.lengths import LENGTH, numbers_in, quiet_shapes, readings, same_but_for_length, shape_of
from smc_compile.passes.loop.tensor_info import TensorInfo
from smc_compile.passes.loop.token_labels import on_cpu

_KNOWN = 1 << 16  # integers are computed, not only their shapes, in tensors up to this size
_SIZED = frozenset(["arange", "zeros", "ones", "full", "empty"])
_MOST_OPTIONS = 6  # numbers of one call that may be lengths
_ATTENTION = "scaled_dot_product_attention"
Place = tuple[int, int, tuple[int, ...]]  # storage, offset, strides


@dataclass(frozen=True)
class Buffer:
    """A preallocated cache: where it lies, which of its axes the tokens fill, and how long that is."""

    place: Place
    shape: tuple[int, ...]
    axis: int
    length: int


@dataclass
class BufferFree:
    """The step without buffers.

    Attributes:
        step: ``forward(ids [B, S], *inputs)`` with the inputs that are kept.
        kept: for each placeholder after the ids, whether the step still reads it.
        buffers: what was replaced.
        grown: concatenations with an empty cache that were removed.
    """

    step: fx.GraphModule
    kept: list[bool]
    buffers: list[Buffer] = field(default_factory=list)
    grown: int = 0


def without_buffers(
    step: fx.GraphModule, batch: int, given: Sequence[TensorInfo | None], known: Sequence[torch.Tensor | None]
) -> BufferFree:
    """Rewrite ``step(ids [B, S], *inputs)``; ``given`` are the shapes of the inputs, ``known`` integers among them.

    Raises:
        LoopError: a cache is written or read in a way that is not understood.
    """
    with _disable_current_modes(), torch.no_grad():
        rewriter = _Rewriter(step, batch, given, known)
        rewriter.find_buffers()
        return rewriter.rewrite()


class _Rewriter:
    """Runs a step twice: as it was written, to find its buffers, and without them, to write the new graph."""

    def __init__(
        self,
        step: fx.GraphModule,
        batch: int,
        given: Sequence[TensorInfo | None],
        known: Sequence[torch.Tensor | None],
    ) -> None:
        self.step, self.batch = step, batch
        self.ids, *self.inputs = [node for node in step.graph.nodes if node.op == "placeholder"]
        self.given = dict(zip(self.inputs, given, strict=True))
        self.known = {node: value for node, value in zip(self.inputs, known, strict=True) if value is not None}
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.length = self.free_length()
        self.old: dict[fx.Node, Any] = {}  # values as the iteration was written
        self.new: dict[fx.Node, Any] = {}  # values without buffers
        self.copies: dict[fx.Node, Any] = {}
        self.buffers: dict[fx.Node, Buffer] = {}  # by the node that writes
        self.filled: dict[Place, tuple[Buffer, fx.Node, Any]] = {}
        self.graph = fx.Graph()
        self.grown = 0

    def free_length(self) -> int:
        """A small length that is no other number of the step."""
        taken = numbers_in(self.step.graph.nodes, self.given.values())
        return next(n for n in itertools.count(2) if n not in taken)

    # ---- as it was written -------------------------------------------------------------------------------------

    def find_buffers(self) -> None:
        """Runs the step as it was written, and notes the writes that fill a cache."""
        for node in self.step.graph.nodes:
            if node.op == "output":
                continue
            self.refuse_filled_cache(node)
            buffer = self.buffer_of(node) if mutated_inputs(node) else None
            if buffer is not None:
                self.buffers[node] = buffer
            else:
                self.refuse_written_input(node)
            self.old[node] = self.start(node) if node.op in ("placeholder", "get_attr") else self.run(node, self.old)

    def start(self, node: fx.Node) -> Any:
        """The value of an input, of a parameter or of a constant."""
        if node is self.ids:
            return self.fake((self.batch, self.length), torch.int64)
        if node in self.known:
            return self.known[node].clone()
        info = self.given.get(node)
        if info is not None:
            return self.fake(info.shape, info.dtype)
        value = getattr(self.step, str(node.target), None) if node.op == "get_attr" else None
        return self.fake(value.shape, value.dtype) if isinstance(value, torch.Tensor) else value

    def fake(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        with self.mode:
            return torch.empty(tuple(shape), dtype=dtype)

    def run(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """A node's value: the integers themselves where they follow from sizes, else a fake tensor."""
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        try:
            return self.call(node, args, kwargs)
        except Exception as error:
            raise LoopError(
                "The first iteration of a loop with a cache cannot be run at another length than the prompt's.",
                f"{describe(node)} with {self.length} tokens: {str(error).splitlines()[0] if str(error) else error!r}",
                "make what is as long as the prompt inside of the function (a mask: torch.ones_like(ids)); let shapes "
                "depend on ids.shape only; and mark the prompt as dynamic, torch.compile(..., dynamic=True)",
            ) from error

    def call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """What a call returns: real integers if all operands are real or none is a tensor, else a fake tensor."""
        args, kwargs = on_cpu(args), {key: "cpu" if key == "device" else on_cpu(v) for key, v in kwargs.items()}
        tensors = [v for v in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        if tensors and all(type(v) is torch.Tensor for v in tensors):
            return call_node(node, args, kwargs)
        with self.mode:
            value = call_node(node, args, kwargs)
        whole = isinstance(value, torch.Tensor) and not value.dtype.is_floating_point and value.numel() <= _KNOWN
        return call_node(node, args, kwargs) if not tensors and whole and not is_random(node) else value

    def buffer_of(self, node: fx.Node) -> Buffer | None:
        """What a write fills: [0, S) of one axis, all or the first rows of the others; None for other writes."""
        write = as_write(node)
        target = self.old.get(write.target) if write is not None else None
        if write is None or not isinstance(target, torch.Tensor):
            return None
        value = self.old.get(write.value) if isinstance(write.value, fx.Node) else None
        index = index_per_axis(fx.map_arg(write.index, self.old.__getitem__), target.dim())
        if index is None or not isinstance(value, torch.Tensor):
            return None
        filling = [axis for axis, item in enumerate(index) if self.is_prefix(item)]
        if len(filling) != 1 or value.dim() != target.dim() - sum(isinstance(item, int) for item in index):
            return None
        (axis,) = filling
        whole = target[tuple(slice(None) if at == axis else item for at, item in enumerate(index))]
        axis -= sum(isinstance(item, int) for item in index[:axis])
        expected = tuple(self.length if at == axis else size for at, size in enumerate(whole.shape))
        if tuple(value.shape) != expected or whole.shape[axis] < self.length:
            return None
        return Buffer(_place(whole), tuple(whole.shape), axis, whole.shape[axis])

    def is_prefix(self, item: Any) -> bool:
        """Whether an index is 0, 1, ..., S-1."""
        if isinstance(item, slice):
            return item.start in (None, 0) and item.stop == self.length and item.step in (None, 1)
        if type(item) is not torch.Tensor or item.dim() != 1:
            return False
        return torch.equal(item.long(), torch.arange(self.length))

    def refuse_written_input(self, node: fx.Node) -> None:
        """Refuse a write to an input that fills no cache: it would be lost."""
        places = {_place(self.old[source])[0]: source for source in self.inputs if self.is_tensor(source)}
        for target in mutated_inputs(node):
            storage = _place(self.old[target])[0] if self.is_tensor(target) else None
            if storage in places and places[storage] not in self.known:
                raise LoopError(
                    "The decode loop writes into one of its inputs.",
                    f"{describe(node)} changes `{places[storage].name}`, though not at the positions of the tokens "
                    "from 0 on, as a cache that starts empty would be written",
                    "start with an empty cache, and give the first call the whole prompt at positions 0, 1, ..., P-1",
                )

    def refuse_filled_cache(self, node: fx.Node) -> None:
        """Refuse keys of an earlier text before those of the prompt."""
        operands = node.args[0] if op_name(node) in ("cat", "concat", "concatenate") and node.args else ()
        for source in operands if isinstance(operands, tuple | list) else ():
            if source in self.given and self.is_tensor(source) and self.old[source].dim() > 2:
                raise LoopError(
                    "The cache that the decode loop is given is not empty.",
                    f"{describe(node)} puts the tokens' own keys behind `{source.name}` "
                    f"{list(self.old[source].shape)}, an input",
                    "start with an empty cache and the whole text as the prompt: the compiler makes its own cache",
                )

    def is_tensor(self, node: fx.Node) -> bool:
        return isinstance(self.old.get(node), torch.Tensor)

    # ---- without buffers ---------------------------------------------------------------------------------------

    def rewrite(self) -> BufferFree:
        """Writes the new graph, in which the values that fill a buffer stand for the buffer."""
        for node in self.step.graph.nodes:
            if node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], self.copies.__getitem__))
            elif node.op in ("placeholder", "get_attr"):
                self.copies[node] = self.graph.node_copy(node)
                self.new[node] = self.old[node]
            elif node in self.buffers:
                self.fill(node)
            elif (only := self.only_operand(node)) is not None:
                self.copies[node], self.new[node] = self.read(only)
                self.grown += 1
            else:
                self.copy(node)
        erase_dead_code(self.graph)
        kept = [bool(self.copies[node].users) for node in self.inputs]
        for node, used in zip(self.inputs, kept, strict=True):
            if not used:
                self.graph.erase_node(self.copies[node])
        self.graph.lint()
        module = fx.GraphModule(self.step, self.graph, class_name="Step")
        return BufferFree(module, kept, list(self.buffers.values()), self.grown)

    def fill(self, node: fx.Node) -> None:
        """The value that a write puts into a buffer stands for the buffer from here on."""
        write = as_write(node)
        assert write is not None
        dtype = self.old[write.target].dtype
        copy, value = self.read(write.value)
        if value.dtype != dtype:
            copy, value = self.emit("to", copy, dtype), value.to(dtype)
        buffer = self.buffers[node]
        self.filled[buffer.place] = (buffer, copy, value)
        self.copies[node], self.new[node] = copy, value

    def read(self, source: fx.Node) -> tuple[Any, Any]:
        """The copy and the value of a node; for a buffer, those of the keys that fill it."""
        old = self.old[source]
        if isinstance(old, torch.Tensor) and self.filled and (found := self.filled.get(_place(old))) is not None:
            buffer, copy, value = found
            shapes = [buffer.shape, tuple(value.shape)]
            if tuple(old.shape) in shapes:
                return copy, value
        return self.copies[source], self.new[source]

    def only_operand(self, node: fx.Node) -> fx.Node | None:
        """The operand of a concatenation whose other operands are empty."""
        operands = node.args[0] if op_name(node) in ("cat", "concat", "concatenate") else ()
        if not isinstance(operands, tuple | list) or not all(isinstance(o, fx.Node) for o in operands):
            return None
        full = [o for o in operands if self.old[o].numel()]
        same = len(full) == 1 and len(operands) > 1 and self.old[full[0]].dtype == self.old[node].dtype
        return full[0] if same else None  # type: ignore[return-value]

    def copy(self, node: fx.Node) -> None:
        """Copies a call. If an operand has S where it had M, the first reading of the call's sizes that fits is taken.

        Raises:
            LoopError: none fits.
        """
        read = {source: self.read(source) for source in node.all_input_nodes}
        inputs = {source: copy for source, (copy, _) in read.items()}
        values = {source: value for source, (_, value) in read.items()}
        shrunk = [s for s in read if shape_of(values[s]) != shape_of(self.old[s])]
        sized = op_name(node) in _SIZED and not any(self.is_tensor(s) for s in read) and not self.is_filled(node)
        if not shrunk and not sized:
            self.emit_copy(node, inputs, {})
            self.new[node] = self.old[node]
            return
        with quiet_shapes():
            for masks, leaves in itertools.product(self.masks(node, shrunk, values), self.readings(node)):
                chosen = {leaf for at, leaf in enumerate(flatten(node)) if at in leaves and isinstance(leaf, fx.Node)}
                tried = dict(values)
                tried.update({source: values[source].narrow(-1, 0, self.length) for source in masks})
                tried.update(dict.fromkeys(chosen, self.length))
                try:
                    value = self.call(node, *replace_leaves(node, leaves, tried))
                except Exception:  # this reading does not fit the op; another may, and if none does, we refuse below
                    continue
                if same_but_for_length(shape_of(self.old[node]), shape_of(value), self.lengths(), self.length):
                    narrowed = {s: self.emit("narrow", inputs[s], -1, 0, self.size()) for s in masks}
                    self.emit_copy(node, {**inputs, **narrowed}, leaves)
                    self.new[node] = value
                    return
        raise LoopError(
            "The cache of the decode loop is preallocated, and which of the sizes are its length is not clear.",
            f"a cache of {self.lengths()} positions; no reading of the sizes fits {describe(node)}",
            "allocate a cache of another length, one that is no other size of the model",
        )

    def is_filled(self, node: fx.Node) -> bool:
        """Whether a value lies in a buffer."""
        old = self.old[node]
        storages = {buffer.place[0] for buffer in self.buffers.values()}
        return isinstance(old, torch.Tensor) and _place(old)[0] in storages

    def lengths(self) -> list[int]:
        """M of every buffer."""
        return sorted({buffer.length for buffer in self.buffers.values()})

    def readings(self, node: fx.Node) -> Iterator[dict[int, int]]:
        """Leaves that were lengths of the buffer, with the length that they are now; first all that may be such."""
        lengths = self.lengths()
        values = [self.old.get(leaf) if isinstance(leaf, fx.Node) else leaf for leaf in flatten(node)]
        found = [at for at, v in enumerate(values) if type(v) is int and v in lengths][:_MOST_OPTIONS]
        for reading in readings([[((node, at), LENGTH), None] for at in found]):
            yield {at: affine.at(self.length) for (_, at), affine in reading}

    def masks(self, node: fx.Node, shrunk: Sequence[fx.Node], values: dict[fx.Node, Any]) -> Iterator[list[fx.Node]]:
        """Choices of operands to cut behind S: the mask of an attention; else none, or all that have M columns."""
        wide = [
            source
            for source, value in values.items()
            if source not in shrunk and isinstance(value, torch.Tensor) and value.dim() > 1
            if value.shape[-1] in self.lengths()
        ]
        if shrunk and op_name(node) == _ATTENTION:
            mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
            yield [mask] if mask in wide else []  # type: ignore[list-item]
            return
        yield []
        if wide and any(shape_of(self.old[s])[-1:] != shape_of(values[s])[-1:] for s in shrunk):
            yield wide

    def size(self) -> fx.Node:
        """S in the new graph."""
        return self.emit("size", self.copies[self.ids], 1)

    def emit(self, method: str, *args: Any) -> fx.Node:
        return self.graph.call_method(method, args)

    def emit_copy(self, node: fx.Node, inputs: dict[fx.Node, Any], leaves: Iterable[int]) -> None:
        """Copies a call with other inputs; the leaves of these numbers become S."""
        numbers: dict[int, Any] = dict.fromkeys(leaves, self.size()) if leaves else {}
        for at, leaf in enumerate(flatten(node)):
            if at in numbers and isinstance(leaf, fx.Node):
                inputs = {**inputs, leaf: numbers[at]}
        args, kwargs = replace_leaves(node, numbers, inputs)
        copy = self.graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        copy.meta = dict(node.meta)
        self.copies[node] = copy


def _place(value: torch.Tensor) -> Place:
    """Where a tensor lies: views of the same cells of a buffer have the same place."""
    return value.untyped_storage()._cdata, int(value.storage_offset()), tuple(value.stride())
